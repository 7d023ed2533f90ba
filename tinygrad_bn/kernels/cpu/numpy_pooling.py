"""`max_pool2d` in chunks: one pass per place of the window, over entries copied side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.planes import for_chunks, offsets, planes
from tinygrad_bn.kernels.cpu.threads import scratch
from tinygrad_bn.windows import Windows, pool_windows

Array = Any


def forward(x: Array, **options: Any) -> Any:
    """Return what `ops.pooling.max_pool2d` returns, or NotImplemented."""
    if x.dtype not in (np.float32, np.float64):
        return NotImplemented
    view = pool_windows("max_pool2d", x.shape, **options)
    if view.place_dtype != "uint8" or not x.size:
        return NotImplemented
    best = memory.empty(view.out_shape(view.channels), x.dtype)
    places = memory.empty(best.shape, np.uint8)
    all_x, all_best, all_places = planes(x, view), planes(best, view), planes(places, view)
    starts = np.array(view.first_places(), np.uint8)[..., None] if any(view.padding) else None
    index = offsets(view)

    def work(first: int, last: int) -> None:
        images = _padded(all_x[first:last], view)
        out, where = all_best[first:last], all_places[first:last]
        _reduce(images, out, where, index, starts)
        # A maximum keeps NaN, so one look at the whole chunk tells whether any was there.
        if np.isnan(out.max()):
            _reduce_with_nan(images, out, where, index, starts)

    for_chunks(work, all_x)
    return saving(best, places=places, view=view)


def _padded(images: Array, view: Windows) -> Array:
    if not any(view.padding):
        return images
    (ph, pw), (h, w) = view.padding, view.size
    rows = scratch("padded", (len(images), *view.padded, images.shape[3]), images.dtype)
    rows.fill(-np.inf)
    rows[:, ph : ph + h, pw : pw + w] = images
    return rows


def _start(images: Array, out: Array, where: Array, index: Any, starts: Array | None) -> None:
    """Choose the first entry of every window, or the first that is not padding."""
    if starts is None:
        np.copyto(out, images[index[0][1]])
        where.fill(0)
    else:
        out.fill(-np.inf)
        np.copyto(where, starts)


def _reduce(images: Array, out: Array, where: Array, index: Any, starts: Array | None) -> None:
    """Fill `out` with the largest entries and `where` with their places; no NaN may be there."""
    entry = scratch("entry", out.shape, out.dtype)
    wins = scratch("wins", out.shape, np.bool_)
    won = wins.view(np.uint8)
    _start(images, out, where, index, starts)
    for place, entries in index if starts is not None else index[1:]:
        np.copyto(entry, images[entries])
        np.greater(entry, out, out=wins)
        np.maximum(out, entry, out=out)
        # Places only grow, so the last that won is the largest.
        np.multiply(won, place, out=won)
        np.maximum(where, won, out=where)


def _reduce_with_nan(
    images: Array, out: Array, where: Array, index: Any, starts: Array | None
) -> None:
    """Do the same where NaN may be there: the first NaN of a window wins."""
    _start(images, out, where, index, starts)
    for place, entries in index:
        values = images[entries]
        wins = (values > out) | (np.isnan(values) & ~np.isnan(out))
        np.copyto(out, values, where=wins)
        np.copyto(where, place, where=wins)
