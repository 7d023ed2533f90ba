"""`scatter_windows`, the derivative of a max pool, in compiled loops: see `pooling_loops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.numba_pooling import FEWEST_CHANNELS
from tinygrad_bn.kernels.cpu.pooling_loops import scatter
from tinygrad_bn.kernels.cpu.pools import Array, run, serves, sizes
from tinygrad_bn.windows import Windows


def forward(y: Array, places: Array, *, view: Windows) -> Any:
    """Return what `ops.pooling.scatter_windows` returns, or NotImplemented."""
    shape = view.out_shape(view.channels)
    if y.shape != shape or places.shape != shape or places.dtype != np.uint8:
        return NotImplemented
    if not serves(y, view.layout, FEWEST_CHANNELS):
        return NotImplemented
    x = memory.empty(view.shape, y.dtype)
    loop, numbers = scatter.of(y.dtype), sizes(view)
    run(lambda y, places, x: loop(y, places, numbers, x), y, places, x)
    return x
