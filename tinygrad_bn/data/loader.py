"""Mini-batches: rows of one array, or matching rows of several, reshuffled for each epoch."""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from tinygrad_bn.backend import backend_for, generator, to_numpy
from tinygrad_bn.data.ahead import Ahead
from tinygrad_bn.tensor import Tensor

#: Held while an epoch is counted. Of the module: a loader with a lock could not be copied.
_counting = threading.Lock()


def _renew() -> None:
    """Take a lock of its own in a forked child: another thread may have held that one."""
    global _counting
    _counting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)

Batch = Any  # a Tensor for a single array, a tuple of Tensors for a tuple or list of arrays


class DataLoader:
    """Iterates over mini-batches: `Tensor(s)` of `batch_size` rows, with dtypes as they are.

    arrays: one array (N, ...), or a tuple or list of arrays with the same N; Tensors will do.
        One array gives single batches, a tuple or list gives tuples. Batches own their memory.
    batch_size: rows a batch; the last one has what is left, or is left out with `drop_last`.
    shuffle: visit the rows of each epoch in a random order of its own, without repetition.
    seed: an integer >= 0 that determines all orders. None draws one from the library's generator,
        which `manual_seed` controls. It can be read as `.seed`.
    device: where batches are put; None and "cpu" leave them in host memory. On a GPU, the next
        batch is gathered and copied, from pinned memory, while the GPU works on the present one.

    `.epoch` counts the epochs begun. Set it to go back, or to resume: the order of an epoch depends
    on `seed` and its number alone.

    Raises ValueError for no rows, unequal lengths, batch_size < 1, or where `drop_last` leaves no
    batch.

    >>> loader = DataLoader((np.arange(10), np.arange(10) % 2), 4, shuffle=True, seed=0)
    >>> len(loader)
    3
    >>> [(x.shape, y.shape) for x, y in loader]
    [((4,), (4,)), ((4,), (4,)), ((2,), (2,))]
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int | None = None,
        device: str | None = None,
    ) -> None:
        self._single = not isinstance(arrays, (tuple, list))
        self._arrays = _as_rows([arrays] if self._single else arrays)
        self._rows = len(self._arrays[0])
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.shuffle = shuffle
        self.drop_last = drop_last
        if drop_last and self.batch_size > self._rows:
            raise ValueError(
                f"DataLoader: drop_last=True leaves no batch of {self.batch_size} in {self._rows} "
                "rows; expected at least one. Use a smaller batch_size."
            )
        if seed is None and shuffle:
            seed = int(generator().integers(1 << 63))
        self.seed = None if seed is None else _at_least("seed", seed, 0)
        self.epoch = 0
        self.device = device
        on_gpu = device is not None and backend_for(device).accelerator is not None
        most = min(self.batch_size, self._rows)
        self._ahead = Ahead(self._arrays, most, cast(str, device)) if on_gpu else None

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        whole, rest = divmod(self._rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        """Begin the next epoch. The order is drawn now, so that iterators may run side by side, in
        several threads too: each has an epoch of its own."""
        with _counting:
            epoch = self.epoch
            self.epoch = epoch + 1
        order = self._order(epoch)
        if self._ahead is not None:
            return self._batches_ahead(self._ahead, order)
        return (self._batch(order, i * self.batch_size) for i in range(len(self)))

    def steps(self, count: int | None = None) -> Iterator[Batch]:
        """Yield `count` batches, going from epoch to epoch; without end if `count` is None.

        Each call begins a new epoch. Raises ValueError where count < 0.

        >>> loader = DataLoader(np.arange(6), 4)
        >>> [batch.shape for batch in loader.steps(5)]
        [(4,), (2,), (4,), (2,), (4,)]
        """
        left = None if count is None else _at_least("steps: count", count, 0)
        return self._steps(left)

    def _steps(self, left: int | None) -> Iterator[Batch]:
        while left is None or left > 0:
            for batch in self:
                yield batch
                if left is not None:
                    left -= 1
                    if left == 0:
                        return

    def _order(self, epoch: int) -> np.ndarray | None:
        """The rows in the order of `epoch`: a permutation, or None for the order they stand in."""
        if not self.shuffle:
            return None
        source = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        return np.random.default_rng(source).permutation(self._rows)

    def _batch(self, order: np.ndarray | None, start: int) -> Batch:
        """The batch that begins at `start`. Copied: writing into it must not reach the data set."""
        stop = start + self.batch_size
        if order is None:
            batch = [Tensor(array[start:stop].copy()) for array in self._arrays]
        else:
            batch = [Tensor(array[order[start:stop]]) for array in self._arrays]
        return batch[0] if self._single else tuple(batch)

    def _batches_ahead(self, ahead: Ahead, order: np.ndarray | None) -> Iterator[Batch]:
        """Yield the batches of an epoch on a GPU, each after the next has been sent off."""
        copies = self._send(ahead, order, 0)
        for i in range(len(self)):
            following = self._send(ahead, order, i + 1) if i + 1 < len(self) else []
            batch = [Tensor(copy.array()) for copy in copies]
            copies = following
            yield batch[0] if self._single else tuple(batch)

    def _send(self, ahead: Ahead, order: np.ndarray | None, i: int) -> list[Any]:
        start = i * self.batch_size
        stop = min(start + self.batch_size, self._rows)
        return ahead.send(slice(start, stop) if order is None else order[start:stop], stop - start)


def _as_rows(arrays: Sequence[Any]) -> list[np.ndarray]:
    """Return the arrays in NumPy; raise ValueError unless they have rows, the same number."""
    rows = [np.asarray(a.numpy() if isinstance(a, Tensor) else to_numpy(a)) for a in arrays]
    shapes = ", ".join(str(array.shape) for array in rows) or "no array"
    if not rows or any(array.ndim == 0 or len(array) == 0 for array in rows):
        raise ValueError(
            f"DataLoader: got {shapes}; expected arrays of one or more rows, of rank 1 at least. "
            "Pass a single array, or a tuple such as (images, labels)."
        )
    if len({len(array) for array in rows}) > 1:
        raise ValueError(
            f"DataLoader: the arrays have shapes {shapes}; expected the same length along axis 0. "
            "Check that inputs and labels are of the same part of the data."
        )
    return rows


def _at_least(name: str, value: int, least: int) -> int:
    """Return `value` as an int; raise TypeError or ValueError unless it is one and >= `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"DataLoader: {name} is {value!r}; expected an integer. Wrap it in int(...)."
        ) from None
    if number < least:
        raise ValueError(
            f"DataLoader: {name} is {number}; expected an integer >= {least}. "
            f"Use {name.split()[-1]}={least} or more."
        )
    return number
