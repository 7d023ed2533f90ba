"""A recorder of graphs over the stand-in: it writes down the launches, and can do them again.

As with CUDA, recording does no work: what the launches changed is put back when it ends. (They are
done nevertheless, on the side, for their shapes.) Before each replay all that was made during the
recording is filled with nonsense, as memory would be that others used in the meantime: a replay
that relies on anything but its inputs and what existed before gives nonsense too.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from tests.backend import strict_array
from tinygrad_bn.backend.recording import CaptureError


def root(array):
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def arrays_in(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from arrays_in(entry)
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))


class StrictGraph:
    """The launches of a recording (a `Graph`)."""

    def __init__(self):
        self.launches = []
        self.made = {}  # id of the memory -> memory
        self.found = {}  # id of the memory -> (memory, its content when the recording began)
        self.replays = 0

    def before(self, args, kwargs):
        for array in arrays_in([args, kwargs]):
            memory = root(array)
            if id(memory) not in self.made and id(memory) not in self.found:
                self.found[id(memory)] = memory, memory.copy()

    def after(self, function, args, kwargs, result):
        self.launches.append((function, args, kwargs, result))
        for array in arrays_in(result):
            memory = root(array)
            if id(memory) not in self.found:
                self.made[id(memory)] = memory

    def undo(self):
        for memory, content in self.found.values():
            memory[...] = content

    def launch(self):
        self.replays += 1
        for memory in self.made.values():
            if memory.flags.writeable:
                memory.fill(np.nan if memory.dtype.kind == "f" else 77)
        for function, args, kwargs, result in self.launches:
            again = strict_array.computed(function, args, kwargs)
            for into, value in zip(arrays_in(result), arrays_in(again), strict=True):
                inputs = arrays_in([args, kwargs])
                if not any(np.may_share_memory(into, array) for array in inputs):
                    np.copyto(into, value)


class StrictRecorder:
    """Records the launches of StrictArrays (a `Recorder`)."""

    def __init__(self):
        self.graphs = []
        self.released = False

    def rehearse(self, run):
        return run()

    def record(self, run):
        graph = StrictGraph()
        strict_array.TAPE = graph
        try:
            with np.errstate(all="ignore"):
                result = run()
        except strict_array.CapturingError as error:
            raise CaptureError(f"capture: the step cannot be recorded: {error}") from error
        finally:
            strict_array.TAPE = None
            graph.undo()
        self.graphs.append(graph)
        return result, graph

    @contextmanager
    def outside(self):
        tape, strict_array.TAPE = strict_array.TAPE, None
        try:
            yield
        finally:
            strict_array.TAPE = tape

    def release(self):
        self.released = True
