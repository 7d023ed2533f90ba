"""Copies from pinned host memory to a GPU, on a stream of their own."""

from __future__ import annotations

from typing import Any

import numpy as np


class CupySender:
    """Copies pinned arrays to one GPU while it computes (a `Sender`)."""

    def __init__(self, cupy: Any, index: int):
        self._cupy = cupy
        self._index = index
        with cupy.cuda.Device(index):
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an uninitialised NumPy array in page-locked memory."""
        import cupyx  # pyrefly: ignore

        return cupyx.empty_pinned(shape, dtype)

    def send(self, host: np.ndarray) -> CupySent:
        """Begin to copy `host`, after what the current stream was given so far.

        The target is allocated for the current stream. Its memory may have belonged to an array
        that work on that stream still reads, so the copy waits for that work.
        """
        cuda = self._cupy.cuda
        with cuda.Device(self._index):
            array = self._cupy.empty(host.shape, host.dtype)
            before = cuda.get_current_stream().record(cuda.Event(disable_timing=True))
            self._stream.wait_event(before)
            array.set(host, stream=self._stream)
            copied = self._stream.record(cuda.Event(disable_timing=True))
        return CupySent(cuda, array, copied)


class CupySent:
    """A copy on its way (a `Sent`)."""

    def __init__(self, cuda: Any, array: Any, copied: Any):
        self._cuda = cuda
        self._array = array
        self._copied = copied

    def array(self) -> Any:
        """Return the array, after making the current stream wait for the copy."""
        with self._array.device:
            self._cuda.get_current_stream().wait_event(self._copied)
        return self._array

    def wait(self) -> None:
        """Return once the host array has been read: at once, if that was some steps ago."""
        self._copied.synchronize()
