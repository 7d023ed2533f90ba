"""Batches that are on their way to a GPU while it computes with the one before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_bn.backend import backend_for, device_index

#: While one batch is read from its pinned memory by the GPU, the next is gathered in the other's.
BUFFERS = 2


class Ahead:
    """Gathers rows of arrays in pinned memory and copies them to a GPU in the background.

    arrays: NumPy arrays of equal length. rows: the most that are sent at once.

    A copy to a GPU is done beside its computing only from memory that the operating system cannot
    move: pinned. That memory is not written to again before the copy has left it.
    """

    def __init__(self, arrays: Sequence[np.ndarray], rows: int, device: str):
        accelerator: Any = backend_for(device).accelerator
        self._sender = accelerator.sender(device_index(device))
        self._arrays = arrays
        self._pinned = [
            [self._sender.pinned((rows, *array.shape[1:]), array.dtype) for array in arrays]
            for _ in range(BUFFERS)
        ]
        self._sent: list[list[Any]] = [[] for _ in range(BUFFERS)]
        self._turn = 0
        self._sending = threading.Lock()  # iterators in several threads take turns

    def send(self, rows: np.ndarray | slice, count: int) -> list[Any]:
        """Return copies under way of `count` rows: a permutation's, or a slice."""
        with self._sending:
            turn = self._turn
            self._turn = (turn + 1) % BUFFERS
            for copy in self._sent[turn]:
                copy.wait()
            self._sent[turn] = []
            for array, pinned in zip(self._arrays, self._pinned[turn], strict=True):
                host = pinned[:count]
                if isinstance(rows, slice):
                    host[...] = array[rows]
                else:
                    # "raise" would buffer `out`.
                    np.take(array, rows, axis=0, out=host, mode="clip")
                self._sent[turn].append(self._sender.send(host))
            return self._sent[turn]
