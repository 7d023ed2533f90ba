"""Images as matrices, a chunk at a time: what the convolution kernels multiply.

A convolution is a matrix product of its windows, one row for each output pixel, with the weights.
All windows together are many times larger than the image (KH · KW times), so they are laid out for
a few images, or a few rows of one, in scratch memory that stays in the CPU's cache, and used at
once. Small products in cache beat one large product out of it by two to three times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from tinygrad_bn.kernels.cpu.threads import num_threads, scratch
from tinygrad_bn.windows import Windows

Array = Any

#: What the scratch of one chunk may take, so that it stays in cache until it is multiplied. (Twice
#: a core's L2 measured best: threads wait for each other in the Python between chunks.)
CHUNK_BYTES = 2 * 2**20


class Chunk(NamedTuple):
    """Images [first, last) and, of each, output rows [top, bottom)."""

    first: int
    last: int
    top: int
    bottom: int


def chunks(view: Windows, row_bytes: int) -> list[Chunk]:
    """Return all images and output rows in chunks of at most CHUNK_BYTES where that can be.

    row_bytes: what one output row takes in scratch.
    """
    rows = view.out[0]
    if rows * row_bytes > CHUNK_BYTES:
        step = max(1, CHUNK_BYTES // row_bytes)
        return [
            Chunk(image, image + 1, top, min(top + step, rows))
            for image in range(view.batch)
            for top in range(0, rows, step)
        ]
    # At least four chunks a thread, or the threads finish apart.
    step = max(1, min(CHUNK_BYTES // (rows * row_bytes), view.batch // (4 * num_threads())))
    return [
        Chunk(first, min(first + step, view.batch), 0, rows) for first in range(0, view.batch, step)
    ]


def serves(*arrays: Array | None) -> bool:
    """Return whether all (present) arrays are of one floating dtype that BLAS multiplies."""
    dtypes = {array.dtype for array in arrays if array is not None}
    return len(dtypes) == 1 and dtypes <= {np.dtype(np.float32), np.dtype(np.float64)}


def weight_matrix(weight: Array) -> Array:
    """Return weights (O, C, KH, KW) as (KH KW C, O), in the order of the columns' entries."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def pixels(y: Array, view: Windows, chunk: Chunk) -> Array:
    """Return a chunk of outputs, in C order, as a view (images, pixels, channels)."""
    first, last, top, bottom = chunk
    if view.layout == "NHWC":
        return y[first:last, top:bottom].reshape(last - first, -1, y.shape[3])
    return y[first:last, :, top:bottom].reshape(last - first, y.shape[1], -1).transpose(0, 2, 1)


class Columns:
    """The windows of images x: called with a chunk, (images, pixels, KH KW C) in scratch memory.

    Each pixel's window lies together ("by pixel") where rows of a window are long runs of memory,
    which copy fast; otherwise each window entry lies together for all pixels ("by entry"), whose
    runs are the output's rows. Either is, to a matrix product, the transpose of the other.
    """

    def __init__(self, x: Array, view: Windows, by_pixel: bool = False):
        self.x = x.transpose(view.axes)  # (N, H, W, C), whatever the memory order
        self.view = view
        run = view.channels * (view.kernel[1] if view.dilation[1] == 1 else 1)
        self.by_pixel = by_pixel or run >= view.out[1]
        self.entries = view.kernel[0] * view.kernel[1] * view.channels

    def row_bytes(self) -> int:
        """Return what one output row takes in scratch."""
        return self.view.out[1] * self.entries * self.x.dtype.itemsize

    def __call__(self, chunk: Chunk) -> Array:
        """Return the chunk's windows, until the next call in this thread."""
        view = self.view
        images, rows = chunk.last - chunk.first, chunk.bottom - chunk.top
        source = self._padded_rows(chunk)
        size = (images, rows, view.out[1], *view.kernel, view.channels)
        n, h, w, c = source.strides
        (sh, sw), (dh, dw) = view.stride, view.dilation
        windows = as_strided(source, size, (n, h * sh, w * sw, h * dh, w * dw, c), writeable=False)
        pixels = rows * view.out[1]
        if self.by_pixel:
            columns = scratch("columns", (images, pixels, self.entries), source.dtype)
            np.copyto(columns.reshape(size), windows)
            return columns
        columns = scratch("columns", (images, self.entries, pixels), source.dtype)
        order = (0, 3, 4, 5, 1, 2)
        windows = windows.transpose(order)
        np.copyto(columns.reshape(windows.shape), windows)
        return columns.transpose(0, 2, 1)

    def _padded_rows(self, chunk: Chunk) -> Array:
        """Return the padded input rows (images, rows, PW, C) that a chunk's windows look at."""
        view = self.view
        (ph, pw), (height, width) = view.padding, view.size
        start = chunk.top * view.stride[0] - ph
        span = (view.kernel[0] - 1) * view.dilation[0] + 1
        stop = (chunk.bottom - 1) * view.stride[0] - ph + span
        images = self.x[chunk.first : chunk.last]
        together = images.strides[3] == images.itemsize and (
            images.strides[2] == images.itemsize * view.channels
        )
        if ph == pw == 0 and (together or not self.by_pixel):
            return images[:, start:stop]
        size = (len(images), stop - start, view.padded[1], view.channels)
        rows = scratch("padded", size, images.dtype)
        if ph or pw:
            rows.fill(0)
        inside = rows[:, max(0, -start) : height - start, pw : pw + width]
        np.copyto(inside, images[:, max(0, start) : max(0, stop)])
        return rows
