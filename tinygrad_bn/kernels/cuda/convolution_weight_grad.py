"""The gradient of a convolution's weights on a GPU: two launches of `convolution.cu`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import convolutions, launch
from tinygrad_bn.windows import Windows


def forward(x: Any, y: Any, *, view: Windows) -> Any:
    """Return what `ops.convolution.conv2d_weight_grad` returns, or NotImplemented."""
    outputs = y.shape[view.axes[3]]
    fits = x.shape == view.shape and y.shape == view.out_shape(outputs)
    if not fits or not convolutions.served(view, outputs, view.channels, x, y):
        return NotImplemented
    xp = array_module(x)
    with launch.on_device_of(x):
        weight = xp.empty((outputs, view.channels, *view.kernel), x.dtype)
        x, y = xp.ascontiguousarray(x), xp.ascontiguousarray(y)
        convolutions.weight_gradient(view, x, y, weight)
    return weight
