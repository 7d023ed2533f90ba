"""As much of CuPy as recording graphs and copying ahead use: it writes down who did what, where.

`log` has an entry for everything, with the device and the stream on which it was done. What CUDA
refuses while a stream is capturing is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace


class CUDARuntimeError(RuntimeError):
    def __init__(self, message, status=900):
        super().__init__(message)
        self.status = status


class OutOfMemoryError(MemoryError):
    def __init__(self, size, total):
        super().__init__(f"{size} bytes, {total} so far")


class FakeCupy:
    def __init__(self, count=2):
        self.log = []
        self.device = 0
        self.streams = {i: FakeStream(self, f"default{i}") for i in range(count)}
        self.allocator = "the caller's allocator"
        self.pinned_allocator = "CuPy's"
        self.default_pool = FakePool(self, self.new_memory)
        self.free = 1 << 30
        self.names = iter("abcdefghij")
        self.cuda = SimpleNamespace(
            Device=lambda index=None: FakeDevice(
                self, self.device if index is None else int(index)
            ),
            Stream=lambda non_blocking: FakeStream(self, next(self.names), non_blocking),
            Event=lambda disable_timing: FakeEvent(self),
            MemoryPool=lambda allocator: FakePool(self, allocator),
            MemoryPointer=lambda memory, offset: memory,
            Memory=self.new_memory,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: self.streams[self.device],
            get_allocator=lambda: self.allocator,
            using_allocator=self.using_allocator,
            set_pinned_memory_allocator=lambda allocator: setattr(
                self, "pinned_allocator", allocator
            ),
            runtime=SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                getDeviceCount=lambda: count,
                getDevice=lambda: self.device,
            ),
        )

    def new_memory(self, size):
        if size > self.free:
            raise CUDARuntimeError("cudaErrorMemoryAllocation", status=2)
        return size

    def get_default_memory_pool(self):
        return self.default_pool

    def get_default_pinned_memory_pool(self):
        return SimpleNamespace(malloc="CuPy's")

    @contextmanager
    def using_allocator(self, allocator):
        before, self.allocator = self.allocator, allocator
        try:
            yield
        finally:
            self.allocator = before

    def note(self, what):
        self.log.append((what, self.device, self.streams[self.device].name))

    def empty(self, shape, dtype):
        self.note("empty")
        return FakeArray(self, self.device)

    def array(self, source):
        self.note(f"copy from {source.device.id}")
        return FakeArray(self, self.device)


class FakeArray:
    def __init__(self, cupy, index):
        self.cupy = cupy
        self.device = FakeDevice(cupy, index)

    def set(self, host, stream):
        self.cupy.log.append(("set", self.device.id, stream.name))


class FakeDevice:
    def __init__(self, cupy, index):
        self.cupy, self.id, self.before = cupy, index, []

    def __enter__(self):
        self.before.append(self.cupy.device)
        self.cupy.device = self.id
        return self

    def __exit__(self, *error):
        self.cupy.device = self.before.pop()

    def synchronize(self):
        self.cupy.note("synchronize")


class FakeEvent:
    def __init__(self, cupy):
        self.cupy, self.of = cupy, None

    def synchronize(self):
        self.cupy.note(f"wait on the host for {self.of}")


class FakeStream:
    def __init__(self, cupy, name, non_blocking=False):
        self.cupy, self.name, self.non_blocking = cupy, name, non_blocking
        self.capturing, self.before = False, []

    def __enter__(self):
        self.before.append(self.cupy.streams[self.cupy.device])
        self.cupy.streams[self.cupy.device] = self
        return self

    def __exit__(self, *error):
        self.cupy.streams[self.cupy.device] = self.before.pop()

    def record(self, event):
        event.of = self.name
        return event

    def wait_event(self, event):
        self.cupy.log.append((f"wait for {event.of}", self.cupy.device, self.name))

    def synchronize(self):
        if self.capturing:
            self.capturing = "failed"
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")

    def begin_capture(self):
        assert self.non_blocking, "the default stream cannot capture"
        self.capturing = True
        self.cupy.note("begin")

    def end_capture(self):
        failed, self.capturing = self.capturing == "failed", False
        self.cupy.note("end")
        if failed:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        return FakeGraph(self.cupy)


class FakeGraph:
    def __init__(self, cupy):
        self.cupy = cupy

    def launch(self):
        self.cupy.note("launch")


class FakePool:
    def __init__(self, cupy, allocator):
        self.cupy, self.used, self.allocator, self.limit = cupy, 0, allocator, 100

    def set_limit(self, size):
        self.limit = size

    def malloc(self, size):
        try:
            return self.allocator(size)
        except CUDARuntimeError:
            self.free_all_blocks()
            return self.allocator(size)

    def total_bytes(self):
        return 0

    def used_bytes(self):
        return self.used

    def free_all_blocks(self):
        self.cupy.note("free")
