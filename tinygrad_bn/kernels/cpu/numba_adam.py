"""Adam and AdamW in one compiled pass over each parameter: see `updates`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import compiled
from tinygrad_bn.kernels.cpu.updates import Array, in_pieces, serves


def served(p: Array, *others: Array) -> bool:
    """Return whether `step` updates a parameter `p`, given its gradient and its averages."""
    return serves(adapt, p, others)


def step(
    parameters: Sequence[Sequence[Array]],
    rate: float,
    root: float,
    shrink: float,
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """Update parameters in place, and their averages.

    parameters: (p, g, average of g, average of g²) of each, all of one dtype.
    rate, root, shrink: -lr / (1 - β₁ᵗ), √(1 - β₂ᵗ), and what p is first multiplied by.
    decay: what of p is added to g.
    """
    loop = adapt.of(parameters[0][0].dtype)
    numbers = (rate, root, shrink, 1 - betas[0], betas[1], 1 - betas[1], eps, decay)
    for arrays in parameters:
        in_pieces(lambda *flat: loop(*flat, *numbers), arrays)


@compiled(
    "out T[:], T[:], out T[:], out T[:], T, T, T, T, T, T, T, T",
    each_rounded=True,
)
def adapt(
    p: Any, g: Any, mean: Any, square: Any,
    rate: Any, root: Any, shrink: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, decay: Any,
) -> None:  # fmt: skip
    """Move the averages towards g and g², and p against their quotient; rest: 1 - β."""
    for i in range(len(p)):
        # A product by 1 is exact.
        value = p[i] * shrink
        slope = g[i]
        if decay != 0:
            slope = slope + decay * value
        m = mean[i] + (slope - mean[i]) * rest1
        v = square[i] * beta2 + slope * slope * rest2
        mean[i], square[i] = m, v
        p[i] = value + m / (np.sqrt(v) / root + eps) * rate
