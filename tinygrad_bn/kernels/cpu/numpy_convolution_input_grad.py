"""`conv2d_input_grad` in chunks: for each window entry one small product, added where it belongs.

The product for one entry of the kernel fits the first levels of cache, and is added to rows of the
input's gradient, which are long runs of memory with channels last. So the chunk's gradient is
gathered channels last in either layout, and laid out as it must be once, at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.columns import Chunk, chunks, pixels, serves
from tinygrad_bn.kernels.cpu.threads import parallel, scratch
from tinygrad_bn.windows import Windows

Array = Any


def forward(y: Array, weight: Array, *, view: Windows) -> Any:
    """Return what `ops.convolution.conv2d_input_grad` returns, or NotImplemented."""
    outputs = weight.shape[0]
    if not serves(y, weight) or view.groups != 1 or y.shape != view.out_shape(outputs):
        return NotImplemented
    if not (y.size and view.channels):
        return NotImplemented
    y = np.ascontiguousarray(y)
    matrices = np.ascontiguousarray(weight.transpose(2, 3, 0, 1))  # (KH, KW, O, C)
    x = memory.empty(view.shape, y.dtype)
    # Rows of one image cannot be shared among threads here, since their windows overlap.
    # Each row is used KH · KW times, so it counts double: it should stay closer than in L2.
    row_bytes = 2 * view.out[1] * (outputs + 2 * view.channels) * y.dtype.itemsize
    groups: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks(view, row_bytes):
        groups.setdefault((chunk.first, chunk.last), []).append(chunk)
    tasks = list(groups.values())
    in_place = view.layout == "NHWC" and view.padding == (0, 0)
    (ph, pw), (height, width) = view.padding, view.size

    def spread(index: int) -> None:
        first, last, _, _ = tasks[index][0]
        target = x.transpose(view.axes)[first:last]
        size = (last - first, *view.padded, view.channels)
        images = target if in_place else scratch("images", size, y.dtype)
        images.fill(0)
        for chunk in tasks[index]:
            cotangents = pixels(y, view, chunk)
            _add_products(images, cotangents, matrices, view, chunk)
        if not in_place:
            np.copyto(target, images[:, ph : ph + height, pw : pw + width])

    parallel(spread, len(tasks))
    return x


def _add_products(
    images: Array, cotangents: Array, matrices: Array, view: Windows, chunk: Chunk
) -> None:
    """Add the products of cotangents (images, pixels, O) to the padded `images` (N, H, W, C)."""
    count, pixels_each, outputs = cotangents.shape
    product = scratch("products", (count, pixels_each, view.channels), images.dtype)
    rows = chunk.bottom - chunk.top
    as_images = product.reshape(count, rows, view.out[1], view.channels)
    if cotangents.flags.c_contiguous:  # then all images make one matrix
        cotangents = cotangents.reshape(count * pixels_each, outputs)
        product = product.reshape(count * pixels_each, view.channels)
    below = chunk.top * view.stride[0]
    length = (rows - 1) * view.stride[0] + 1
    for i, j, (all_rows, columns) in view.offsets():
        np.matmul(cotangents, matrices[i, j], out=product)
        start = all_rows.start + below
        part = images[:, start : start + length : view.stride[0], columns]
        np.add(part, as_images, out=part)
