"""What a checker raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class GradCheckError(AssertionError):
    """A checker found a function wrong; the message says where, by how much and what to try.

    check: the name of the check that failed, where one of several was run (`verify`); else None.
    examples: how many examples had been tried by then, this one included.
    seed: with which the same examples are drawn again.
    inputs: the raw arrays at which a gradient was found wrong.

    >>> issubclass(GradCheckError, AssertionError)
    True
    """

    check: str | None = None
    examples: int | None = None
    seed: int | None = None
    inputs: tuple[Any, ...] = ()


class Inconclusive(GradCheckError):  # noqa: N818  (a verdict, not always an error)
    """A checker could not tell right from wrong at these inputs: a kink, or too much noise.

    It is an error because a check that sees nothing must not pass. Tests that draw their inputs
    reject such a draw and go on; a function for which every draw is rejected then fails.

    >>> issubclass(Inconclusive, GradCheckError)
    True
    """


class BlindCheckWarning(UserWarning):
    """A check was asked for that cannot see certain faults, as with a constant cotangent."""


_by_chance: ContextVar[bool] = ContextVar("tinygrad_bn_blind_by_chance", default=False)

#: Whether a check that is blind is so by chance, inside of `blind_by_chance`.
is_by_chance = _by_chance.get


@contextmanager
def blind_by_chance() -> Iterator[None]:
    """Give no `BlindCheckWarning` inside: a drawn output may be proportional to its cotangent.

    (`warnings.catch_warnings` is one for all threads: of two that are in it at once, the one that
    leaves last brings back the filters that the other had set.)
    """
    token = _by_chance.set(True)
    try:
        yield
    finally:
        _by_chance.reset(token)
