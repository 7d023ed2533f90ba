"""The 2-D convolution layer."""

from __future__ import annotations

from operator import index
from typing import Any

from tinygrad_bn import creation
from tinygrad_bn import functional as F
from tinygrad_bn.nn.init import like_pytorch_
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.windows import Pair, pair


class Conv2d(Module):
    """2-D cross-correlation with learned kernels; see `F.conv2d`.

    in_channels, out_channels: numbers of channels, divisible by `groups`.
    kernel_size, stride, padding, dilation: an integer, or a pair (rows, columns).
    groups: split the channels into groups that do not mix.
    bias: whether to add a value per output channel.
    layout: of the images, "NCHW" or "NHWC".
    dtype, device: of the parameters.

    `weight` is (out_channels, in_channels / groups, KH, KW) in either layout, `bias`
    (out_channels,) or None. Both start from U(-b, b) with b = 1/√fan-in, as PyTorch's; the fan-in
    is in_channels / groups · KH · KW.

    >>> import tinygrad_bn as tg
    >>> tg.nn.Conv2d(1, 20, 5)(tg.ones(2, 1, 28, 28)).shape
    (2, 20, 24, 24)
    """

    bias: Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        layout: str = "NCHW",
        dtype: Any = None,
        device: str | None = None,
    ):
        in_channels, out_channels, groups = map(index, (in_channels, out_channels, groups))
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"Conv2d: groups={groups} must be a positive divisor of both the {in_channels} "
                f"input and the {out_channels} output channels"
            )
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"Conv2d: layout is {layout!r}, expected 'NCHW' or 'NHWC'")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("Conv2d", "kernel_size", kernel_size, 1)
        self.stride = pair("Conv2d", "stride", stride, 1)
        self.padding = pair("Conv2d", "padding", padding, 0)
        self.dilation = pair("Conv2d", "dilation", dilation, 1)
        self.groups = groups
        self.layout = layout
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = Parameter(creation.empty(shape, dtype=dtype, device=device))
        self.bias = (
            Parameter(creation.empty(out_channels, dtype=dtype, device=device)) if bias else None
        )
        like_pytorch_(self.weight, self.bias)

    def forward(self, x: Any) -> Any:
        """Return the cross-correlation of x with `weight`, plus `bias`."""
        return F.conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        """Return the sizes, and what is not at its default."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts.append(f"stride={self.stride}")
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "layout": "NCHW"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)
