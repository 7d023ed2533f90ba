"""Matrix products in NumPy, their rows shared out among our own threads.

OpenBLAS would use threads of its own. After a product these go on spinning for milliseconds, in
wait for the next, on the very processors that other kernels need by then: a training step took
half as long again. So a product that OpenBLAS would split is split here, one thread to each part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory, threads

Array = np.ndarray

# OpenBLAS keeps products of fewer multiplications than this to one thread by itself.
SMALLEST = 1 << 17


def forward(x: Array, y: Array) -> Any:
    """Return x @ y for matrices of one floating dtype, or NotImplemented."""
    if x.ndim != 2 or y.ndim != 2 or x.dtype != y.dtype or x.shape[1] != y.shape[0]:
        return NotImplemented
    rows, columns = x.shape[0], y.shape[1]
    if x.dtype not in (np.float32, np.float64) or rows * columns * x.shape[1] < SMALLEST:
        return NotImplemented
    out = memory.empty((rows, columns), x.dtype)
    shares = threads.num_threads()

    def work(i: int) -> None:
        part = slice(rows * i // shares, rows * (i + 1) // shares)
        np.matmul(x[part], y, out=out[part])

    threads.parallel(work, shares)
    return out
