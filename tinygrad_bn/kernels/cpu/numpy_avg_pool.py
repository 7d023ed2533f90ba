"""`avg_pool2d` with few windows, such as one over the whole image: one window after another.

The generic form takes entry after entry of all windows, which for one window are all the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.planes import for_chunks
from tinygrad_bn.kernels.cpu.pools import counts
from tinygrad_bn.windows import Windows, pool_windows

Array = Any
Pixels = tuple[slice, slice]

# Up to so many windows for each entry of one, the generic form makes more passes.
MOST_WINDOWS = 1


def forward(x: Array, *, count_include_pad: bool = True, **options: Any) -> Any:
    """Return what `ops.pooling.avg_pool2d` returns, or NotImplemented."""
    if x.dtype not in (np.float32, np.float64) or not x.size:
        return NotImplemented
    view = pool_windows("avg_pool2d", x.shape, **options)
    if not few(view):
        return NotImplemented
    y = memory.empty(view.out_shape(view.channels), x.dtype)
    images, means = x.transpose(view.axes), y.transpose(view.axes)
    count = counts(view, x.dtype, count_include_pad)

    def work(first: int, last: int) -> None:
        for i, j, (rows, columns) in each(view):
            total = images[first:last, rows, columns].sum(axis=(1, 2))
            np.divide(total, count[i, j], out=means[first:last, i, j])

    for_chunks(work, images)
    return saving(y, view=view)


def few(view: Windows) -> bool:
    """Return whether there are fewer windows than entries in one."""
    return view.out[0] * view.out[1] < MOST_WINDOWS * view.kernel[0] * view.kernel[1]


def each(view: Windows) -> Iterator[tuple[int, int, Pixels]]:
    """Yield row and column of each window, and its pixels without padding."""
    (kh, kw), (sh, sw), (ph, pw) = view.kernel, view.stride, view.padding
    for i in range(view.out[0]):
        for j in range(view.out[1]):
            top, left = i * sh - ph, j * sw - pw
            yield i, j, (slice(max(0, top), top + kh), slice(max(0, left), left + kw))
