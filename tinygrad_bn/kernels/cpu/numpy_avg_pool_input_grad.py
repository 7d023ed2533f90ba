"""`avg_pool2d_input_grad` with few windows: see `numpy_avg_pool`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.numpy_avg_pool import Array, each, few
from tinygrad_bn.kernels.cpu.planes import for_chunks
from tinygrad_bn.kernels.cpu.pools import counts
from tinygrad_bn.windows import Windows


def forward(y: Array, *, view: Windows, count_include_pad: bool = True) -> Any:
    """Return what `ops.pooling.avg_pool2d_input_grad` returns, or NotImplemented."""
    if y.dtype not in (np.float32, np.float64) or not y.size or not few(view):
        return NotImplemented
    if y.shape != view.out_shape(view.channels):
        return NotImplemented
    x = memory.empty(view.shape, y.dtype)
    images, gains = x.transpose(view.axes), y.transpose(view.axes)
    count = counts(view, y.dtype, count_include_pad)

    def work(first: int, last: int) -> None:
        images[first:last] = 0
        for i, j, (rows, columns) in each(view):
            share = gains[first:last, i, j] / count[i, j]
            images[first:last, rows, columns] += share[:, None, None]

    for_chunks(work, images)
    return x
