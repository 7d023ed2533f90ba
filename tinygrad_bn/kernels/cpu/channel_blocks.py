"""Walking over a tensor in cache-sized blocks when every channel has a number of its own.

NumPy is fast on long rows. So the tensor is seen as a matrix whose rows are a whole number of
*periods*: a period is one sample's channels, C · S entries, in which channel c holds S in a row
(S = 1 for channels-last). A value per channel is *spread* to one per column, every operation is
matrix-with-row, and the sum over rows is a matrix product with ones.

    NCHW: (N, C · H · W)                NHWC: (N · H · W / G, G · C), G periods to a row

Periods that do not fill a row form a second matrix of one row, the tail. Rows wider than a block
are cut into column ranges. Groups, parts of axis 0 with statistics of their own, are walked over
one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn.kernels.cpu import memory, threads
from tinygrad_bn.kernels.layout import dense_order as dense_order
from tinygrad_bn.kernels.layout import memory_order as memory_order

Array = np.ndarray
Axes = tuple[int, ...]

# Entries in a block, 1 MiB of float32. A quarter of it would stay in L2, but what Python does
# between two passes, and the threads' waiting for its lock, cost more than reading from L3.
BLOCK = 1 << 18
# Rows shorter than the first number leave NumPy's inner loops too little to do; wider than the
# second, they leave too few rows in a block to make up for the spreading. (Rows of several periods
# are never cut: they are shorter than twice the first.)
SHORTEST_ROW, WIDEST = 1024, 1 << 14


class Task(NamedTuple):
    """One block: rows [top, bottom) and columns [left, right) of the main matrix or the tail."""

    tail: bool
    left: int
    right: int
    top: int
    bottom: int


class Blocks:
    """How to walk over tensors of one shape, dtype, choice of channel axes and order in memory.

    dtype: of the work. groups: into how many parts the outermost axis in memory is split.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        axis: Axes,
        order: tuple[int, ...],
        groups: int = 1,
    ):
        sizes = [shape[i] for i in order]
        first = order.index(axis[0])
        self.order = order
        self.inverse = tuple(int(i) for i in np.argsort(order))
        self.sizes = tuple(sizes)
        self.dtype = dtype
        self.groups = groups
        self.channels = math.prod(sizes[first : first + len(axis)])
        self.run = math.prod(sizes[first + len(axis) :])  # S
        self.period = self.channels * self.run
        periods = math.prod(sizes[:first]) // groups
        self.m = periods * self.run
        group = min(periods, -(-SHORTEST_ROW // self.period))
        self.rows, self.width = periods // group, group * self.period
        self.tail = (periods % group) * self.period
        kept = tuple(size if i in axis else 1 for i, size in enumerate(shape))
        self.kept_shape = kept if groups == 1 else (groups, *kept)

    def tasks(self) -> list[Task]:
        """Return all blocks, those with the same columns one after another."""
        tasks = []
        for left in range(0, self.width, WIDEST):
            right = min(left + WIDEST, self.width)
            step = max(1, BLOCK // (right - left))
            for top in range(0, self.rows, step):
                tasks.append(Task(False, left, right, top, min(top + step, self.rows)))
        if self.tail:
            tasks.append(Task(True, 0, self.tail, 0, 1))
        return tasks

    def share_out(self, work: Callable[[list[Task]], Any]) -> list[Any]:
        """Return `work(tasks)` for each thread's share of the tasks, in the order of the tasks.

        The shares depend on the number of threads alone, and so does the order of every sum.
        """
        tasks = self.tasks()
        shares = min(threads.num_threads(), len(tasks))
        results: list[Any] = [None] * shares

        def run(i: int) -> None:
            results[i] = work(tasks[len(tasks) * i // shares : len(tasks) * (i + 1) // shares])

        threads.parallel(run, shares)
        return results

    def lay(self, x: Array) -> Array:
        """Return x with the axes in memory's order, contiguous (copied only if it is not)."""
        return np.ascontiguousarray(x.transpose(self.order))

    def empty(self, dtype: np.dtype) -> Array:
        """Return an uninitialised array as `lay` would give it."""
        return memory.empty(tuple(self.sizes), dtype)

    def parts(self, laid: Array) -> Sequence[Array]:
        """Return what lies in each group of what `lay` gave: views."""
        return list(laid.reshape(self.groups, -1))

    def back(self, laid: Array) -> Array:
        """Return what `lay` gave, or an array like it, with its axes as they were."""
        # Not even a view of it where the order is x's own: what is handed out owns its memory.
        return laid if self.inverse == tuple(range(laid.ndim)) else laid.transpose(self.inverse)

    def walk(
        self, tasks: Sequence[Task], laid: Sequence[Array], vectors: Sequence[Array]
    ) -> Iterator[tuple[Task, list[Array], list[Array]]]:
        """Yield each task with its block of every array and its spread of every vector."""
        flat = [x.reshape(-1) for x in laid]
        cut = self.rows * self.width
        main = [x[:cut].reshape(self.rows, self.width) for x in flat]
        tail = [x[cut:].reshape(1, -1) for x in flat]
        columns, spread = None, []
        for task in tasks:
            if columns != (task.tail, task.left):
                columns = (task.tail, task.left)
                spread = [self.spread(v, task.left, task.right) for v in vectors]
            matrices = tail if task.tail else main
            blocks = [x[task.top : task.bottom, task.left : task.right] for x in matrices]
            yield task, blocks, spread

    def spread(self, vector: Array, left: int, right: int) -> Array:
        """Return a value per channel as a value per column, for columns [left, right)."""
        if left == 0 and right % self.period == 0:
            return np.tile(np.repeat(vector, self.run), right // self.period)
        first, starts = self._channels_of(left, right)
        lengths = np.diff(starts, append=right - left)
        return np.repeat(vector[first : first + len(starts)], lengths)

    def fold(self, total: Array, sums: Array, left: int, right: int) -> None:
        """Add a sum per column, for columns [left, right), to `total`, a sum per channel."""
        if left == 0 and right % self.period == 0:
            total += sums.reshape(-1, self.channels, self.run).sum(axis=(0, 2), dtype=np.float64)
            return
        first, starts = self._channels_of(left, right)
        total[first : first + len(starts)] += np.add.reduceat(sums.astype(np.float64), starts)

    def _channels_of(self, left: int, right: int) -> tuple[int, Array]:
        # Only rows of a single period are cut, so a column's channel is column // run.
        first, last = left // self.run, (right - 1) // self.run
        starts = np.arange(first, last + 1) * self.run - left
        starts[0] = 0
        return first, starts
