"""What a mutant is: a candidate with a fault, and how the fault is planted while it is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tests.mutants.textbook import textbook


@dataclass(frozen=True)
class Mutant:
    """A wrong function.

    name: the fault, in a line.
    candidate: what is handed to the kit.
    planted: a context in which the fault is there, for one that sits in the library's own code.
    """

    name: str
    candidate: Callable[..., Any]
    planted: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __str__(self) -> str:
        return self.name


def batch_norm_mutant(name: str, candidate: Any = None, **formulas: Any) -> Mutant:
    """Return a mutant: a candidate, or the textbook batch norm with other formulas."""
    return Mutant(name, textbook(**formulas) if candidate is None else candidate)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator for something that calls `function`, which is its first argument."""

    def decorate(outer: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return outer(function, *args, **options)

        return call

    return decorate
