"""What recording and copying ask of CuPy: which stream, which memory, and who waits for whom."""

import gc
import weakref
from contextlib import suppress
from operator import attrgetter

import pytest

from tests.backend.fake_cupy import CUDARuntimeError, FakeArray, FakeCupy
from tinygrad_bn.backend import cuda_graphs
from tinygrad_bn.backend.cuda import CupyDevices
from tinygrad_bn.backend.cuda_copies import CupySender
from tinygrad_bn.backend.cuda_graphs import CupyRecorder
from tinygrad_bn.backend.recording import CaptureError


@pytest.fixture(autouse=True)
def no_retired_pools(monkeypatch):
    for name in ("_pools", "_retired"):
        monkeypatch.setattr(cuda_graphs, name, [])


@pytest.fixture
def cupy():
    return FakeCupy()


def test_a_rehearsal_runs_on_the_recorders_stream_and_memory_and_streams_wait_for_each_other(cupy):
    recorder = CupyRecorder(cupy, 1)

    def run():
        cupy.note("work")
        return cupy.allocator

    assert recorder.rehearse(run) == recorder._pool.malloc
    assert cupy.log == [
        ("wait for default1", 1, "a"),
        ("work", 1, "a"),
        ("wait for a", 1, "default1"),
    ]
    assert (cupy.device, cupy.allocator) == (0, "the caller's allocator")
    assert cupy.streams[1].name == "default1"


def test_a_recording_captures_there_and_launches_on_the_callers_stream(cupy):
    recorder = CupyRecorder(cupy, 1)

    def run():
        assert not gc.isenabled()
        cupy.note("work")
        with recorder.outside():
            cupy.note(f"outside, {cupy.allocator}")
        cupy.note("more work")
        return "result"

    result, graph = recorder.record(run)
    assert result == "result"
    assert gc.isenabled()
    graph.launch()
    assert cupy.log == [
        ("begin", 1, "a"),
        ("work", 1, "a"),
        ("outside, the caller's allocator", 1, "default1"),
        ("more work", 1, "a"),
        ("end", 1, "a"),
        ("launch", 1, "default1"),
    ]
    assert cupy.pinned_allocator == "CuPy's"


REFUSED = {
    "waiting": lambda cupy: cupy.cuda.get_current_stream().synchronize(),
    "a copy from the host": lambda cupy: cupy.pinned_allocator(8),
    "CuPy's cuBLAS": lambda cupy: (_ for _ in ()).throw(
        NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    ).__next__(),
    "CuPy's reading": lambda cupy: (_ for _ in ()).throw(
        RuntimeError("the current stream is capturing, so D2H transfers are disallowed")
    ).__next__(),
}


@pytest.mark.parametrize("act", REFUSED.values(), ids=REFUSED)
def test_what_cuda_refuses_is_a_capture_error_and_the_stream_can_be_used_again(cupy, act):
    recorder = CupyRecorder(cupy, 0)
    with pytest.raises(CaptureError, match=r"host|CUDA cannot record.*([Uu]nsupported|disallowed)"):
        recorder.record(lambda: act(cupy))
    assert cupy.log[-1] == ("end", 0, "a")
    assert not recorder._stream.capturing
    assert cupy.pinned_allocator == "CuPy's"
    assert cupy.allocator == "the caller's allocator"
    assert gc.isenabled()
    assert recorder.record(lambda: 1)[0] == 1


def test_a_capture_that_turns_out_invalid_at_its_end_is_a_capture_error(cupy):
    recorder = CupyRecorder(cupy, 0)

    def swallows():
        with suppress(CUDARuntimeError):
            cupy.cuda.get_current_stream().synchronize()

    with pytest.raises(CaptureError, match="Invalidated"):
        recorder.record(swallows)


def test_an_error_of_the_step_is_its_own(cupy):
    recorder = CupyRecorder(cupy, 0)
    for error in (KeyError("mine"), NotImplementedError("not yet"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            recorder.record(lambda error=error: (_ for _ in ()).throw(error).__next__())
        assert caught.value is error
        assert cupy.log[-1][0] == "end"


def test_memory_is_freed_when_the_gpu_is_done_and_a_pool_is_used_again_only_when_empty(cupy):
    first = CupyRecorder(cupy, 0)
    first.release()
    assert [what for what, _, _ in cupy.log] == ["synchronize", "free"]
    second = CupyRecorder(cupy, 0)
    assert second._pool is first._pool
    second._pool.used = 512  # a gradient that outlives its graph
    second.release()
    assert CupyRecorder(cupy, 0)._pool is not second._pool


def test_a_pool_that_a_finalizer_gives_up_has_not_been_garbage(cupy):
    # CuPy's blocks refer to their pool weakly; Python clears that when the pool is in a cycle of
    # garbage, although the finalizer keeps it.
    class Captured:
        def __init__(self):
            self.recorder, self.itself = CupyRecorder(cupy, 0), self

        def __del__(self):
            self.recorder.release()

    pool = weakref.ref(Captured().recorder._pool)
    gc.collect()
    assert cuda_graphs._retired == [pool()]


def test_where_memory_runs_out_only_the_default_pool_gives_back_what_is_free(cupy):
    recorder = CupyRecorder(cupy, 0)
    assert recorder._pool.limit == 0
    assert recorder._pool.malloc(512) == 512
    cupy.default_pool.free_all_blocks = lambda: setattr(cupy, "free", 1 << 31)
    assert recorder._pool.malloc(1 << 31) == 1 << 31
    with pytest.raises(MemoryError):
        recorder._pool.malloc(1 << 32)
    assert cupy.log == []


def test_outside_a_recording_there_is_no_outside(cupy):
    with CupyRecorder(cupy, 0).outside():
        cupy.note("work")
    assert cupy.log == [("work", 0, "default0")]


def test_a_copy_waits_for_the_memorys_last_use_and_its_user_waits_for_the_copy(cupy):
    sender = CupySender(cupy, 1)

    class Host:
        shape, dtype = (2,), "float32"

    sent = sender.send(Host)
    with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True):
        sent.array()
    sent.wait()
    assert cupy.log == [
        ("empty", 1, "default1"),
        ("wait for default1", 1, "a"),
        ("set", 1, "a"),
        ("wait for a", 1, "b"),
        ("wait on the host for a", 0, "default0"),
    ]


def test_a_copy_between_gpus_waits_for_its_source_and_the_source_for_the_copy(cupy):
    moved = CupyDevices(cupy).move(FakeArray(cupy, 0), 1)
    assert moved.device.id == 1
    assert cupy.log == [
        ("wait for default0", 1, "default1"),
        ("copy from 0", 1, "default1"),
        ("wait for default1", 0, "default0"),
    ]


#: All that recording, copying and devices ask of CuPy by name.
NAMES = {
    "": "asarray array empty full zeros from_dlpack get_default_memory_pool "
    "get_default_pinned_memory_pool",
    "ndarray": "get set fill item device data base",
    "cuda": "Memory MemoryPointer get_current_stream using_allocator get_allocator "
    "set_pinned_memory_allocator",
    "cuda.Device": "synchronize compute_capability attributes",
    "cuda.Stream": "begin_capture end_capture record wait_event",
    "cuda.Event": "synchronize",
    "cuda.Graph": "launch",
    "cuda.MemoryPool": "malloc used_bytes total_bytes free_all_blocks set_limit",
    "cuda.memory": "OutOfMemoryError",
    "cuda.runtime": "CUDARuntimeError getDeviceCount getDevice runtimeGetVersion",
}


def test_cupy_has_what_is_asked_of_it():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed; no GPU is needed for this")
    for place, names in NAMES.items():
        owner = attrgetter(place)(cupy) if place else cupy
        assert [name for name in names.split() if not hasattr(owner, name)] == []
