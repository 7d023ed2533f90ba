"""Average pools on a GPU: launches of `pooling.cu`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module, saving
from tinygrad_bn.kernels.cuda import images, launch
from tinygrad_bn.windows import pool_windows


def forward(x: Any, *, count_include_pad: bool = True, **options: Any) -> Any:
    """Return what `ops.pooling.avg_pool2d` returns, or NotImplemented."""
    view = pool_windows("avg_pool2d", x.shape, **options)
    if not images.served(view, x):
        return NotImplemented
    with launch.on_device_of(x):
        y = array_module(x).empty(view.out_shape(view.channels), x.dtype)
        images.run("average_pool", view, y, images.contiguous(x), y, int(count_include_pad))
    return saving(y, view=view)
