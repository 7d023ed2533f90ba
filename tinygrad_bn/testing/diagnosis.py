"""The message for a gradient that failed: where, by how much, what kind of mistake, how to see it
again."""

from __future__ import annotations

import textwrap

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.testing.errors import Inconclusive
from tinygrad_bn.testing.patterns import pattern
from tinygrad_bn.testing.probe import Probe
from tinygrad_bn.testing.report import Comparison


def explain(check: str, probe: Probe, i: int, comparison: Comparison, reproduction: str) -> str:
    """Return the message for a comparison that failed.

    It costs some log2(size) difference quotients more.
    """
    problem = probe.problem
    over = comparison.error / comparison.tolerance.total if comparison.tolerance.total else np.inf
    # Two, whatever the check made do with: a pattern must explain more than one number.
    directions = [probe.direction(i, k) for k in range(2)]
    magnified, noise = probe.conditioning(i)
    lines = [
        f"{check}: {problem.name}: the derivative for {problem.names[i]} is wrong",
        f"  along {comparison.direction}: analytic {comparison.analytic:.9g}, numeric "
        f"{comparison.numeric:.9g}, difference {comparison.error:.3g}: {over:.2g} times the "
        "tolerance",
        f"  tolerance {comparison.tolerance}; resolution {comparison.resolution:.1e}",
        f"  conditioning: what rounds the input by ε moves the result by {magnified:.2g} ε of its "
        f"size; measured noise {noise:.2g} ε",
    ]
    for extra in (_coordinate(probe, i, directions[0]), _kind(probe, i, directions)):
        if extra:
            lines.append(f"  {extra}")
    shapes = ", ".join("None" if a is None else f"{a.dtype}{list(a.shape)}" for a in problem.given)
    lines.append(f"  inputs: {shapes}; seed={probe.seed}")
    lines.append(f"  reproduce:\n{textwrap.indent(reproduction, '    ')}")
    return "\n".join(lines)


def _coordinate(probe: Probe, i: int, direction: np.ndarray) -> str:
    """Return the entry with a large error, found by halving: log2(size) differences."""
    gradient = backend.to_numpy(probe.gradients[i])
    if not np.all(np.isfinite(gradient)):
        index = tuple(int(k) for k in np.argwhere(~np.isfinite(gradient))[0])
        return f"the analytic gradient is {gradient[index]} at {list(index)}"
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
                else (candidates[candidates.size // 2 :], rest)
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


def _kind(probe: Probe, i: int, directions: list[np.ndarray]) -> str:
    """Return the kind of mistake that would explain the error along all directions, or ""."""
    gradient = backend.to_numpy(probe.gradients[i])
    if not np.all(np.isfinite(gradient)):
        return ""
    try:
        found = [probe.along(i, d, "") for d in directions]
    except Inconclusive:
        return ""
    if all(c.passed for c in found):  # wrong along other directions only
        return ""
    names = probe.problem.names
    others = [(names[k], backend.to_numpy(g)) for k, g in probe.gradients.items() if k != i]
    x = backend.to_numpy(probe.problem.inputs[i])
    numeric = [c.numeric for c in found]
    kind = pattern(gradient, x, others, directions, numeric, max(c.size for c in found))
    return f"it looks like {kind}" if kind else ""
