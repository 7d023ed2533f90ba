"""Large arrays in memory that earlier ones have left.

A fresh large array costs a page fault for every 4 KiB it touches, which can take as long as what
is then computed in it. So arrays from `empty` lie in blocks that come back when nothing refers to
them any more: neither the array, nor a view of it, nor what else shares its memory. Whoever holds
one keeps it, and nothing that is held is ever written over.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from operator import index
from typing import Any

import numpy as np

from tinygrad_bn.backend import LentMemory

# Smaller arrays are left to malloc, which keeps memory of their size at hand by itself.
SMALLEST = 128 * 2**10
# What waits for its next use at most, in bytes. Beyond it, the sizes that were not wanted for
# longest go back to the system: those of another batch size, of a model that is gone.
LIMIT = 256 * 2**20

# Never waited for: a collection of garbage may bring blocks back, or ask for one, in the midst of
# what the lock guards, and in the thread that holds it.
_lock = threading.Lock()
_left: deque[np.ndarray] = deque()  # came back, and not in `_waiting` yet
_waiting: dict[int, list[np.ndarray]] = {}  # by size; the one last used is the last
_waiting_bytes = 0


class _Block(LentMemory):
    """The owner of one block of memory while an array, and views of it, lie in it."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], dtype: np.dtype):
        self.memory = memory
        place = memory.__array_interface__["data"]
        self.__array_interface__ = {
            "version": 3, "data": place, "shape": shape, "typestr": dtype.str
        }  # fmt: skip

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not finalizing():  # else the names of this module may be gone; nothing need be kept
            _put(self.memory)


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array, in memory that was used before where there is any.

    >>> x = empty((512, 512), "f4")
    >>> where = x.ctypes.data
    >>> part = x[1:]
    >>> del x
    >>> empty((512, 512), "f4").ctypes.data == where
    False
    >>> del part
    >>> empty((512, 512), "f4").ctypes.data == where
    True
    """
    dtype = np.dtype(dtype)
    shape = tuple(map(index, shape))  # NumPy's own integers would overflow
    wanted = math.prod(shape) * dtype.itemsize
    # A dtype of ml_dtypes has a name of NumPy's that stands for plain bytes.
    if wanted < SMALLEST or np.dtype(dtype.str) != dtype:
        return np.empty(shape, dtype)
    return np.asarray(_Block(_take(_rounded(wanted)), shape, dtype))


def _put(memory: np.ndarray) -> None:
    """Let `memory` wait for its next use."""
    if memory.size > LIMIT:
        return
    _left.append(memory)
    while _left and _lock.acquire(blocking=False):
        try:
            _sort()
        finally:
            _lock.release()


def _take(size: int) -> np.ndarray:
    """Return memory of `size` bytes: what waits, or else fresh."""
    if _lock.acquire(blocking=False):
        try:
            _sort()
            if size in _waiting:
                return _drop(size)
        finally:
            _lock.release()
    return np.empty(size, np.uint8)


def _sort() -> None:
    """Move what has come back to `_waiting`, and let go of what is beyond the limit."""
    global _waiting_bytes
    while _left:
        memory = _left.popleft()
        blocks = _waiting.pop(memory.size, [])
        blocks.append(memory)
        _waiting[memory.size] = blocks
        _waiting_bytes += memory.size
        while _waiting_bytes > LIMIT:
            _drop(next(iter(_waiting)))


def _drop(size: int) -> np.ndarray:
    """Return a block of `size` bytes that waits no longer."""
    global _waiting_bytes
    blocks = _waiting[size]
    memory = blocks.pop()
    if not blocks:
        del _waiting[size]
    _waiting_bytes -= size
    return memory


def _forget() -> None:
    """Begin anew in a forked child: it has but one thread, and another may have been halfway."""
    global _lock, _waiting_bytes
    _lock = threading.Lock()
    _left.clear()
    _waiting.clear()
    _waiting_bytes = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _rounded(size: int) -> int:
    """Return the size of block for `size` bytes: at most an eighth larger, so that few sizes
    serve all."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step
