"""`conv2d_weight_grad` in chunks: the same windows as forward, multiplied with the cotangent."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.columns import Columns, chunks, pixels, serves
from tinygrad_bn.kernels.cpu.threads import num_threads, parallel, scratch
from tinygrad_bn.windows import Windows

Array = Any

#: From this size of a product on, a chunk's images are joined to one.
JOINED_BYTES = 64 * 2**10
#: How many partial sums there are at most; they may take this many bytes together.
PARTS, PART_BYTES = 16, 16 * 2**20


def forward(x: Array, y: Array, *, view: Windows) -> Any:
    """Return what `ops.convolution.conv2d_weight_grad` returns, or NotImplemented."""
    outputs = y.shape[view.axes[3]]
    if not serves(x, y) or view.groups != 1 or y.shape != view.out_shape(outputs):
        return NotImplemented
    if not (x.size and y.size):
        return NotImplemented
    y = np.ascontiguousarray(y)
    entries = view.kernel[0] * view.kernel[1] * view.channels
    bytes_each = entries * outputs * x.dtype.itemsize
    # Where one image's product is itself large, a chunk's images are joined to one product.
    join = bytes_each > JOINED_BYTES
    columns = Columns(x, view, by_pixel=join)
    tasks = chunks(view, columns.row_bytes() + (0 if join else -(-bytes_each // view.out[0])))
    # Each partial sum takes its own chunks in order, so the result does not depend on which thread
    # was faster.
    count = min(len(tasks), max(num_threads(), min(PARTS, PART_BYTES // bytes_each)))
    sums = np.zeros((count, entries, outputs), x.dtype)

    def add_up(part: int) -> None:
        for chunk in tasks[part * len(tasks) // count : (part + 1) * len(tasks) // count]:
            windows, cotangents = columns(chunk), pixels(y, view, chunk)
            if join:
                sums[part] += _joined(windows, cotangents)
            else:
                products = scratch("products", (len(windows), entries, outputs), x.dtype)
                np.matmul(windows.transpose(0, 2, 1), cotangents, out=products)
                sums[part] += products.sum(axis=0)

    parallel(add_up, count)
    weight = sums.sum(axis=0).reshape(*view.kernel, view.channels, outputs)
    return np.ascontiguousarray(weight.transpose(3, 2, 0, 1))


def _joined(windows: Array, cotangents: Array) -> Array:
    """Return the sum over images of windowsᵀ cotangents, as one product over all pixels."""
    images, pixels_each, outputs = cotangents.shape
    if not cotangents.flags.c_contiguous:
        copy = scratch("cotangents", cotangents.shape, cotangents.dtype)
        np.copyto(copy, cotangents)
        cotangents = copy
    size = images * pixels_each
    return windows.reshape(size, -1).T @ cotangents.reshape(size, outputs)
