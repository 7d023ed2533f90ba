"""`scatter_windows` in chunks: for each place of a window, what chose it is kept, the rest is 0.

An entry is kept or made 0 by multiplying its bits, as an integer, with 1 or 0: unlike a product of
floats that is right for infinities and NaN, and unlike a selection it does not branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.planes import for_chunks, offsets, planes
from tinygrad_bn.kernels.cpu.threads import scratch
from tinygrad_bn.windows import Windows

Array = Any

_BITS = {np.dtype(np.float32): np.dtype(np.int32), np.dtype(np.float64): np.dtype(np.int64)}


def forward(y: Array, places: Array, *, view: Windows) -> Any:
    """Return what `ops.pooling.scatter_windows` returns, or NotImplemented."""
    shape = view.out_shape(view.channels)
    if y.dtype not in _BITS or places.dtype != np.uint8 or not y.size:
        return NotImplemented
    if y.shape != shape or places.shape != shape:
        return NotImplemented
    x = memory.empty(view.shape, y.dtype)
    all_x, all_y, all_places = planes(x, view), planes(y, view), planes(places, view)
    overlap = view.stride[0] < view.kernel[0] or view.stride[1] < view.kernel[1]
    tiled = view.stride == view.kernel and view.padded == (
        view.out[0] * view.stride[0],
        view.out[1] * view.stride[1],
    )
    (ph, pw), (h, w) = view.padding, view.size
    index = offsets(view)

    def work(first: int, last: int) -> None:
        inside = all_x[first:last]
        images = inside
        if ph or pw:
            images = scratch("padded", (last - first, *view.padded, inside.shape[3]), x.dtype)
        if overlap or not tiled:
            images.fill(0)
        _scatter(images, all_y[first:last], all_places[first:last], index, overlap)
        if ph or pw:
            inside[...] = images[:, ph : ph + h, pw : pw + w]

    for_chunks(work, all_x)
    return x


def _scatter(images: Array, y: Array, places: Array, index: Any, overlap: bool) -> None:
    bits = _BITS[y.dtype]
    chosen = scratch("chosen", y.shape, np.bool_)
    kept = scratch("kept", y.shape, bits)
    y_bits, kept_y = y.view(bits), kept.view(y.dtype)
    for place, entries in index:
        np.equal(places, place, out=chosen)
        np.copyto(kept, chosen)
        np.multiply(kept, y_bits, out=kept)
        target = images[entries]
        if overlap:
            np.add(target, kept_y, out=target)
        else:
            np.copyto(target, kept_y)
