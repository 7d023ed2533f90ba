"""What kind of mistake would explain a wrong gradient: a sign, a factor, a term, a transpose.

Each kind says what the gradient should have been, given the one that was found. It is named if that
agrees with the difference quotients along every direction that was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

#: Of the size of the derivative: far above the noise of the quotients, far below chance agreement.
_EXACT = 1e-6

#: For what a small eps keeps from being exact: two directions agree by chance once in 10⁸ times.
_NEARLY = 1e-4


def pattern(
    gradient: np.ndarray,
    x: np.ndarray,
    others: Sequence[tuple[str, np.ndarray]],
    directions: Sequence[np.ndarray],
    numeric: Sequence[float],
    size: float,
) -> str:
    """Return the kind of mistake in `gradient` that explains the numeric derivatives, or "".

    x: the input that it belongs to. others: the other inputs' names and gradients.
    directions, numeric: along which it was differenced, and what that gave. size: of the
    derivative that a direction typically sees.

    >>> d = [np.array([1.0, 2.0]), np.array([0.5, -1.0])]
    >>> pattern(np.array([1.0, 3.0]), np.zeros(2), [], d, [-7.0, 2.5], 3.0)
    'a wrong sign'
    """
    if not gradient.any():
        return "a gradient that is zero or was never propagated"
    for what, candidate, share in _kinds(gradient, x, others, directions[0], numeric[0]):
        if candidate.shape == gradient.shape and all(
            abs(float(np.vdot(candidate, d)) - want) <= share * size
            for d, want in zip(directions, numeric, strict=True)
        ):
            return what
    return ""


def _kinds(
    gradient: np.ndarray,
    x: np.ndarray,
    others: Sequence[tuple[str, np.ndarray]],
    direction: np.ndarray,
    numeric: float,
) -> Iterator[tuple[str, Any, float]]:
    """Yield kinds of mistakes: what to call it, the gradient without it, how near that must come.

    The simplest comes first.
    """
    yield "a gradient of something that does not depend on this input", gradient * 0, _EXACT
    yield "a wrong sign", -gradient, _EXACT
    found = float(np.vdot(gradient, direction))
    if found:
        factor = numeric / found
        yield f"a missing factor {as_fraction(factor)}", gradient * factor, _EXACT
    if gradient.ndim > 1:
        turned = np.ascontiguousarray(gradient.transpose())
        yield "a transposed gradient", turned, _EXACT
        yield "a transposed gradient, reshaped to fit", turned.reshape(gradient.shape), _EXACT
    for name, other in others:
        yield f"the gradient of {name} in its place", other, _EXACT
    axes = range(gradient.ndim)
    for over in (s for n in range(gradient.ndim, 0, -1) for s in combinations(axes, n)):
        where = f"over axes {over}" if len(over) > 1 else f"over axis {over[0]}"
        mean = gradient.mean(over, keepdims=True)
        yield f"a missing mean term: - mean(gradient) {where}", gradient - mean, _EXACT
        centred = x - x.mean(over, keepdims=True)
        square = (centred * centred).sum(over, keepdims=True)
        along = (gradient * centred).sum(over, keepdims=True) / np.where(square > 0, square, 1.0)
        part = centred * along
        frozen = f"a missing term along x - mean(x) {where}, as of a variance held constant"
        yield frozen, gradient - part, _NEARLY
        yield f"missing terms of mean and variance {where}", gradient - mean - part, _NEARLY


def as_fraction(ratio: float) -> str:
    """Return a ratio, with the small fraction that it is, such as m/(m - 1).

    >>> as_fraction(24 / 23)
    '1.04347826 (24/23: m/(m - 1) for m = 24)'
    >>> as_fraction(0.5)
    '0.5 (1/2)'
    """
    near = Fraction(ratio).limit_denominator(4096)
    close = abs(float(near) - ratio) <= 1e-9 * abs(ratio)
    text = f"{ratio:.9g}"
    if not close or near.denominator == 1:
        return text
    meaning = ""
    if near.denominator > 2 and abs(near.numerator - near.denominator) == 1:
        up = near > 1
        m = max(near.numerator, near.denominator)
        meaning = f": {'m/(m - 1)' if up else '(m - 1)/m'} for m = {m}"
    return f"{text} ({near}{meaning})"
