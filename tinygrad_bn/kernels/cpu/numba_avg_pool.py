"""`avg_pool2d` in compiled loops: see `pooling_loops`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.pooling_loops import average
from tinygrad_bn.kernels.cpu.pools import Array, counts, run, serves, sizes
from tinygrad_bn.windows import pool_windows


def forward(
    x: Array, *, layout: str = "NCHW", count_include_pad: bool = True, **options: Any
) -> Any:
    """Return what `ops.pooling.avg_pool2d` returns, or NotImplemented."""
    if not serves(x, layout, 1):
        return NotImplemented
    view = pool_windows("avg_pool2d", x.shape, layout=layout, **options)
    y = memory.empty(view.out_shape(view.channels), x.dtype)
    loop, numbers, shares = (
        average.of(x.dtype),
        sizes(view),
        counts(view, x.dtype, count_include_pad),
    )
    run(lambda x, y: loop(x, numbers, shares, y), x, y)
    return saving(y, view=view)
