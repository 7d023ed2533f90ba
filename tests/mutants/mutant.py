"""What a mutant is: a candidate with a fault, and how the fault is planted while it is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import tinygrad_bn.functional  # noqa: F401  (registers every op of the library)
from tests.mutants.textbook import textbook
from tests.mutants.verifiers import as_batch_norm, as_op
from tinygrad_bn.op import REGISTRY, Op


@dataclass(frozen=True)
class Mutant:
    """A wrong function.

    name: the fault, in a line.
    candidate: what is handed to the kit.
    verify: how the kit is put to work on it, one of `verifiers`.
    planted: a context in which the fault is there, for one that sits in the library's own code.
    """

    name: str
    candidate: Callable[..., Any]
    verify: Callable[[Any, int, int], None] = as_batch_norm
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


def op_mutant(name: str, fault: str, forward: Any = None, rule: Any = None, **rules: Any) -> Mutant:
    """Return a mutant of the library's op `name`: another forward, rule, or rules of some inputs.

    What is not given stays as it is, in the generic form: the kernels do not take part.
    """
    right = REGISTRY[name]
    if rule is None:
        by_input = {right.inputs[r.target]: r.function for r in right.rules if r.target is not None}
        rules = by_input | rules
        rule = None if rules else right.rules[0].function
    wrong = Op(forward or right.forward, name, right.domain, right.view)
    wrong.def_vjp(rule, **rules)
    return Mutant(f"{name}: {fault}", wrong, as_op(name))
