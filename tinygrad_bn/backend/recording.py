"""What code says of itself while a step is being recorded as a graph, so that replays are right.

A graph repeats what the device did: the same work on the same memory. Python does not run again.
So whatever a step does besides has to be told here, at the place where it is done:

    each_time(action)        do something on the host now, and again before every replay
    number(value, dtype)     a number that may differ from step to step
    lasting(make)            memory that replays read and do not write
    must_stay(what, holds)   something that replays rely on
    refuse(what)             something that no replay can repeat

While no step is being recorded these do the plain thing, at the cost of one look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class CaptureError(RuntimeError):
    """Says why a step cannot be replayed as a graph."""


class Watch:
    """A step that is being run for `capture`: what it said of itself.

    recorder: of the device that it runs on.
    recording: whether its work is being recorded; otherwise it is done, and only watched.
    actions: what to do on the host before a replay, in order.
    conditions: what must hold for a replay to be right, with the words to say that it does not.
    held: memory that replays read, kept for as long as there may be any.
    """

    def __init__(self, recorder: Any = None, recording: bool = False):
        self.recorder = recorder
        self.recording = recording
        self.actions: list[Callable[[], Any]] = []
        self.conditions: list[tuple[str, Callable[[], bool]]] = []
        self.held: list[Any] = []


_watching: ContextVar[Watch | None] = ContextVar("tinygrad_bn_watching", default=None)

#: The step that is being run for `capture` in this context, or None.
watching = _watching.get


@contextmanager
def watched_by(watch: Watch) -> Iterator[Watch]:
    """Have `watch` told of what is done inside the `with` block."""
    before = _watching.get()
    _watching.set(watch)
    try:
        yield watch
    finally:
        _watching.set(before)


def refuse(what: str, instead: str) -> None:
    """Raise CaptureError if a step is being recorded or tried out: it does `what`."""
    if watching() is not None:
        raise CaptureError(f"capture: the step {what}, which no graph can repeat; {instead}")


def each_time(action: Callable[[], Any]) -> None:
    """Do `action`, and have replays do it, too."""
    watch = watching()
    if watch is not None and watch.recording:
        watch.actions.append(action)
    action()


def number(value: Callable[[], float], like: Any) -> Any:
    """Return `value()`, or an array of it in the dtype of the array `like`, which replays renew.

    Computing with it gives the same bits as with the Python number, which is weak: it is rounded
    to the dtype of the arrays it meets.
    """
    watch = watching()
    if watch is None or not watch.recording:
        return value()
    from tinygrad_bn.backend.arrays import array_module

    held = lasting(lambda: array_module(like).full((), value(), dtype=like.dtype))
    # A kernel that fills takes the number as an argument: no copy that the host could overtake.
    watch.actions.append(lambda: held.fill(value()))
    return held


def lasting(make: Callable[[], Any]) -> Any:
    """Return the array `make()`, made now and not by replays, which find it as it is then."""
    watch = watching()
    if watch is None or not watch.recording:
        return make()
    with watch.recorder.outside():
        made = make()
    watch.held.append(made)
    return made


def must_stay(what: str, holds: Callable[[], bool]) -> None:
    """Have replays make sure that `holds()` is still true; `what` says so in words if not."""
    watch = watching()
    if watch is not None and watch.recording:
        watch.conditions.append((what, holds))
