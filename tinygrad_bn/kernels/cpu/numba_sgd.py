"""Stochastic gradient descent in one compiled pass over each parameter: see `updates`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import compiled
from tinygrad_bn.kernels.cpu.updates import Array, in_pieces, serves


def served(p: Array, *others: Array) -> bool:
    """Return whether `step` updates a parameter `p`, given its gradient and its velocity."""
    return serves(descend, p, others)


def step(
    parameters: Sequence[Sequence[Array]],
    rate: float,
    *,
    momentum: float,
    decay: float,
    nesterov: bool,
    fresh: bool,
) -> None:
    """Update parameters in place, and their velocities.

    parameters: (p, g) of each, or with momentum (p, g, velocity), all of one dtype.
    rate: minus the learning rate. fresh: whether the velocities hold nothing yet.
    """
    loop = descend.of(parameters[0][0].dtype)
    none = np.empty(0, parameters[0][0].dtype)

    def update(p: Array, g: Array, velocity: Array = none) -> None:
        loop(p, g, velocity, rate, momentum, decay, nesterov, fresh)

    for arrays in parameters:
        in_pieces(update, arrays)


@compiled("out T[:], T[:], out T[:], T, T, T, bool, bool", each_rounded=True)
def descend(
    p: Any, g: Any, velocity: Any, rate: Any, momentum: Any, decay: Any, nesterov: Any, fresh: Any
) -> None:
    """Add `rate` times the direction to p; velocity: of p's length, or empty for no momentum."""
    moves = len(velocity) > 0
    for i in range(len(p)):
        direction = g[i]
        if decay != 0:
            direction = p[i] * decay + direction
        if moves:
            kept = direction if fresh else velocity[i] * momentum + direction
            velocity[i] = kept
            direction = direction + momentum * kept if nesterov else kept
        p[i] += direction * rate
