"""A small pool of threads for the CPU kernels.

NumPy releases Python's lock inside large operations, so chunks of one array can be worked on side
by side. `parallel(task, count)` runs `task(0) ... task(count - 1)`, each index once, on whichever
thread is free; the caller's is one of them. A task must therefore give the same result in any
order: it writes to its own part of an output, or to its own partial sum, never into a shared one.
"""

from __future__ import annotations

import contextvars
import math
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import blas
from tinygrad_bn.kernels.cpu.quota import cpu_quota

VARIABLE = "TINYGRAD_BN_NUM_THREADS"
Task = Callable[[int], Any]

#: What a thread keeps between calls at most, for each name: above it, memory is given back.
KEPT_BYTES = 8 * 2**20

_local = threading.local()
_jobs: SimpleQueue[tuple[contextvars.Context, _Job]] = SimpleQueue()
_workers: list[threading.Thread] = []
_lock = threading.Lock()  # held to start workers, and to set the number of threads
_count: int | None = None


def available_cpus() -> int:
    """Return how many CPUs this process may use, by its affinity and its control group's quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cpus = os.cpu_count() or 1
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def num_threads() -> int:
    """Return how many threads kernels use: by `set_num_threads`, the environment, or the CPUs.

    The first call holds NumPy's matrix products to it too. (Their library counts the machine's
    processors, and knows nothing of a quota.)
    """
    global _count
    if _count is None:
        with _lock:
            if _count is None:  # no other thread was first
                wish = os.environ.get(VARIABLE)
                count = _checked(VARIABLE, wish) if wish else available_cpus()
                if wish or (blas.num_threads() or 0) > count:
                    blas.set_num_threads(count)
                _count = count
    return _count


def set_num_threads(count: int) -> None:
    """Let kernels, and NumPy's matrix products, use `count` threads; ValueError below 1."""
    global _count
    count = _checked("set_num_threads", count)
    with _lock:
        _count = count
        blas.set_num_threads(count)


def _checked(name: str, count: int | str) -> int:
    try:
        number = int(count) if isinstance(count, str) else count.__index__()
    except (AttributeError, TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"{name}: {count!r} threads; expected an integer of at least 1")
    return number


class _Job:
    """The indices of one `parallel` call, handed out one by one to the threads that work on it."""

    def __init__(self, task: Task, count: int):
        self.task: Task | None = task
        self.count = count
        self.next = 0
        self.helpers = 0
        self.lock = threading.Lock()
        self.error: BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()
        self.over = False

    def work(self) -> None:
        """Run tasks until none is left, or one has failed."""
        try:
            while True:
                with self.lock:
                    task, index = self.task, self.next
                    self.next += 1
                if index >= self.count or task is None:
                    return
                task(index)
        except BaseException as error:
            with self.lock:
                self.next = self.count  # no thread starts another
                self.error = self.error or error

    def help(self) -> None:
        """Work beside the caller, unless it has finished before this thread woke up."""
        with self.lock:
            if self.next >= self.count:
                return
            self.helpers += 1
        self.work()
        with self.lock:
            self.helpers -= 1
        self.done.put(None)  # so whoever still sees this helper counted has a wake-up to come

    def finish(self) -> None:
        """Wait for the helpers that have begun; none begins when no index is left."""
        with self.lock:
            self.next = self.count
            self.task = None  # an idle worker must not keep the arrays of this job alive
        while self._is_helped():
            self.done.get()
        blas.release(self)
        _local.busy = False
        self.over = True

    def _is_helped(self) -> bool:
        with self.lock:  # after which this thread sees all that the helpers have written
            return self.helpers > 0


def parallel(task: Task, count: int) -> None:
    """Run `task(index)` for every index below `count`, on up to `num_threads()` threads.

    Returns when all are done. NumPy's matrix products inside use one thread each. The first
    exception is raised here after the other threads have stopped; a call from within a task runs
    in that task's thread.
    """
    helpers = min(num_threads(), count) - 1
    if helpers < 1 or getattr(_local, "busy", False):
        for index in range(count):
            task(index)
        return
    _start(helpers)
    job = _Job(task, count)
    try:
        _local.busy = True
        blas.hold(job)
        for _ in range(helpers):
            # NumPy keeps its error state in a context variable, so the caller's goes along.
            _jobs.put((contextvars.copy_context(), job))
        job.work()
    except BaseException as error:  # an interrupt: what a task raises is in job.error already
        job.error = error
    while not job.over:  # again after another interrupt: no thread may go on writing unnoticed
        try:
            job.finish()
        except BaseException as error:
            job.error = error
    if job.error is not None:
        error, job.error = job.error, None
        try:
            raise error
        finally:
            del error  # its traceback holds this frame: as a cycle they would keep the arrays


def _start(helpers: int) -> None:
    """Have `helpers` workers wait for jobs; fewer where the system gives no more threads."""
    if len(_workers) >= helpers or sys.is_finalizing():  # a thread would not come up any more
        return
    with _lock:
        while len(_workers) < helpers:
            name = f"tinygrad_bn-{len(_workers)}"
            worker = threading.Thread(target=_serve, args=(_jobs,), name=name, daemon=True)
            try:
                worker.start()
            except RuntimeError:  # "can't start new thread"
                return
            _workers.append(worker)


def _serve(jobs: SimpleQueue[tuple[contextvars.Context, _Job]]) -> None:
    _local.busy = True
    while True:
        context, job = jobs.get()
        context.run(job.help)
        del context, job


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of this thread's own, unset, to be overwritten by the next call of this name.

    Fresh memory costs a page fault for every 4 KiB, and is never in cache; this is both at hand.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size > KEPT_BYTES:
        return np.empty(shape, dtype)
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(name)
    if buffer is None or buffer.size < size:
        buffer = buffers[name] = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)


def _forget() -> None:
    """Start afresh in a forked child: the threads did not come along."""
    global _jobs, _lock, _local
    _jobs, _lock, _local = SimpleQueue(), threading.Lock(), threading.local()
    _workers.clear()
    blas.forget_holders()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
