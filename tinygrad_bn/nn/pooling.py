"""Pooling layers; see `F.max_pool2d` and `F.avg_pool2d`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn import functional as F
from tinygrad_bn.functional import Pair
from tinygrad_bn.nn.module import Module


class _Pool2d(Module):
    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        *,
        layout: str = "NCHW",
    ):
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(
                f"{type(self).__name__}: layout is {layout!r}, expected 'NCHW' or 'NHWC'"
            )
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.layout = layout

    def extra_repr(self) -> str:
        """Return the sizes."""
        text = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return text if self.layout == "NCHW" else f"{text}, layout={self.layout!r}"


class MaxPool2d(_Pool2d):
    """The largest entry of each window.

    kernel_size, stride (None: as the kernel), padding: an integer, or a pair (rows, columns).
    layout: of the images, "NCHW" or "NHWC".

    >>> import tinygrad_bn as tg
    >>> tg.nn.MaxPool2d(2)(tg.ones(1, 3, 8, 8)).shape
    (1, 3, 4, 4)
    """

    def forward(self, x: Any) -> Any:
        """Return the largest entry of each window of x."""
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, layout=self.layout)


class AvgPool2d(_Pool2d):
    """The mean of each window, its padding of zeros included; arguments as `MaxPool2d`.

    >>> import tinygrad_bn as tg
    >>> tg.nn.AvgPool2d(2)(tg.ones(1, 3, 8, 8)).shape
    (1, 3, 4, 4)
    """

    def forward(self, x: Any) -> Any:
        """Return the mean of each window of x."""
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding, layout=self.layout)
