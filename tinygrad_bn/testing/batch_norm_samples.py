"""Batch norm of part of a batch, or of its parts by themselves: the reference for masks and groups.

It takes the batch apart, asks `batch_norm_reference` about each part, and puts the answers
together; statements about the running statistics are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinygrad_bn.testing.batch_norm_reference import WIDE, Expected, expected, statistic_excess
from tinygrad_bn.testing.errors import GradCheckError


@dataclass(frozen=True)
class Step:
    """What running statistics step towards, in longdouble.

    mean, var: one value per channel, var corrected; the averages over the parts that have enough
        values. scales: what the errors of both are measured against.
    counted: whether there is such a part; if not, nothing moves.
    """

    mean: np.ndarray
    var: np.ndarray
    scales: tuple[np.ndarray, ...]
    counted: bool

    def require(
        self, before: Sequence[Any], after: Sequence[Any], weight_of_new: float, when: str
    ) -> None:
        """Raise GradCheckError unless mean and variance went from `before` to `after` by one step.

        weight_of_new: of the new value, in [0, 1].
        """
        w = WIDE(weight_of_new)
        named = ("running_mean", "running_var")
        news = (self.mean, self.var)
        for name, old, got, new, size in zip(named, before, after, news, self.scales, strict=True):
            if not self.counted:
                if not np.array_equal(old, got):
                    raise GradCheckError(
                        f"{name} moved {when}, from {old.tolist()} to {got.tolist()}; there were "
                        f"too few values to count"
                    )
                continue
            old = old.astype(WIDE)
            over, where = statistic_excess(got, (1 - w) * old + w * new, np.abs(old) + size)
            if not over <= 1:
                raise GradCheckError(
                    f"{name} {when} is wrong {where} (it was {old.astype(float).tolist()}, the new "
                    f"value weighs {weight_of_new})"
                )


def sampled(
    d: Any, *, frequency: np.ndarray | None = None, groups: int = 1, correction: float = 1
) -> tuple[Expected, Step]:
    """Return what batch norm in training gives, and the step of the running statistics.

    d: `BatchNormInputs`. frequency: how often each value counts: x's rank, size 1 along the
    channels. groups: into how many equal parts axis 0 is cut, each normalized by itself.
    correction: of the running variance, Σ w (x - μ)² / (Σ w - correction) for frequencies w.
    """
    rows = np.split(np.arange(d.x.shape[0]), groups)
    parts, steps = [], []
    for taken in rows:
        often = frequency
        if frequency is not None and frequency.shape[0] > 1:
            often = frequency[taken]
        x, g = d.x[taken], d.cotangent[taken]
        part = expected(x, d.weight, d.bias, g, eps=d.eps, axis=d.axis, frequency=often)
        parts.append(part)
        counting = np.ones(x.shape) if often is None else np.broadcast_to(often, x.shape)
        counting = np.moveaxis(counting, d.axis, 0)[:1].astype(WIDE)
        total = counting.sum()
        if np.count_nonzero(counting) >= 2:
            rest = total - correction if total > correction else total
            steps.append((part.mean, part.var * (total / rest), part.scales))
    zero = np.zeros(d.channels, WIDE)
    step = Step(zero, zero, (zero, zero), False)
    if steps:
        means, variances, scales = zip(*steps, strict=True)
        sizes = tuple(np.sum([s[name] for s in scales], axis=0) for name in ("mean", "var"))
        step = Step(np.mean(means, axis=0), np.mean(variances, axis=0), sizes, True)
    return _together(parts, [d.x[taken].shape for taken in rows]), step


def _together(parts: list[Expected], shapes: list[tuple[int, ...]]) -> Expected:
    """Return the answers for parts of a batch as the answer for the whole."""
    scales = {}
    for name in ("y", "gx"):
        wide = [np.broadcast_to(p.scales[name], s) for p, s in zip(parts, shapes, strict=True)]
        scales[name] = np.concatenate(wide)
    for name in ("gweight", "gbias"):
        scales[name] = np.sum([p.scales[name] for p in parts], axis=0)
    return replace(
        parts[0],
        y=np.concatenate([p.y for p in parts]),
        gx=np.concatenate([p.gx for p in parts]),
        gweight=np.sum([p.gweight for p in parts], axis=0),
        gbias=np.sum([p.gbias for p in parts], axis=0),
        scales=scales,
        ratio=np.max([p.ratio for p in parts], axis=0),
    )
