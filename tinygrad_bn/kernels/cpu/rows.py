"""Walking over a tensor by rows that are normalized each by itself, several rows in cache at once.

A row is what shares a mean: D entries that lie together. γ goes with a row's entries, and where a
sample has several rows (its channels, in groups) with the row's place among these G: γ is spread to
a (G, D) matrix, and the tensor is (N, G, D).

    layer norm of (N, T, D): G = 1        group norm of (N, G, C / G · S): γ is repeated S times
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.kernels.cpu.halves import work_dtype

Array = np.ndarray
Axes = tuple[int, ...]

# Entries in a block, as in `channel_blocks`.
BLOCK = 1 << 18
# Below this many entries the Python around each block costs more than the blocks save.
SMALLEST = 4096
# Terms that are added up in float32 before float64 takes over.
PIECE = 4096
# Samples shorter than this are taken several at a time where they are added up.
WIDE = 1024


class Block(NamedTuple):
    """Rows [top, bottom), whose places within a sample are [first, last)."""

    top: int
    bottom: int
    first: int
    last: int


class Rows:
    """How to walk over tensors of one shape, dtype and choice of axes."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, axis: Axes, channels: Axes):
        kept, first, last = len(axis), channels[0], channels[-1] + 1
        self.dtype = dtype
        self.count = math.prod(shape[:kept])
        self.length = math.prod(shape[kept:])  # D
        self.places = math.prod(shape[first:kept])  # G
        self.kept_shape = tuple(shape[:kept]) + (1,) * (len(shape) - kept)
        # γ of (G, J) is one value for each of these many entries, and that again so many times.
        self.repeats = math.prod(shape[max(last, kept) :])
        self.tiles = math.prod(shape[kept:first])
        self.entries = math.prod(shape[max(first, kept) : max(last, kept)])  # J

    def blocks(self) -> list[Block]:
        """Return all rows in blocks: of whole samples, or within one."""
        rows = max(1, BLOCK // self.length)
        if rows >= self.places:
            step = rows // self.places * self.places
            tops = range(0, self.count, step)
            return [Block(top, min(top + step, self.count), 0, self.places) for top in tops]
        return [
            Block(sample + first, sample + last, first, last)
            for sample in range(0, self.count, self.places)
            for first in range(0, self.places, rows)
            for last in (min(first + rows, self.places),)
        ]

    def share_out(self, work: Callable[[list[Block]], Any]) -> list[Any]:
        """Return `work(blocks)` for each thread's share of the blocks, in order."""
        blocks = self.blocks()
        shares = min(threads.num_threads(), len(blocks))
        results: list[Any] = [None] * shares

        def run(i: int) -> None:
            results[i] = work(blocks[len(blocks) * i // shares : len(blocks) * (i + 1) // shares])

        threads.parallel(run, shares)
        return results

    def matrix(self, x: Array) -> Array:
        """Return x as one row after another: a view."""
        return x.reshape(self.count, self.length)

    def spread(self, vector: Array | None) -> Array | None:
        """Return γ or β as a (G, D) matrix in the dtype of the work."""
        if vector is None:
            return None
        values = vector.reshape(self.places, self.entries).astype(self.dtype)
        return np.tile(np.repeat(values, self.repeats, axis=1), (1, self.tiles))

    def fold(self, total: Array) -> Array:
        """Return sums for each entry of the (G, D) matrix as sums for each γ, flat."""
        split = total.reshape(self.places, self.tiles, self.entries, self.repeats)
        return split.sum(axis=(1, 3)).ravel()

    def add_columns(self, total: Array, rows: Array, block: Block) -> None:
        """Add the rows of a block to `total`, a (G, D) matrix in float64, place by place.

        Samples of a few entries are many, too many to be added up one by one in float32: some lie
        side by side in a row that is added up, and float64 adds these.
        """
        width = (block.last - block.first) * self.length
        samples = rows.reshape(-1, width)
        beside = max(1, min(len(samples), WIDE // width))
        whole = len(samples) // beside * beside
        long = samples[:whole].reshape(-1, beside * width)
        sums = long[0] if len(long) == 1 else np.ones(len(long), rows.dtype) @ long
        target = total[block.first : block.last]
        target += sums.reshape(beside, *target.shape).sum(axis=0, dtype=np.float64)
        if whole < len(samples):
            target += samples[whole:].sum(axis=0, dtype=np.float64).reshape(target.shape)


def rows_of(x: Array, axis: Axes, channels: Axes) -> Rows | None:
    """Return how to walk over x, or None for what is left to the generic form."""
    dtype = work_dtype(x.dtype)
    leading = axis == tuple(range(len(axis)))
    # γ goes with a row's place and its entries: not with what stands before its sample.
    together = channels[-1] + 1 >= len(axis)
    if dtype is None or x.size < SMALLEST or not (leading and together):
        return None
    return Rows(x.shape, dtype, axis, channels) if x.flags.c_contiguous else None


def along(matrix: Array, block: Block) -> Array:
    """Return what `matrix`, (G, D), has for the rows of a block, to broadcast over its samples."""
    return matrix[block.first : block.last]


def dots(a: Array, b: Array | None = None) -> Array:
    """Return Σ a b, or Σ a, of each row in float64, from sums of short pieces."""
    total = np.zeros(len(a))
    for left in range(0, a.shape[1], PIECE):
        piece = a[:, left : left + PIECE]
        if b is None:
            total += piece @ np.ones(piece.shape[1], a.dtype)
        else:
            total += np.einsum("rd,rd->r", piece, b[:, left : left + PIECE])
    return total
