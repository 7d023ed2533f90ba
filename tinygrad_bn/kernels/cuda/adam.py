"""Adam and AdamW on a GPU: see `optimizers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinygrad_bn.kernels.cuda import optimizers
from tinygrad_bn.kernels.cuda.optimizers import served

__all__ = ["served", "step"]


def step(
    parameters: Sequence[optimizers.Arrays],
    rate: Any,
    root: Any,
    shrink: Any,
    *,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> None:
    """Update parameters in place, and their averages.

    parameters: (p, g, average of g, average of g²) of each, all of one dtype.
    rate, root, shrink: -lr / (1 - β₁ᵗ), √(1 - β₂ᵗ), and what p is first multiplied by; floats, or
        0-d arrays of that dtype.
    decay: what of p is added to g.
    """
    numbers = (*optimizers.number(rate), *optimizers.number(root), *optimizers.number(shrink))
    options = (1 - betas[0], betas[1], 1 - betas[1], eps, decay)
    optimizers.run("adam", parameters, *numbers, *options)
