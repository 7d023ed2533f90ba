"""The gradient of a convolution's images on a GPU: a launch of `convolution.cu`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import convolutions, launch
from tinygrad_bn.windows import Windows


def forward(y: Any, weight: Any, *, view: Windows) -> Any:
    """Return what `ops.convolution.conv2d_input_grad` returns, or NotImplemented."""
    outputs = weight.shape[0]
    fits = y.shape == view.out_shape(outputs)
    if not fits or not convolutions.served(view, outputs, outputs, y, weight):
        return NotImplemented
    xp = array_module(y)
    with launch.on_device_of(y):
        x = xp.empty(view.shape, y.dtype)
        y, weight = xp.ascontiguousarray(y), xp.ascontiguousarray(weight)
        convolutions.convolve(view, y, weight, None, x, transposed=True)
    return x
