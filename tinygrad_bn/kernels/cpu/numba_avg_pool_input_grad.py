"""`avg_pool2d_input_grad` in compiled loops: see `pooling_loops`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.pooling_loops import spread
from tinygrad_bn.kernels.cpu.pools import Array, counts, run, serves, sizes
from tinygrad_bn.windows import Windows


def forward(y: Array, *, view: Windows, count_include_pad: bool = True) -> Any:
    """Return what `ops.pooling.avg_pool2d_input_grad` returns, or NotImplemented."""
    if y.shape != view.out_shape(view.channels) or not serves(y, view.layout, 1):
        return NotImplemented
    x = memory.empty(view.shape, y.dtype)
    loop, numbers, shares = (
        spread.of(y.dtype),
        sizes(view),
        counts(view, y.dtype, count_include_pad),
    )
    run(lambda y, x: loop(y, numbers, shares, x), y, x)
    return x
