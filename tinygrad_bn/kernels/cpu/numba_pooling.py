"""`max_pool2d` in compiled loops: see `pooling_loops`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.pooling_loops import largest
from tinygrad_bn.kernels.cpu.pools import Array, run, serves, sizes
from tinygrad_bn.windows import pool_windows

# With fewer channels, blocks of NumPy are quicker: an inner loop has places beside numbers, and
# only whole vectors of both pay.
FEWEST_CHANNELS = 32


def forward(x: Array, *, layout: str = "NCHW", **options: Any) -> Any:
    """Return what `ops.pooling.max_pool2d` returns, or NotImplemented."""
    if not serves(x, layout, FEWEST_CHANNELS):
        return NotImplemented
    view = pool_windows("max_pool2d", x.shape, layout=layout, **options)
    if view.place_dtype != "uint8":
        return NotImplemented
    best = memory.empty(view.out_shape(view.channels), x.dtype)
    places = memory.empty(best.shape, np.uint8)
    loop, numbers = largest.of(x.dtype), sizes(view)
    starts = np.array(view.first_places(), np.uint8)
    run(lambda x, *outs: loop(x, numbers, starts, *outs), x, best, places)
    return saving(best, places=places, view=view)
