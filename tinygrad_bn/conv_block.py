"""Functional convolution, batch norm, ReLU and max pool in one."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.normalization import BatchStatistics, batch_norm
from tinygrad_bn.normalization_checks import check_state, checked_numbers
from tinygrad_bn.ops import fused as _fused
from tinygrad_bn.ops.convolution import conv2d
from tinygrad_bn.ops.elementwise import relu
from tinygrad_bn.ops.pooling import max_pool2d
from tinygrad_bn.windows import LAYOUTS, Pair


def conv_block(
    x: Any,
    kernel: Any,
    offset: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    pool: Pair | None = None,
    layout: str = "NCHW",
    correction: float = 1,
) -> Any:
    """Return max_pool2d(relu(batch_norm(conv2d(x, kernel, offset), ...)), pool).

    kernel, offset, stride, padding, dilation, groups, layout: as weight, bias and the rest of
        `conv2d`. running_mean to eps, correction: as of `batch_norm`, along the channels.
    pool: the size of the windows, side by side, of which the largest entries are taken; None to
        take none.

    In training, and where a kernel serves it (`tg.kernel_status()["conv_block"]`), a few images at
    a time run through all of it, in cache. The values are those of the four functions, within
    rounding, and so are gradients of any order. `nn.Sequential` does the same for plain layers.

    Raises what the four raise.

    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> conv_block(x, np.ones((1, 1, 1, 1)), training=True, pool=2).round(2)
    array([[[[0.  , 0.  ],
             [1.19, 1.63]]]])
    """
    eps, momentum = checked_numbers("conv_block", eps, momentum, correction)
    if training:
        check_state("conv_block", {"running_mean": running_mean, "running_var": running_var})
    # What is unusual, or wrong, takes the plain way: that one knows what to say about it.
    usual = (running_mean is None) == (running_var is None)
    usual = usual and groups == 1 and _per_channel(kernel, running_mean, running_var)
    if usual and (training or running_mean is None):
        found = conv_block_if_served(
            x, kernel, offset, weight, bias, eps,
            stride=stride, padding=padding, dilation=dilation, pool=pool, layout=layout,
        )  # fmt: skip
        if found is not None:
            y, statistics = found
            if running_mean is not None:
                statistics.move(running_mean, running_var, momentum, correction)
            return y
    y = conv2d(
        x, kernel, offset, stride=stride, padding=padding, dilation=dilation, groups=groups,
        layout=layout,
    )  # fmt: skip
    y = batch_norm(
        y, running_mean, running_var, weight, bias, training, momentum, eps,
        axis=LAYOUTS[layout][3], correction=correction,
    )  # fmt: skip
    y = relu(y)
    return y if pool is None else max_pool2d(y, kernel_size=pool, layout=layout)


def conv_block_if_served(
    x: Any,
    kernel: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    eps: float,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: Pair | None,
    layout: str,
) -> tuple[Any, BatchStatistics] | None:
    """Return the block's output and the statistics of the batch; None where no kernel serves it.

    Arguments as `conv_block`'s.
    """
    if not _per_channel(kernel, weight, bias):
        return None
    found = _fused.conv_block.served(
        x, kernel, offset, weight, bias, eps=float(eps),
        stride=stride, padding=padding, dilation=dilation, pool=pool, layout=layout,
    )  # fmt: skip
    if found is NotImplemented:
        return None
    y, residuals = found
    return y, BatchStatistics(residuals["mean"], residuals["var"], residuals["count"])


def _per_channel(kernel: Any, *vectors: Any) -> bool:
    """Return whether each of `vectors` that is there has one value per output channel."""
    channels = tuple(kernel.shape[:1])
    return all(vector is None or tuple(vector.shape) == channels for vector in vectors)
