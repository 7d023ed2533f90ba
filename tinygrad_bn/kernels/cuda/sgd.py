"""Stochastic gradient descent on a GPU: see `optimizers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinygrad_bn.kernels.cuda import optimizers
from tinygrad_bn.kernels.cuda.optimizers import served

__all__ = ["served", "step"]


def step(
    parameters: Sequence[optimizers.Arrays],
    rate: Any,
    *,
    momentum: float,
    decay: float,
    nesterov: bool,
    fresh: bool,
) -> None:
    """Update parameters in place, and their velocities.

    parameters: (p, g) of each, or with momentum (p, g, velocity), all of one dtype.
    rate: minus the learning rate; a float, or a 0-d array of that dtype.
    fresh: whether the velocities hold nothing yet.
    """
    options = (*optimizers.number(rate), momentum, decay, int(nesterov), int(fresh))
    optimizers.run("sgd", parameters, *options)
