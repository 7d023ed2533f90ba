"""What a library for a GPU offers beside arrays: devices, copies from the host, recorded graphs.

These are the interfaces that `backend/cuda.py` and its neighbours fulfil with CuPy, and the tests
with a stand-in. All that is worth testing is written against them, above.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

Array = Any


class Accelerator(Protocol):
    """The devices of one array library, numbered from 0."""

    def count(self) -> int:
        """Return how many devices there are."""
        ...

    def current(self) -> int:
        """Return the number of the device on which new arrays are made."""
        ...

    def use(self, index: int) -> AbstractContextManager[Any]:
        """Return a context in which device `index` is the current one."""
        ...

    def move(self, array: Array, index: int) -> Array:
        """Return a copy of `array` on device `index`, made without passing through the host."""
        ...

    def from_dlpack(self, value: Any) -> Array:
        """Return an array that shares the memory of another library's."""
        ...

    def sender(self, index: int) -> Sender:
        """Return what copies from the host to device `index` beside its computing."""
        ...

    def recorder(self, index: int) -> Recorder:
        """Return what records work on device `index` as graphs."""
        ...


class Sender(Protocol):
    """Copies host arrays to a device in the background."""

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an uninitialised NumPy array that the device can read by itself."""
        ...

    def send(self, host: Any) -> Sent:
        """Begin to copy a pinned array; it must stay as it is until the copy has left it."""
        ...


class Sent(Protocol):
    """A copy on its way."""

    def array(self) -> Array:
        """Return the array on the device; what computes with it next is made to wait for it."""
        ...

    def wait(self) -> None:
        """Return once the host array has been read."""
        ...


class Recorder(Protocol):
    """Records work on a device, which then can be run again as a whole."""

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """Return what `run()` returns, run for real where a recording will find its memory."""
        ...

    def record(self, run: Callable[[], Any]) -> tuple[Any, Graph]:
        """Return what `run()` returns, and its work as a graph; none of it has been done yet.

        Raises CaptureError with the reason for what no graph can hold.
        """
        ...

    def outside(self) -> AbstractContextManager[Any]:
        """Return a context, to be used inside `run`, whose work is done now and not recorded."""
        ...

    def release(self) -> None:
        """Let go of the memory that recordings worked in."""
        ...


class Graph(Protocol):
    """Work that was recorded, on the memory that it was recorded with."""

    def launch(self) -> None:
        """Begin to do the work, after what the device was given before."""
        ...
