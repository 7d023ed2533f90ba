"""A contender in a process of its own.

Libraries that share a process disturb each other: a thread pool goes on spinning for some
milliseconds after its work, one library's frees change how the next one's allocations behave, and
peak memory cannot be told apart. Here each has a process, and waits at a pipe while another runs.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from _measure import Turn, peak_memory

#: Read by OpenMP (PyTorch), OpenBLAS and MKL (NumPy) when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Remote:
    """What `factory(*args)` returns, in a process started for it with `threads` threads.

    environment: variables that are set for this process, beside those for the threads.

    `ask` calls a method there and returns its result; an exception there is a RuntimeError here. To
    be used in a `with` block, at whose end the process ends.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        *args: Any,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ):
        context = multiprocessing.get_context("spawn")  # fork would copy this process's threads
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, factory, args), daemon=True)
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        with _environment({**variables, **(environment or {})}):
            self._process.start()
        far_end.close()
        self._receive()

    def ask(self, method: str, *args: Any) -> Any:
        """Return what `method(*args)` of the object over there returns."""
        self._pipe.send((method, args))
        return self._receive()

    def turn(self, settle: int, count: int) -> Turn:
        """Return what `Contender.turn` returns there."""
        return self.ask("turn", settle, count)

    def peak_memory(self) -> float:
        """Return the largest resident memory of the process so far, in MB."""
        self._pipe.send((None, ()))
        return self._receive()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # which ends the loop there
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            failed, result = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"a contender's process ended with exit code {code}") from None
        if failed:
            raise RuntimeError(f"a contender failed in its process:\n{result}")
        return result


def _serve(pipe: Any, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Make the object, then answer calls until the other end is closed."""
    served = None
    call: tuple[Any, tuple[Any, ...]] = ("made", ())
    while True:
        try:
            method, arguments = call
            if served is None:
                served, result = factory(*args), None
            else:
                result = peak_memory() if method is None else getattr(served, method)(*arguments)
            pipe.send((False, result))
        except Exception:
            pipe.send((True, traceback.format_exc()))
        try:
            call = pipe.recv()
        except EOFError:
            return


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started in the `with` block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
