"""Max pools on a GPU: launches of `pooling.cu`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module, saving
from tinygrad_bn.kernels.cuda import images, launch
from tinygrad_bn.windows import pool_windows


def forward(x: Any, **options: Any) -> Any:
    """Return what `ops.pooling.max_pool2d` returns, or NotImplemented."""
    view = pool_windows("max_pool2d", x.shape, **options)
    if not images.served(view, x) or view.place_dtype != "uint8":
        return NotImplemented
    xp = array_module(x)
    with launch.on_device_of(x):
        y = xp.empty(view.out_shape(view.channels), x.dtype)
        places = xp.empty(y.shape, "uint8")
        images.run("max_pool", view, y, images.contiguous(x), y, places)
    return saving(y, places=places, view=view)
