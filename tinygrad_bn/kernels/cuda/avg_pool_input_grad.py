"""The transpose of average pools on a GPU: launches of `pooling.cu`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import images, launch
from tinygrad_bn.windows import Windows


def forward(y: Any, *, view: Windows, count_include_pad: bool = True) -> Any:
    """Return what `ops.pooling.avg_pool2d_input_grad` returns, or NotImplemented."""
    if y.shape != view.out_shape(view.channels) or not images.served(view, y):
        return NotImplemented
    with launch.on_device_of(y):
        x = array_module(y).empty(view.shape, y.dtype)
        images.run("spread_windows", view, x, images.contiguous(y), x, int(count_include_pad))
    return x
