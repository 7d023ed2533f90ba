"""Whether ops are recorded: `no_grad` and `enable_grad`, as context managers and as decorators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from types import TracebackType
from typing import Any, ClassVar, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_grad_enabled: ContextVar[bool] = ContextVar("tinygrad_bn_grad_enabled", default=True)


def is_grad_enabled() -> bool:
    """Return whether ops on Tensors that require grad are being recorded.

    >>> with no_grad():
    ...     is_grad_enabled()
    False
    """
    return _grad_enabled.get()


#: The same for ops, which ask so often that a call of a Python function counts.
grad_enabled = _grad_enabled.get


class _GradMode:
    """Set grad mode for a `with` block, a decorated function or a decorated generator's steps.

    The former value is restored by value, not by a context-variable token: a generator may be
    closed in another context than it was opened in, where a token would be refused. Threads that
    share an instance each restore their own.
    """

    enabled: ClassVar[bool]

    def __init__(self) -> None:
        self._before: dict[int, list[bool]] = {}

    def __enter__(self) -> None:
        self._before.setdefault(get_ident(), []).append(_grad_enabled.get())
        _grad_enabled.set(self.enabled)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        before = self._before.get(get_ident())
        if before:  # not so where a generator is closed in a thread that it was not opened in
            _grad_enabled.set(before.pop())

    def __call__(self, function: F) -> F:
        mode = type(self)
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return _stepwise(mode, function(*args, **kwargs))

        elif inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return _stepwise_async(mode, function(*args, **kwargs))

        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with mode():
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with mode():
                    return function(*args, **kwargs)

        return wrapper  # pyrefly: ignore


def _stepwise(mode: type[_GradMode], generator: Any) -> Any:
    """Run each step of `generator` under `mode`, and its caller's code between steps as it was."""
    step, value = generator.send, None
    while True:
        try:
            with mode():
                result = step(value)
        except StopIteration as stop:
            return stop.value
        try:
            step, value = generator.send, (yield result)
        except GeneratorExit:
            with mode():
                generator.close()
            raise
        except BaseException as error:
            step, value = generator.throw, error


async def _stepwise_async(mode: type[_GradMode], generator: Any) -> Any:
    """Do for an asynchronous generator what `_stepwise` does for a generator."""
    step, value = generator.asend, None
    while True:
        try:
            with mode():
                result = await step(value)
        except StopAsyncIteration:
            return
        try:
            step, value = generator.asend, (yield result)
        except GeneratorExit:
            with mode():
                await generator.aclose()
            raise
        except BaseException as error:
            step, value = generator.athrow, error


class no_grad(_GradMode):  # noqa: N801  (a context manager, named as users know it)
    """Return a context manager and decorator under which nothing is recorded.

    >>> import tinygrad_bn as tg
    >>> x = tg.tensor([1.0], requires_grad=True)
    >>> with tg.no_grad():
    ...     (x * 2).requires_grad
    False
    """

    enabled = False


class enable_grad(_GradMode):  # noqa: N801
    """Return a context manager and decorator under which ops are recorded, also inside `no_grad`.

    >>> import tinygrad_bn as tg
    >>> x = tg.tensor([1.0], requires_grad=True)
    >>> with tg.no_grad(), tg.enable_grad():
    ...     (x * 2).requires_grad
    True
    """

    enabled = True
