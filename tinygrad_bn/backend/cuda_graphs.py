"""CUDA graphs through CuPy: work on a stream is captured, instantiated and launched again.

What CUDA and CuPy ask for, and how it is met:

- A stream other than the default one captures. It is the recorder's own, non-blocking, so that the
  default stream stays usable meanwhile.
- A graph works on fixed addresses. CuPy's memory pool knows nothing of that, so rehearsal and
  recording allocate from a pool of their own. What was free there when a recording ended may be
  used by the next one, as no two graphs of a recorder run at once; nobody else gets it. That holds
  when memory runs out, too: a pool of CuPy's would then give back all that is free in it.
- Allocation from the driver while capturing is allowed in relaxed mode, which is CuPy's default. It
  is seldom needed: rehearsals ran on the same stream, so the pool has grown to its size.
- Reading back or synchronising makes CUDA fail the capture. A copy from the host would be captured,
  with an address that CuPy gives to the next copy. Such copies pass through pinned memory, whose
  allocator therefore refuses while capturing.
- cuBLAS: `kernels/cuda/blas.py` has a handle of its own; CuPy refuses to use its own handle.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tinygrad_bn.backend.recording import CaptureError

_NO_MEMORY = 2  # cudaErrorMemoryAllocation, which CuPy has under no name

#: All pools there are. A pool must outlive the arrays from it, such as gradients. And it must never
#: be garbage, not even for the moment in which the finalizer of a captured step gives it up: Python
#: would clear the weak reference by which CuPy's blocks know their pool, and from then on memory
#: from it would be gone at once when an array is, while graphs still work there.
_pools: list[Any] = []
#: Those of recorders that are gone, to be used again once they are empty.
_retired: list[Any] = []


class CupyRecorder:
    """Records CUDA graphs on one GPU (a `Recorder`)."""

    def __init__(self, cupy: Any, index: int):
        self._cupy = cupy
        self._index = index
        self._pool = _empty_pool() or _new_pool(cupy)
        with cupy.cuda.Device(index):
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._pool.set_limit(size=0)  # at CUPY_GPU_MEMORY_LIMIT it would give back memory, too
        #: Where work goes that is not recorded: the caller's stream and allocator.
        self._outside: tuple[Any, Any] | None = None

    def rehearse(self, run: Callable[[], Any]) -> Any:
        """Return what `run()` returns, done on the recorder's stream, in its memory.

        The caller's stream waits for it, as it waits for what the caller's stream was given before.
        """
        cuda = self._cupy.cuda
        with cuda.Device(self._index):
            caller = cuda.get_current_stream()
            self._stream.wait_event(caller.record(cuda.Event(disable_timing=True)))
            try:
                with self._inside():
                    return run()
            finally:
                caller.wait_event(self._stream.record(cuda.Event(disable_timing=True)))

    def record(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        """Return what `run()` returns, and its work as a graph; none of it has been done yet."""
        with self._cupy.cuda.Device(self._index), self._inside(), _no_collection():
            self._stream.begin_capture()
            try:
                with self._no_copies_from_the_host():
                    result = run()
            except BaseException as error:
                self._abandon()
                raise self._explained(error) from error
            try:
                graph = self._stream.end_capture()
            except self._cupy.cuda.runtime.CUDARuntimeError as error:
                raise self._explained(error) from error
        return result, CupyGraph(self._cupy, self._index, graph)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Do the work inside this context now, on the caller's stream and in its memory."""
        if self._outside is None:
            yield
            return
        stream, allocator = self._outside
        with stream, self._cupy.cuda.using_allocator(allocator):
            yield

    def release(self) -> None:
        """Give free memory back to the driver; what arrays still hold stays theirs."""
        with self._cupy.cuda.Device(self._index) as device:
            device.synchronize()  # a graph may still be running in it
            self._pool.free_all_blocks()
        _retired.append(self._pool)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        cuda = self._cupy.cuda
        self._outside = cuda.get_current_stream(), cuda.get_allocator()
        try:
            with self._stream, cuda.using_allocator(self._pool.malloc):
                yield
        finally:
            self._outside = None

    @contextmanager
    def _no_copies_from_the_host(self) -> Iterator[None]:
        """Have CuPy's copies from the host fail inside this context.

        CuPy does not tell which allocator of pinned memory is set; afterwards it is CuPy's default.
        """

        def refuse(size: int) -> Any:
            raise CaptureError(
                "capture: the step copies from the host (an array made of Python numbers or of a "
                "NumPy array), and a graph would copy what is there by then; make it before, or "
                "hand it to the step as an argument"
            )

        cupy = self._cupy
        cupy.cuda.set_pinned_memory_allocator(refuse)
        try:
            yield
        finally:
            default = cupy.get_default_pinned_memory_pool().malloc
            cupy.cuda.set_pinned_memory_allocator(default)

    def _abandon(self) -> None:
        """End a capture whose graph is not wanted; it may have failed already."""
        with suppress(self._cupy.cuda.runtime.CUDARuntimeError):
            self._stream.end_capture()

    def _explained(self, error: BaseException) -> BaseException:
        """Return the error to raise for `error`: CUDA's and CuPy's refusals as CaptureError.

        CuPy refuses its own products by NotImplementedError, and reading by a plain RuntimeError.
        """
        if isinstance(error, CaptureError):
            return error
        if isinstance(error, self._cupy.cuda.runtime.CUDARuntimeError) or (
            isinstance(error, RuntimeError) and "captur" in str(error)
        ):
            return CaptureError(
                f"capture: the step does something that CUDA cannot record: {error}. Reading a "
                f"value on the host, waiting for the GPU and boolean indexing are such; the "
                f"traceback above tells where"
            )
        return error


class CupyGraph:
    """An instantiated CUDA graph (a `Graph`)."""

    def __init__(self, cupy: Any, index: int, graph: Any):
        self._device = cupy.cuda.Device(index)
        self._graph = graph

    def launch(self) -> None:
        """Launch it on the current stream."""
        with self._device:
            self._graph.launch()


def _new_pool(cupy: Any) -> Any:
    pool = cupy.cuda.MemoryPool(lambda size: _from_the_driver(cupy, size))
    _pools.append(pool)
    return pool


def _from_the_driver(cupy: Any, size: int) -> Any:
    """Return new memory, or raise CuPy's OutOfMemoryError.

    On CUDA's error for it, which that is not, a pool gives back its free memory and tries again.
    Here it is the default pool that does so, where no graph works.
    """
    cuda = cupy.cuda
    for last_try in (False, True):
        try:
            return cuda.MemoryPointer(cuda.Memory(size), 0)
        except cuda.runtime.CUDARuntimeError as error:
            if error.status != _NO_MEMORY:
                raise
            default = cupy.get_default_memory_pool()
            if last_try:
                raise cuda.memory.OutOfMemoryError(size, default.total_bytes()) from error
            default.free_all_blocks()


def _empty_pool() -> Any:
    """Return a pool that was given up and is empty by now, or None."""
    for i, pool in enumerate(_retired):
        if pool.used_bytes() == 0:
            return _retired.pop(i)
    return None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector, which may free GPU memory, from running inside."""
    gc.collect()
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
