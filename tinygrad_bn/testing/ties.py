"""Kinks that a narrow dtype steps over: is the side of one lost in what rounds off?

Where the entries of a pool's window differ by less than a unit of float32, rounding chooses the
largest. The output hardly changes, but another entry takes the gradient, which then cannot be
compared with that in longdouble. Such inputs are told by the reference alone: while its outputs
move by no more than they may be wrong, its gradient jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tinygrad_bn.testing.cotangents import signed_uniform
from tinygrad_bn.testing.functions import is_floating

#: Random directions along which each input is moved, there and back. A tie is broken by most.
_DIRECTIONS = 3

#: Halvings of the way: what changes smoothly has gone down by 2^-24 then, a jump is what it was.
_HALVINGS = 24

#: In place of a tolerance of 0.
_LEAST = float(np.finfo(np.longdouble).tiny)

Values = Callable[[Sequence[Any]], Sequence[np.ndarray]]


def jumps_unseen(
    values: Values,
    gradient: Callable[[Sequence[Any]], np.ndarray],
    inputs: Sequence[Any],
    tolerances: Sequence[float],
    size: float,
    seed: int = 0,
) -> bool:
    """Return whether `gradient` jumps by more than `size` where `values` hardly leave those here.

    values, gradient: of a list like `inputs`, the floating ones in longdouble; lists of arrays, and
        an array. tolerances: how far each of the values may move.

    >>> def values(inputs):
    ...     return [inputs[0].max(keepdims=True)]
    >>> def gradient(inputs):
    ...     return (inputs[0] == inputs[0].max()).astype(inputs[0].dtype)
    >>> nearly = np.array([1.0, 1.0 - 1e-8, 0.5], np.longdouble)
    >>> jumps_unseen(values, gradient, [nearly], [1e-7], 0.1)
    True
    >>> jumps_unseen(values, gradient, [nearly], [1e-15], 0.1)
    False
    """
    at, here = values(inputs), gradient(inputs)
    for moved in _ways(inputs, np.random.default_rng((seed, 13))):
        far = _unseen(lambda t, moved=moved: values(moved(t)), at, tolerances)
        if _jump(lambda t, moved=moved: gradient(moved(t)), here, far, size):
            return True
    return False


def _ways(
    inputs: Sequence[Any], rng: np.random.Generator
) -> Iterator[Callable[[float], list[Any]]]:
    """Yield functions of t that return `inputs`, one of them moved by t of its largest entry."""
    for i, x in enumerate(inputs):
        if not is_floating(x) or not x.size:
            continue
        largest = float(np.abs(x).max()) or 1.0
        for _ in range(_DIRECTIONS):
            direction = signed_uniform(rng, 0.5, 1.0, x.shape) * largest
            for way in (direction, -direction):
                yield lambda t, i=i, x=x, way=way: [*inputs[:i], x + t * way, *inputs[i + 1 :]]


def _unseen(
    values: Callable[[float], Sequence[np.ndarray]],
    at: Sequence[np.ndarray],
    tolerances: Sequence[float],
) -> float:
    """Return how far one can go, at most by 1, for the values to move within their tolerances."""
    far = 1.0
    while far > 2.0**-60:
        moved = zip(values(far), at, tolerances, strict=True)
        most = max((_apart(v, w) / max(tolerance, _LEAST) for v, w, tolerance in moved), default=0)
        if most <= 1:
            return far
        # Straight there, if the values move in proportion.
        far /= 2 * min(most, 2.0**20)
    return 0.0


def _jump(
    gradient: Callable[[float], np.ndarray], here: np.ndarray, far: float, size: float
) -> bool:
    """Return whether the gradient jumps by more than `size` between 0 and `far`."""
    low, high, first, last = 0.0, far, here, gradient(far)
    for _ in range(_HALVINGS):
        if not _apart(first, last) > size:
            return False
        middle = (low + high) / 2
        half = gradient(middle)
        if _apart(first, half) > _apart(half, last):
            high, last = middle, half
        else:
            low, first = middle, half
    return _apart(first, last) > size


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    apart = np.abs(np.subtract(a, b, dtype=np.longdouble))
    return float(apart[np.isfinite(apart)].max(initial=0))
