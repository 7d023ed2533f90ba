"""The emulated GPU refuses what a GPU would: the part of it that needs no CuPy, built and tried.

The tests for a GPU run on it in twenty minutes (`make test-emulated-gpu`), and find a fault only
where it is as strict as is said in `tests/gpu/emulator`. Its memory, streams, events and graphs are
built here by themselves; kernels and what CuPy makes of it all are not.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.cuda import shim

EMULATOR = Path(__file__).parents[1] / "gpu" / "emulator"

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=shim.missing() or "")

TO_DEVICE, TO_HOST, WITHIN = 1, 2, 3
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, INVALID_HANDLE = 1, 2, 101, 400
NOT_READY, ILLEGAL_ADDRESS = 600, 700
UNSUPPORTED, INVALIDATED, UNJOINED, ISOLATION, IMPLICIT = 900, 901, 904, 905, 906
GLOBAL, RELAXED = 0, 2
N = 1000


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    made = tmp_path_factory.mktemp("emulator") / "runtime.so"
    command = [
        shim.COMPILER, "-std=c++17", "-O0", "-fPIC", "-shared", "-Wl,-Bsymbolic",
        f"-I{EMULATOR / 'plain'}", EMULATOR / "memory.cpp", EMULATOR / "streams.cpp", "-o", made,
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


class Runtime:
    """The functions of one emulated machine, by their names without "cuda"."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def __call__(self, name, *arguments):
        return getattr(self.library, f"cuda{name}")(*arguments)

    def made(self, name, *arguments):
        """Return the handle or the address that a function writes to its first argument."""
        result = ctypes.c_void_p()
        assert self(name, ctypes.byref(result), *arguments) == 0
        return result

    def new(self, size=N):
        return self.made("Malloc", ctypes.c_size_t(size))

    def stream(self):
        return self.made("StreamCreateWithFlags", 1)

    def copy(self, to, source, kind, stream, size=N):
        return self("MemcpyAsync", to, source, ctypes.c_size_t(size), kind, stream)

    def read(self, at, size=N):
        host = np.zeros(size, "uint8")
        assert self("Memcpy", pointer(host), at, ctypes.c_size_t(size), TO_HOST) == 0
        return host

    def filled(self, value):
        """Return new memory that holds `value` in every byte."""
        at = self.new()
        assert self("Memset", at, value, ctypes.c_size_t(N)) == 0
        assert self("DeviceSynchronize") == 0  # for streams that do not wait for the default one
        return at


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def ended(cuda, stream, expected=0):
    """Return the graph of a capture that ends with the error `expected`."""
    graph = ctypes.c_void_p()
    assert cuda("StreamEndCapture", stream, ctypes.byref(graph)) == expected
    return graph


@pytest.fixture
def cuda(library, tmp_path, monkeypatch):
    """A machine of its own for each test: an error in work stays for ever, as with CUDA."""
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)  # it would do work at once
    return Runtime(shutil.copy(library, tmp_path))


def test_new_memory_holds_nan(cuda):
    assert np.isnan(cuda.read(cuda.new(), 400).view("float32")).all()
    assert np.isnan(cuda.read(cuda.new(), 400).view("float16")).all()


def test_copies_stay_within_what_was_allocated_and_go_the_way_they_say(cuda):
    at, other, host, stream = cuda.new(), cuda.new(), np.zeros(2 * N, "uint8"), cuda.stream()
    assert cuda.copy(at, pointer(host), TO_DEVICE, stream, N + 1) == INVALID_VALUE
    assert cuda.copy(pointer(host), at, TO_HOST, stream, N + 1) == INVALID_VALUE
    assert cuda.copy(pointer(host), other, WITHIN, stream) == INVALID_VALUE
    assert cuda.copy(at, pointer(host), TO_HOST, stream) == INVALID_VALUE
    assert cuda.copy(at, other, WITHIN, stream) == 0
    assert cuda("MemsetAsync", pointer(host), 0, ctypes.c_size_t(N), stream) == INVALID_VALUE


def test_memory_is_finite_and_freed_once(cuda):
    at = cuda.new()
    assert cuda("Free", at) == 0
    assert cuda("Free", at) == INVALID_VALUE
    assert cuda("Malloc", ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1 << 40)) == (
        OUT_OF_MEMORY
    )


def test_work_on_memory_that_was_freed_is_an_error_that_stays(cuda):
    at, stream = cuda.new(), cuda.stream()
    assert cuda("StreamBeginCapture", stream, GLOBAL) == 0
    assert cuda("MemsetAsync", at, 7, ctypes.c_size_t(N), stream) == 0
    graph = ended(cuda, stream)
    replay = cuda.made("GraphInstantiate", graph, ctypes.c_ulonglong(0))
    assert cuda("GraphLaunch", replay, stream) == 0
    assert cuda("StreamSynchronize", stream) == 0
    assert (cuda.read(at) == 7).all()
    assert cuda("Free", at) == 0
    assert cuda("GraphLaunch", replay, stream) == 0
    assert cuda("StreamSynchronize", stream) == ILLEGAL_ADDRESS
    assert cuda("MemsetAsync", cuda.new(), 0, ctypes.c_size_t(N), stream) == ILLEGAL_ADDRESS


def test_work_is_done_as_late_as_it_may_be(cuda):
    """What overwrites pinned memory without waiting for the copy from it sends the wrong bytes."""
    pinned = cuda.made("HostAlloc", ctypes.c_size_t(N), 0)
    at, stream, event = cuda.new(), cuda.stream(), cuda.made("EventCreateWithFlags", 0)
    for waits, arrived in ((False, 2), (True, 1)):
        ctypes.memset(pinned, 1, N)
        assert cuda.copy(at, pinned, TO_DEVICE, stream) == 0
        assert cuda("EventRecord", event, stream) == 0
        assert cuda("EventQuery", event) == NOT_READY
        if waits:
            assert cuda("EventSynchronize", event) == 0
            assert cuda("EventQuery", event) == 0
        ctypes.memset(pinned, 2, N)
        assert cuda("StreamSynchronize", stream) == 0
        assert (cuda.read(at) == arrived).all()


def test_a_stream_that_does_not_wait_for_another_one_comes_first(cuda):
    first, second = cuda.stream(), cuda.stream()
    event = cuda.made("EventCreateWithFlags", 0)
    for waits, seen in ((False, 1), (True, 3)):
        source, target = cuda.filled(1), cuda.new()
        assert cuda("MemsetAsync", source, 3, ctypes.c_size_t(N), first) == 0
        assert cuda("EventRecord", event, first) == 0
        if waits:
            assert cuda("StreamWaitEvent", second, event, 0) == 0
        assert cuda.copy(target, source, WITHIN, second) == 0
        assert cuda("StreamSynchronize", second) == 0
        assert (cuda.read(target) == seen).all()
        assert cuda("DeviceSynchronize") == 0


def test_an_event_belongs_to_the_device_it_was_made_on(cuda):
    event = cuda.made("EventCreateWithFlags", 0)
    assert cuda("SetDevice", 2) == INVALID_DEVICE
    assert cuda("SetDevice", 1) == 0
    assert cuda("EventRecord", event, cuda.stream()) == INVALID_HANDLE
    assert cuda("EventRecord", event, None) == INVALID_HANDLE


@pytest.mark.parametrize(
    ("refused", "error"),
    [
        (lambda cuda, s: cuda("Malloc", ctypes.byref(ctypes.c_void_p()), N), UNSUPPORTED),
        (lambda cuda, s: cuda("StreamSynchronize", s), UNSUPPORTED),
        (lambda cuda, s: cuda("StreamQuery", s), UNSUPPORTED),
        (lambda cuda, s: cuda("DeviceSynchronize"), UNSUPPORTED),
    ],
    ids=["allocating", "waiting for the stream", "asking the stream", "waiting for the device"],
)
def test_what_a_capture_refuses_spoils_it(cuda, refused, error):
    at, stream = cuda.new(), cuda.stream()
    assert cuda("StreamBeginCapture", stream, GLOBAL) == 0
    assert refused(cuda, stream) == error
    assert cuda("MemsetAsync", at, 0, ctypes.c_size_t(N), stream) == INVALIDATED
    ended(cuda, stream, INVALIDATED)


def test_a_capture_takes_no_work_of_the_default_stream_or_of_before_it(cuda):
    at, event = cuda.new(), cuda.made("EventCreateWithFlags", 0)
    blocking = cuda.made("StreamCreate")
    assert cuda("StreamBeginCapture", blocking, RELAXED) == 0
    assert cuda("MemsetAsync", at, 0, ctypes.c_size_t(N), None) == IMPLICIT
    ended(cuda, blocking, INVALIDATED)
    stream, outside = cuda.stream(), cuda.stream()
    assert cuda("EventRecord", event, outside) == 0
    assert cuda("StreamBeginCapture", stream, RELAXED) == 0
    assert cuda("StreamWaitEvent", stream, event, 0) == ISOLATION
    ended(cuda, stream, INVALIDATED)


def test_a_capture_does_nothing_until_it_is_replayed_and_its_branches_must_join(cuda):
    at, stream, other = cuda.filled(1), cuda.stream(), cuda.stream()
    forked, joined = (cuda.made("EventCreateWithFlags", 0) for _ in range(2))
    for joins in (True, False):
        assert cuda("StreamBeginCapture", stream, GLOBAL) == 0
        assert cuda("EventRecord", forked, stream) == 0
        assert cuda("StreamWaitEvent", other, forked, 0) == 0
        assert cuda("MemsetAsync", at, 5, ctypes.c_size_t(N), other) == 0
        assert cuda("EventRecord", joined, other) == 0
        if joins:
            assert cuda("StreamWaitEvent", stream, joined, 0) == 0
        graph = ended(cuda, stream, 0 if joins else UNJOINED)
        if joins:
            assert (cuda.read(at) == 1).all()
            replay = cuda.made("GraphInstantiate", graph, ctypes.c_ulonglong(0))
            assert cuda("GraphLaunch", replay, stream) == 0
            assert cuda("StreamSynchronize", stream) == 0
            assert (cuda.read(at) == 5).all()
