"""What the compiled updates of optimizers share: which parameters they serve, and in what pieces.

An update in NumPy is several passes over a parameter, its gradient and its state; compiled it is
one. Every operation is rounded by itself and in NumPy's order, so the bits are NumPy's, and it does
not matter which parameters are served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.kernels.cpu.compiled import Compiled, usable

Array = Any

# A parameter of as many entries is worth loading the compiled update for. Then it serves all.
SMALLEST = 1 << 12
# Entries that a thread takes at a time; below two such pieces, waking one up does not pay.
PIECE = 1 << 15

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def serves(loop: Compiled, p: Array, others: Sequence[Array]) -> bool:
    """Return whether `loop` updates a parameter `p`, given its gradient and its state."""
    if p.dtype not in _DTYPES or not p.flags.carray:
        return False
    g = others[0]
    # One pass would read what it has just written. (Two arrays that own their memory share none.)
    views = p.base is not None or g.base is not None
    if p is g or (views and np.may_share_memory(p, g)):
        return False
    for array in others:
        if array.dtype != p.dtype or not (array.flags.c_contiguous and array.flags.aligned):
            return False
    return loop.made(p.dtype) or (p.size >= SMALLEST and usable())


def in_pieces(update: Callable[..., None], arrays: Sequence[Array]) -> None:
    """Call `update` with all of the arrays, flat: in pieces, on several threads, if they are long.

    One parameter is done before the next begins: should two of them share memory, the second finds
    what the first has left, as in NumPy.
    """
    flat = [array.reshape(-1) for array in arrays]
    size = len(flat[0])
    count = size // PIECE
    if count < 2:
        update(*flat)
        return

    def run(i: int) -> None:
        part = slice(size * i // count, size * (i + 1) // count)
        update(*(array[part] for array in flat))

    threads.parallel(run, count)
