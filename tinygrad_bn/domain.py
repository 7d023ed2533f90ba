"""Sample domains: plain data that says on which inputs an op must be right, and its kinks.

A domain stands beside the op it describes; `testing.strategies` turns it into arrays. Nothing here
draws, computes or imports anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Real:
    """A floating input with values in [low, high], clear of every kink by a margin."""

    low: float = -2.0
    high: float = 2.0
    kinks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Integer:
    """An integer input with values in [low, high), in this dtype."""

    low: int
    high: int
    dtype: str = "int64"


@dataclass(frozen=True)
class Boolean:
    """A boolean input."""


@dataclass(frozen=True)
class Case:
    """One combination of input shapes (None: the optional input is absent) and options."""

    shapes: tuple[Shape | None, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Domain:
    """Where an op must be right.

    inputs: what each array input holds; the last entry repeats for a variadic op.
    cases: shapes and options to draw from. Empty: any shapes that broadcast together, no options.
    distinct: kinks lie where two entries (of one input or of several) are equal, as for a maximum.
    order: up to which order the derivatives are checked (1: the second is zero or undefined).
    """

    inputs: tuple[Real | Integer | Boolean, ...] = (Real(),)
    cases: tuple[Case, ...] = ()
    distinct: bool = False
    order: int = 2


def elementwise(*inputs: Real | Integer | Boolean, distinct: bool = False) -> Domain:
    """Return the domain of an op on any shapes that broadcast together."""
    return Domain(inputs=inputs or (Real(),), distinct=distinct)


def case(*shapes: Shape | None, **options: Any) -> Case:
    """Return one combination of input shapes and options.

    >>> case((2, 3), axis=0)
    Case(shapes=((2, 3),), options={'axis': 0})
    """
    return Case(shapes, options)
