"""How a tensor is handed to the compiled loops of `channel_loops`: flat, in shares, one a thread.

In memory's order a tensor is (N, C, S), the channels' sizes multiplied to C. Runs of S shorter than
`SHORTEST_RUN` leave an inner loop too little to do. Then the entries of whole samples, as many as
make a row of `SHORTEST_ROW` or more, are taken for channels of their own, and what is known of each
channel is spread over the entries of the row; S is 1 to the loops. The last samples may not fill a
row: a part of one ends the last share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory, threads
from tinygrad_bn.kernels.cpu.halves import work_dtype
from tinygrad_bn.kernels.cpu.stored import stored
from tinygrad_bn.kernels.layout import inverse, memory_order

Array = Any
Axes = tuple[int, ...]

# Below this many entries NumPy needs no longer than the calls do.
SMALLEST = 1 << 12
# A thread's share is worth waking it up for.
SMALLEST_SHARE = 1 << 14
# Short rows, so that the numbers beside them stay in the first cache.
SHORTEST_RUN, SHORTEST_ROW = 128, 128
# What compiled loops take at once of float32; the rest of a row goes one by one.
VECTOR = 32
# A row of more entries than this pushes the numbers beside it out of the cache.
LONGEST_ROW = 1 << 15
# Rows of vectors a multiple of 4 KiB apart would compete for the same few places in the cache.
PADDING = 80
# Bytes in a line of the cache.
LINE = 64


class Channels:
    """How to hand over tensors of one shape, channel axes and order in memory.

    groups: into how many tensors axis 0 is split, each with statistics of its own.
    may_spread: whether whole samples may be taken for rows.
    """

    def __init__(
        self, shape: Axes, axis: Axes, order: Axes, groups: int = 1, may_spread: bool = True
    ):
        sizes = [shape[i] for i in order]
        first = order.index(axis[0])
        self.order = order
        self.inverse = inverse(order)
        self.sizes = tuple(sizes)
        self.groups = groups
        self.channels = math.prod(sizes[first : first + len(axis)])
        self.run = math.prod(sizes[first + len(axis) :])
        samples = math.prod(sizes[:first]) // groups
        self.count = samples * self.run
        kept = tuple(size if i in axis else 1 for i, size in enumerate(shape))
        self.kept_shape = kept if groups == 1 else (groups, *kept)
        period = self.channels * self.run
        self.spreads = may_spread and self.run < SHORTEST_RUN and period <= LONGEST_ROW
        self.repeats = min(samples, _repeats(period)) if self.spreads else 1
        self.row = self.repeats * period
        self.size = samples * period
        # What the loops are told for C and S, and how a row of theirs comes from the channels.
        self.columns, self.inner = (self.row, 1) if self.spreads else (self.channels, self.run)
        self.spreading = (self.run, self.repeats) if self.spreads else (1, 1)

    def lay(self, x: Array) -> Array:
        """Return x as (groups, entries in memory's order), copied only if it is not dense.

        Half precision as the loops take it: `stored`.
        """
        return stored(np.ascontiguousarray(x.transpose(self.order)).reshape(self.groups, -1))

    def empty(self, dtype: Any) -> Array:
        """Return a new array, in memory's order."""
        return memory.empty(self.sizes, dtype)

    def laid(self, made: Array) -> Array:
        """Return what `empty` gave as `lay` gives it: a view, to write to."""
        return stored(made.reshape(self.groups, -1))

    def back(self, made: Array) -> Array:
        """Return what `empty` gave with its axes as they were."""
        # Not even a view of it where the order is x's own: what is handed out owns its memory.
        return made if self.inverse == tuple(range(made.ndim)) else made.transpose(self.inverse)

    def rows(self, count: int, dtype: Any = np.float64) -> Array:
        """Return zeros, (count, entries): rows as the loops want them, of vectors or sums."""
        return _zeros((count, self.columns), dtype)

    def parts(self) -> list[slice]:
        """Return the shares of a laid group: whole rows, but for the end of the last.

        They depend on the number of threads alone, and so does the order of every sum.
        """
        rows = self.size // self.row
        count = max(1, min(threads.num_threads(), rows, self.size // SMALLEST_SHARE))
        cuts = [rows * i // count * self.row for i in range(count)]
        return [slice(a, b) for a, b in pairwise([*cuts, self.size])]

    def share_out(self, work: Callable[[slice], Any]) -> None:
        """Run `work(part)` for each share."""
        parts = self.parts()
        threads.parallel(lambda i: work(parts[i]), len(parts))

    def sums(self, add: Callable[[slice, Array], Any], rows: int = 2) -> Array:
        """Return what `add(part, sums)` adds to `rows` rows of zeros, for each share:
        (shares, rows, entries)."""
        parts = self.parts()
        sums = _zeros((len(parts), rows, self.columns), np.float64)
        threads.parallel(lambda i: add(parts[i], sums[i]), len(parts))
        return sums


def channels_of(x: Array, axis: Axes, groups: int = 1, may_spread: bool = True) -> Channels | None:
    """Return how x is handed over, or None if it is too small, or of a dtype not served."""
    if x.size < SMALLEST * groups or work_dtype(x.dtype) is None:
        return None
    if not (x.dtype.isnative and x.flags.aligned):
        return None
    order = memory_order(x, axis) or _order_of_a_copy(x.ndim, axis)
    if groups > 1 and order[0] != 0:
        return None
    return Channels(x.shape, axis, order, groups, may_spread)


def _order_of_a_copy(ndim: int, axis: Axes) -> Axes:
    """Return the order for a tensor that must be copied: its own, if the channels are together."""
    if axis == tuple(range(axis[0], axis[0] + len(axis))):
        return tuple(range(ndim))
    return (*(i for i in range(ndim) if i not in axis), *axis)


def _repeats(period: int) -> int:
    """Return how many samples of `period` entries make a row.

    It takes `fewest` for `SHORTEST_ROW` entries. Of these, and rows of less than twice as many, the
    one with the smallest part beyond whole vectors.
    """
    fewest = -(-SHORTEST_ROW // period)
    return min(range(fewest, 2 * fewest), key=lambda n: n * period % VECTOR / (n * period))


def _zeros(shape: Axes, dtype: Any) -> Array:
    """Return zeros in rows of at least so many entries, each at the start of a line of the cache.

    A vector that lies in two lines takes two loads.
    """
    *rows, columns = shape
    dtype = np.dtype(dtype)
    width = -(-(columns + PADDING) * dtype.itemsize // LINE) * LINE
    block = np.zeros(math.prod(rows) * width + LINE, np.uint8)
    start = -block.__array_interface__["data"][0] % LINE
    return np.ndarray((*rows, width // dtype.itemsize), dtype, block, start)
