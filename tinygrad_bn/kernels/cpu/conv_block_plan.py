"""The order in which a convolution block keeps pixels, and the sizes of one block.

All upper left entries of the pool's windows come first, then all upper right ones, and so on; last
the pixels that no window covers:

    entry 0 of all windows | entry 1 of all windows | ... | the rest

each pixel with its channels side by side. A pool is then the maximum of a few contiguous stretches
of memory, its backward a choice between them, and every loop is long, whatever the layout of the
images, the number of channels and the size of the windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn.windows import Pair, Windows, pool_windows

Array = np.ndarray

# A chunk's windows and their products stay in cache. (Twice a core's L2 measured best: threads wait
# for each other in the Python between chunks, which costs more than going to L3.)
CHUNK_BYTES = 2 * 2**20
# Of a larger image, a chunk would not stay there.
LARGEST_IMAGE = CHUNK_BYTES
# With fewer entries than this the Python around a chunk costs more than it saves.
SMALLEST = 1 << 14
# Runs of a window that are shorter than this cost more to find than to copy.
SHORTEST_RUN = 8
# Entries that vectors of one value per channel are repeated to, so that loops are long.
WIDTH = 1024


class Field(NamedTuple):
    """A rectangle of output pixels that is kept together, in row order.

    start: number of its first pixel. rows, columns: its size. origin: where in a (flat, padded)
    image the window of its first pixel begins. row_step, column_step: from there to the next's.
    """

    start: int
    rows: int
    columns: int
    origin: int
    row_step: int
    column_step: int


class Plan:
    """The sizes of one block, and where its pixels stand.

    view: the convolution's windows. entries: how many pixels a pool's window covers (1 without
    pool). pooled: rows and columns of the result. pixels, plane: how many pixels the convolution
    has for an image; how many numbers the result has.
    by_entry: whether windows are so short that each of their entries is laid out for all pixels,
        not all entries for each pixel.
    geometry: the fields as an array, and (taps, run): a window is, in a flat image, `run` numbers
        at each distance in taps.
    """

    def __init__(self, view: Windows, pool: Windows | None, outputs: int, itemsize: int):
        self.view, self.outputs = view, outputs
        kernel, self.pooled = ((1, 1), view.out) if pool is None else (pool.kernel, pool.out)
        self.entries = kernel[0] * kernel[1]
        self.pixels = view.out[0] * view.out[1]
        self.plane = self.pooled[0] * self.pooled[1] * outputs
        self.image = view.padded[0] * view.padded[1] * view.channels
        row, (kh, kw), (dh, dw) = view.padded[1] * view.channels, view.kernel, view.dilation
        together = dw == 1
        run = view.channels * (kw if together else 1)
        taps = [
            i * dh * row + j * dw * view.channels
            for i in range(kh)
            for j in range(1 if together else kw)
        ]
        fields = np.array(list(_fields(view, kernel, self.pooled)), np.int64)
        self.geometry = (fields, np.array(taps, np.int64), run)
        self.window = len(taps) * run
        self.by_entry = run < SHORTEST_RUN
        self.image_bytes = self.pixels * (self.window + outputs) * itemsize
        # A divisor of the pixels, so that an image is a whole number of such rows.
        group = max(1, WIDTH // outputs)
        self.width = outputs * next(g for g in range(group, 0, -1) if self.pixels % g == 0)

    def spread(self, vector: Array, dtype: Any) -> Array:
        """Return a value per channel repeated to the width of a row."""
        return np.tile(vector.astype(dtype), self.width // self.outputs)

    def folded(self, sums: Array) -> Array:
        """Return sums (2, width) as float64 sums of channels, (2, outputs)."""
        return sums.reshape(2, -1, self.outputs).sum(axis=1, dtype=np.float64)


def _fields(view: Windows, kernel: tuple[int, int], pooled: tuple[int, int]) -> Iterator[Field]:
    """Yield the fields: one for each entry of the pool's windows, then what these leave."""
    row, column = view.padded[1] * view.channels * view.stride[0], view.channels * view.stride[1]
    (kh, kw), (h, w), start = kernel, pooled, 0
    rectangles = [(i, j, h, w, kh, kw) for i in range(kh) for j in range(kw)]
    # To the right of the windows, and below them.
    rectangles.append((0, w * kw, h * kh, view.out[1] - w * kw, 1, 1))
    rectangles.append((h * kh, 0, view.out[0] - h * kh, view.out[1], 1, 1))
    for top, left, rows, columns, down, across in rectangles:
        if rows and columns:
            yield Field(
                start, rows, columns, top * row + left * column, down * row, across * column
            )
            start += rows * columns


def plan_for(view: Windows, pool: Pair | None, outputs: int, itemsize: int) -> Plan | None:
    """Return the plan of a block, or None for one that is left to the ops by themselves."""
    values = view.batch * view.out[0] * view.out[1]  # of a channel
    if values < 2 or not outputs or values * outputs < SMALLEST:
        return None
    view = view._replace(batch=1)
    try:
        image = (1, *view.out, outputs)
        windows = None if pool is None else pool_windows("max_pool2d", image, pool, layout="NHWC")
    except ValueError:  # of a pool that does not fit, as the pool by itself will say
        return None
    plan = _plan(view, windows, outputs, itemsize)
    return None if plan.entries > 254 or plan.image_bytes > LARGEST_IMAGE else plan


_plan = lru_cache(maxsize=256)(Plan)
