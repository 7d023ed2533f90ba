"""What a failed comparison means: which coordinate, and what kind of mistake it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tinygrad_bn.testing.errors import Inconclusive
from tinygrad_bn.testing.probe import Probe
from tinygrad_bn.testing.report import Comparison


def explain(check: str, probe: Probe, i: int, comparison: Comparison) -> str:
    """Return the message for a comparison that failed."""
    problem = probe.problem
    # Two, whatever the check made do with: a pattern must explain more than one number.
    directions = [probe.direction(i, k) for k in range(2)]
    over = comparison.error / comparison.tolerance.total if comparison.tolerance.total else np.inf
    lines = [
        f"{check}: {problem.name}: the derivative for {problem.names[i]} is wrong",
        f"  along {comparison.direction}: analytic {comparison.analytic:.9g}, numeric "
        f"{comparison.numeric:.9g}, difference {comparison.error:.3g}: {over:.2g} times the "
        "tolerance",
        f"  tolerance {comparison.tolerance}; resolution {comparison.resolution:.1e}",
    ]
    for extra in (_coordinate(probe, i, directions[0]), _pattern(probe, i, directions)):
        if extra:
            lines.append(f"  {extra}")
    lines.append(_reproduce(check, probe))
    return "\n".join(lines)


def _coordinate(probe: Probe, i: int, direction: np.ndarray) -> str:
    """Return the entry with a large error, found by halving: log2(size) differences."""
    if not np.all(np.isfinite(probe.gradients[i])):
        index = tuple(int(k) for k in np.argwhere(~np.isfinite(probe.gradients[i]))[0])
        return f"the analytic gradient is {probe.gradients[i][index]} at {list(index)}"
    candidates = np.arange(direction.size)
    error = None
    try:
        while candidates.size > 1:
            half = candidates[: candidates.size // 2]
            mine = _error(probe, i, direction, half)
            if error is None:
                error = _error(probe, i, direction, candidates)
            # Derivatives add up, so the other half has the rest of the error.
            rest = error - mine
            candidates, error = (
                (half, mine)
                if abs(mine) >= abs(rest)
                else (
                    candidates[candidates.size // 2 :],
                    rest,
                )
            )
        found = probe.along(i, _only(direction, candidates), "one coordinate")
    except Inconclusive:
        return ""
    index = tuple(int(k) for k in np.unravel_index(candidates[0], direction.shape))
    d = direction[index]
    return f"at {list(index)}: analytic {found.analytic / d:.9g}, numeric {found.numeric / d:.9g}"


def _error(probe: Probe, i: int, direction: np.ndarray, flat: np.ndarray) -> float:
    found = probe.along(i, _only(direction, flat), "part")
    return found.numeric - found.analytic


def _only(direction: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Return `direction` with all but the entries at the flat indices set to 0."""
    part = np.zeros(direction.size)
    part[flat] = direction.reshape(-1)[flat]
    return part.reshape(direction.shape)


def _pattern(probe: Probe, i: int, directions: Sequence[np.ndarray]) -> str:
    """Return the kind of mistake that would explain the error along all directions, or ""."""
    gradient = probe.gradients[i]
    if not np.all(np.isfinite(gradient)):
        return ""
    try:
        found = [probe.along(i, d, "") for d in directions]
    except Inconclusive:
        return ""
    size = max(c.size for c in found)

    def explains(candidate: np.ndarray) -> bool:
        # 1e-6 of the size: far above the noise of the difference, far below a chance agreement.
        return all(
            abs(float(np.vdot(np.ascontiguousarray(candidate), d)) - c.numeric) <= 1e-6 * size
            for d, c in zip(directions, found, strict=True)
        )

    if not gradient.any():
        return "it looks like a gradient that is zero or was never propagated"
    if explains(np.zeros_like(gradient)):
        return "it looks as if the function did not depend on this input at all"
    if explains(-gradient):
        return "it looks like a wrong sign"
    ratios = [c.numeric / c.analytic for c in found if c.analytic]
    wrong = ratios and not explains(gradient)
    if wrong and explains(ratios[0] * gradient) and len(directions) > 1:
        return f"it looks like a missing factor {_as_fraction(ratios[0])}"
    if gradient.ndim > 1:
        turned = gradient.transpose()
        if turned.shape == gradient.shape and explains(turned):
            return "it looks transposed"
        if explains(turned.reshape(gradient.shape)):
            return "it looks transposed (and reshaped to fit)"
    if explains(gradient - gradient.mean()):
        return "it looks like a missing mean term: gradient - mean(gradient) would be right"
    return ""


def _as_fraction(ratio: float) -> str:
    """Return a ratio, with the small fraction that it is, such as m/(m - 1).

    >>> _as_fraction(24 / 23)
    '1.04347826 (24/23)'
    """
    near = Fraction(ratio).limit_denominator(4096)
    close = abs(float(near) - ratio) <= 1e-9 * abs(ratio)
    text = f"{ratio:.9g}"
    return f"{text} ({near})" if close and near.denominator > 1 else text


def _as_code(array: Any) -> str:
    return " ".join(repr(array).replace("array", "np.array").split())


def _reproduce(check: str, probe: Probe) -> str:
    inputs: list[Any] = probe.problem.inputs[: getattr(probe.problem, "count", None)]
    size = sum(a.size for a in inputs if a is not None)
    shapes = ", ".join("None" if a is None else f"{a.dtype}{list(a.shape)}" for a in inputs)
    lines = [f"  inputs: {shapes}; seed={probe.seed}"]
    if size <= 64:
        with np.printoptions(precision=17, floatmode="maxprec", threshold=100):
            values = ", ".join(map(_as_code, inputs))
        lines.append(f"  reproduce: {check}(fn, {values}, seed={probe.seed})")
    return "\n".join(lines)
