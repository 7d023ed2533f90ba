"""Batch norm in longdouble, straight from the formula, and how far a right one may be from it.

One statement of what "right" means, which `verify_batch_norm` holds every candidate to. It shares
no code with the library's own batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_bn import backend

WIDE = np.longdouble

#: The share of its scale that an error may have, besides one rounding to the output's dtype.
#: float32: the bar that the library sets itself, also where the mean is 10⁶ times the spread;
#: statistics in float32 miss it by a factor of 1000 there. float64: some thousand roundings, for
#: sums in any order; times the ratio of mean to spread, which rounding the mean costs. float16:
#: one unit in the last place, as all must be computed wider and rounded once.
_SHARE = {"float64": 2.0**-42, "float32": 1e-5, "float16": 2.0**-10}


@dataclass(frozen=True)
class Expected:
    """The right values of batch norm and the scales of their errors, all in longdouble.

    y, gx: shaped as x. gweight, gbias: (C,). mean, var: of the batch, (C,), var biased.
    scales: for each of them, what the error is measured against, broadcastable to it.
    ratio: |mean| / spread for each channel, (C,).
    """

    y: np.ndarray
    gx: np.ndarray
    gweight: np.ndarray
    gbias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    scales: dict[str, np.ndarray]
    ratio: np.ndarray
    axis: int


def _statistics(
    x: np.ndarray, p: np.ndarray, counts: np.ndarray, others: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over the axes `others`, p being the share of each value."""
    mean = (p * x).sum(others, keepdims=True)
    # Again, from the deviations: exact where all values are equal.
    mean = mean + (p * (x - mean)).sum(others, keepdims=True)
    first = np.where(counts, x, -np.inf).max(others, keepdims=True)
    constant = np.where(counts, x, np.inf).min(others, keepdims=True) == first
    mean = np.where(constant, first, mean)
    return mean, (p * (x - mean) ** 2).sum(others, keepdims=True)


def expected(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    cotangent: np.ndarray,
    *,
    eps: float,
    axis: int,
    given: tuple[np.ndarray, np.ndarray] | None = None,
    frequency: np.ndarray | None = None,
) -> Expected:
    """Return y and the gradients of Σ cotangent · y by the formula.

    given: the mean and variance to normalize by, as in evaluation; None takes the batch's.
    frequency: how often each value counts, broadcastable to x; None for once.

    y = γ (x - μ) s + β;  gγ = Σ g x̂;  gβ = Σ g;  gx = γ s (g - p Σ g - p x̂ Σ g x̂) with the share
    p = 1/m of each value, and gx = γ s g for a given mean and variance.
    """
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    along = tuple(n if a == axis % x.ndim else 1 for a, n in enumerate(x.shape))
    xw, g = x.astype(WIDE), cotangent.astype(WIDE)
    gamma = np.ones(along, WIDE) if weight is None else weight.astype(WIDE).reshape(along)
    beta = np.zeros(along, WIDE) if bias is None else bias.astype(WIDE).reshape(along)
    often = np.ones(x.shape, WIDE)
    if frequency is not None:
        often = np.broadcast_to(frequency, x.shape).astype(WIDE)
    counts = often > 0
    enough = counts.sum(others, keepdims=True) >= 2
    if frequency is not None:
        counts = counts & enough
    often = np.where(counts, often, 0)
    xw = np.where(counts, xw, 0)
    total = often.sum(others, keepdims=True)
    p = often / np.where(total > 0, total, 1)
    with np.errstate(all="ignore"):
        if given is None:
            mean, var = _statistics(xw, p, counts, others)
        else:
            mean, var = (a.astype(WIDE).reshape(along) for a in given)
        s = 1 / np.sqrt(var + WIDE(eps))
        x_hat = np.where(counts, (xw - mean) * s, 0)
        y = gamma * x_hat + beta
        gx_hat = (g * x_hat).sum(others, keepdims=True)
        g_live = np.where(counts, g, 0)
        if given is None:
            gx = gamma * s * (g_live - p * (g_live.sum(others, keepdims=True) + x_hat * gx_hat))
            gx = np.where(counts, gx, 0)
        else:
            gx = gamma * s * g
        spread = np.sqrt((p * (xw - mean) ** 2).sum(others, keepdims=True))
        ratio = np.abs(mean) / np.where(spread > 0, spread, np.inf)
        ratio = np.where(np.isfinite(ratio), ratio, 0)  # NaN and infinity excuse nothing
        scales = {
            "y": np.abs(gamma) * np.abs(x_hat).max(others, keepdims=True, initial=0) + np.abs(beta),
            "gx": np.abs(gamma) * s * np.abs(g).max(others, keepdims=True, initial=0),
            "gweight": np.abs(g * x_hat).sum(others),
            "gbias": np.abs(g).sum(others),
            # The terms of the mean, which may cancel; those of the variance cannot.
            "mean": (p * np.abs(xw)).sum(others),
            "var": var.reshape(-1),
        }
    return Expected(
        y,
        gx,
        gx_hat.reshape(-1),
        g.sum(others),
        mean.reshape(-1),
        var.reshape(-1),
        scales,
        ratio.reshape(along),
        axis,
    )


def excess(name: str, got: np.ndarray, want: Expected) -> tuple[float, str]:
    """Return the largest error of `got` over what it may be, and a description of where it is.

    name: "y", "gx", "gweight" or "gbias". NaN where a number belongs, and the reverse, is infinite.
    """
    right = getattr(want, name)
    allowed = _SHARE[got.dtype.name] * want.scales[name]
    if got.dtype == np.float64:
        allowed = allowed * (1 + (want.ratio if right.ndim > 1 else want.ratio.reshape(-1)))
    return _largest(got, right, allowed)


def statistic_excess(got: np.ndarray, right: np.ndarray, scale: np.ndarray) -> tuple[float, str]:
    """Return as `excess` does for a running statistic whose error is measured against `scale`."""
    return _largest(got, right, _SHARE[got.dtype.name] * scale)


def _largest(got: np.ndarray, right: np.ndarray, allowed: Any) -> tuple[float, str]:
    finfo = np.finfo(got.dtype)
    with np.errstate(all="ignore"):
        rounded = right.astype(got.dtype)
        # One rounding, to within a unit in the last place (of subnormals too).
        unit = backend.machine_epsilon(got.dtype) * np.abs(right) + float(finfo.smallest_subnormal)
        error = np.abs(got.astype(WIDE) - right)
        over = error / (allowed + unit)
        # Where the right value overflows the dtype, an infinity is right.
        same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        over = np.where(same, 0.0, np.where(np.isnan(over), np.inf, over)).astype(np.float64)
    if not over.size:
        return 0.0, ""
    at = np.unravel_index(int(np.argmax(over)), over.shape)
    index = [int(k) for k in at]
    return float(over[at]), f"at {index}: {float(got[at]):.9g}, expected {float(right[at]):.9g}"
