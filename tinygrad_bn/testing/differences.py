"""The derivative of a function of one variable by extrapolated central differences (Ridders 1982).

The central difference (φ(h) - φ(-h)) / 2h errs by a series in h²; a tableau of steps h, h/2, h/4,
... removes its terms one by one, and the distance between neighbours in the tableau measures what
is left. See C. Ridders, "Accurate computation of F'(x) and F'(x)F''(x)", Advances in Engineering
Software 4 (1982); Press et al., Numerical Recipes, section 5.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: How many terms of the error series are removed at most. More would combine steps so far apart
#: that rows taken across a far kink spoil the near ones.
_DEPTH = 4

#: Halvings before the search for a smooth range is given up: from the size of the input down to
#: 2^-27 of it, below which float64 has no digits left for a difference.
_LEVELS = 27

#: A truncation of 1e-8 of the derivative needs no improvement: no mistake is as small, and each
#: further halving costs two evaluations and brings the noise nearer.
_ENOUGH = 1e-8


@dataclass(frozen=True)
class Derivative:
    """φ'(0), and how far it can be trusted.

    value: the extrapolated derivative.
    truncation: its distance from its neighbours in the tableau.
    step: the smallest step that it uses.
    gain: its standard deviation if every evaluation of φ has independent noise of deviation 1.
    jump: φ'(0+) - φ'(0-), extrapolated; not zero at a kink.
    jump_truncation, jump_gain: as above, for the jump.
    """

    value: float
    truncation: float
    step: float
    gain: float
    jump: float
    jump_truncation: float
    jump_gain: float


def derivative(
    phi: Callable[[float], float],
    step: float,
    at_zero: float | None = None,
    noise: float = 0.0,
) -> Derivative:
    """Return the derivative of `phi` at 0, starting at `step` and halving it as long as that helps.

    at_zero: φ(0), if it is known already.
    noise: of φ, at least: once it outweighs the truncation, smaller steps make things worse.

    A step at which φ is not finite (outside its domain) is passed over. If no three steps give
    finite values the truncation is infinite.

    >>> d = derivative(math.exp, 0.25)
    >>> abs(d.value - 1.0) <= 4 * d.truncation + 16 * 1e-16 * d.gain
    True
    >>> derivative(abs, 0.25).jump
    2.0
    """
    centre = phi(0.0) if at_zero is None else at_zero
    best = Derivative(math.nan, math.inf, step, math.inf, 0.0, math.inf, math.inf)
    slopes: list[float] = []  # last row of the tableau of slopes
    jumps: list[float] = []  # and of one-sided differences
    worse = 0
    for _ in range(_LEVELS):
        plus, minus = phi(step), phi(-step)
        if not (math.isfinite(plus) and math.isfinite(minus)):
            slopes, jumps = [], []
            step /= 2
            continue
        before, slopes = slopes, _extended(slopes, (plus - minus) / (2 * step), _even)
        jumps_before, jumps = jumps, _extended(jumps, (plus - 2 * centre + minus) / step, _odd)
        found = _best(slopes, before)
        if improved := found is not None and found[1] < best.truncation:
            value, truncation, column = found
            jump, jump_truncation, _ = _best(jumps, jumps_before) or (0.0, math.inf, 0)
            best = Derivative(
                value,
                truncation,
                step,
                _gain(step, column),
                jump,
                jump_truncation,
                # Σ |weights| in a row of jumps is at most 3 · 9/7 · 33/31 · 129/127 < 4.2, and φ
                # counts 1 + 2 + 1 times.
                17.0 / step,
            )
        scale = abs(best.value) if math.isfinite(best.value) else 0.0
        # Weighted 4 and 16, as in the tolerance that is made of the two.
        outweighed = math.isfinite(best.gain) and best.truncation <= 4 * noise * best.gain
        if best.truncation <= _ENOUGH * scale or outweighed:
            break
        # Errors grow again once rounding wins; before the first digits have settled they may also
        # grow because the step is still too wide, so then the search goes on.
        worse = 0 if improved else worse + 1
        if worse >= 2 and best.truncation <= 1e-6 * scale:
            break
        if slopes and slopes[0] == 0.0 and best.truncation == 0.0:
            break
        step /= 2
    return best


def _best(row: list[float], before: list[float]) -> tuple[float, float, int] | None:
    """Return the entry of `row` nearest to its two neighbours: value, distance, column."""
    found = None
    for column in range(1, len(row)):
        value = row[column]
        error = max(abs(value - row[column - 1]), abs(value - before[column - 1]))
        if found is None or error < found[1]:
            found = value, error, column
    return found


def _even(column: int) -> float:
    return 4.0**column


def _odd(column: int) -> float:
    # (φ(h) - 2φ(0) + φ(-h)) / h = jump + h φ'' + h³ φ''''/12 + ...
    return 2.0 ** (2 * column - 1)


def _extended(before: list[float], first: float, ratio: Callable[[int], float]) -> list[float]:
    """Return the next row of a tableau, given the one before and the new unextrapolated value."""
    row = [first]
    for column in range(1, min(len(before), _DEPTH) + 1):
        factor = ratio(column)
        row.append((factor * row[-1] - before[column - 1]) / (factor - 1))
    return row


def _gain(step: float, column: int) -> float:
    """Return the deviation of entry `column` of the row of `step`, for unit noise in φ.

    The entry is a weighted sum of the central differences of steps h, 2h, ..., 2^column h; each of
    them has deviation 1 / (√2 step).
    """
    weights = _WEIGHTS[column]
    return math.sqrt(sum((w / 2**k) ** 2 for k, w in enumerate(weights)) / 2) / step


def _weights(column: int) -> tuple[float, ...]:
    """Return the weights of steps h, 2h, 4h, ... in the tableau's entry `column`."""
    if column == 0:
        return (1.0,)
    factor, lower = _even(column), _weights(column - 1)
    padded_near, padded_far = (*lower, 0.0), (0.0, *lower)
    return tuple(
        (factor * near - far) / (factor - 1)
        for near, far in zip(padded_near, padded_far, strict=True)
    )


_WEIGHTS = tuple(_weights(column) for column in range(_DEPTH + 1))
