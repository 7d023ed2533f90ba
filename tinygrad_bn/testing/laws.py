"""Laws: equations that hold for any right implementation, whatever its inputs.

A law needs no reference, so it also sees what a reference and the implementation might share. The
laws of batch norm are data: a formula in words and a function that computes both of its sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinygrad_bn.testing.cotangents import signed_uniform
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.report import Report

#: The two sides of an equation, and the scale of the terms that they are sums of.
Sides = tuple[Any, Any, Any]

#: Roundings that a side may differ by, in units of its dtype, of its scale: sums over a channel,
#: in any order, of terms with a few roundings each. Mistakes are larger by orders of magnitude.
ROUNDINGS = 256.0


def assert_law(
    left: Any, right: Any, *, scale: Any = None, roundings: float = ROUNDINGS, law: str = "the law"
) -> Report:
    """Return a report that `left` equals `right` up to rounding: |left - right| <= r ε scale.

    scale: the size of the terms that the sides are sums of, broadcastable; None is the larger side.
        What cancels leaves the rounding of its terms behind, so the sides themselves may be far
        too small a scale.
    roundings: r; 0 demands equality to the bit (NaN equals NaN).
    ε is that of the narrower dtype of the sides.

    Raises GradCheckError that names the law and the entry where it fails worst.

    >>> print(assert_law(np.sin(1.0) ** 2 + np.cos(1.0) ** 2, 1.0, law="sin² + cos² = 1"))
    assert_law(sin² + cos² = 1): passed
    """
    a, b = np.asarray(left), np.asarray(right)
    wide = np.longdouble
    epsilon = max(float(np.finfo(s.dtype).eps) if s.dtype.kind == "f" else 0.0 for s in (a, b))
    with np.errstate(all="ignore"):
        error = np.abs(a.astype(wide) - b.astype(wide))
        error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, error)
        sized = np.maximum(np.abs(a), np.abs(b)) if scale is None else np.asarray(scale)
        allowed = roundings * epsilon * sized.astype(wide)
    bad = ~((error == 0) | (error <= allowed))
    if bad.any():
        over = np.broadcast_to(np.where(bad, error - allowed, -np.inf), error.shape)
        at = np.unravel_index(int(np.argmax(np.nan_to_num(over, nan=np.inf))), error.shape)
        one, other, apart, most = (
            float(np.broadcast_to(v, error.shape)[at]) for v in (a, b, error, allowed)
        )
        raise GradCheckError(
            f"{law} does not hold at {[int(k) for k in at]}: {one:.17g} on the left, "
            f"{other:.17g} on the right; they differ by {apart:.2g} and may by {most:.2g} "
            f"({roundings:g} roundings of the terms)"
        )
    return Report("assert_law", law)


@dataclass(frozen=True)
class Law:
    """An equation about a function.

    name, formula: what is shown when it fails.
    sides: (subject, inputs) -> pairs of sides, each with its scale. The subject is the function
        under test (for the laws of batch norm, a `BatchNormRun`).
    roundings: as in `assert_law`; 0 for what holds to the bit.

    >>> from tinygrad_bn import testing
    >>> def sides(fn, x):
    ...     yield fn(-x), -fn(x), None
    >>> print(testing.Law("odd", "f(-x) = -f(x)", sides).check(np.tanh, np.ones(3)))
    assert_law(odd): passed
    """

    name: str
    formula: str
    sides: Callable[..., Iterable[Sides]]
    roundings: float = ROUNDINGS

    def check(self, subject: Any, *inputs: Any, roundings: float | None = None) -> Report:
        """Return a report that the law holds at `inputs`; raise GradCheckError where it does not.

        roundings: overrides the law's own.
        """
        for left, right, scale in self.sides(subject, *inputs):
            assert_law(
                left,
                right,
                scale=scale,
                roundings=self.roundings if roundings is None else roundings,
                law=f"{self.name} ({self.formula})",
            )
        return Report("assert_law", self.name)


#: (x, weight, bias, cotangent, eps, axis) -> (y, gx, gweight, gbias), all raw; weight and bias are
#: arrays. In evaluation the statistics are fixed beforehand.
BatchNormRun = Callable[..., tuple[Any, Any, Any, Any]]


class _Channels:
    """Sums over channels, and the right scales, for the batch at hand."""

    def __init__(self, d: Any):
        self.others = d.reduced_axes
        self.shape = tuple(n if a == d.axis % d.x.ndim else 1 for a, n in enumerate(d.x.shape))
        x = d.x.astype(np.longdouble)
        self.var = x.var(self.others)
        self.s = 1 / np.sqrt(self.var + d.eps)
        self.x_hat = (x - x.mean(self.others, keepdims=True)) * self.along(self.s)
        self.gamma = np.abs(d.weight)
        g = np.abs(d.cotangent)
        self.y = self.along(self.gamma * np.abs(self.x_hat).max(self.others) + np.abs(d.bias))
        # Per channel: gx is a difference of terms of the size of g and x̂ Σ g x̂ / m.
        self.gx = self.along(self.gamma * self.s) * g.max() * (2 + np.abs(self.x_hat))
        self.gweight = (g * np.abs(self.x_hat)).sum(self.others)
        self.gbias = g.sum(self.others)

    def along(self, vector: Any) -> Any:
        return np.asarray(vector).reshape(self.shape)

    def sum(self, x: Any) -> Any:
        return x.sum(axis=self.others)


def _call(run: BatchNormRun, d: Any) -> tuple[Any, Any, Any, Any]:
    return run(d.x, d.weight, d.bias, d.cotangent, d.eps, d.axis)


def _sum_is_zero(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    yield c.sum(_call(run, d)[1]), np.zeros(d.channels), c.sum(np.abs(c.gx))


def _component_along_x_hat(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    _, gx, gweight, _ = _call(run, d)
    right = d.weight * c.s * gweight * (d.eps / (c.var + d.eps))
    yield c.sum(gx * c.x_hat), right.astype(float), c.sum(np.abs(c.gx * c.x_hat)) * 2


def _self_adjoint(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    u = _other(d.cotangent)
    gv = _call(run, d)[1]
    gu = _call(run, replace(d, cotangent=u))[1]
    yield c.sum(u * gv), c.sum(d.cotangent * gu), c.sum(np.abs(c.gx)) * np.abs(u).max() * 2


def _power_of_two(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    y, gx, gweight, gbias = _call(run, d)
    for k in (3, -5):
        other = _call(run, replace(d, x=d.x * 2.0**k, eps=d.eps * 4.0**k))
        yield other[0], y, c.y
        yield other[1] * 2.0**k, gx, c.gx
        yield other[2], gweight, c.gweight
        yield other[3], gbias, c.gbias


def _negation(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    d = replace(d, bias=np.zeros_like(d.bias))
    y, gx, gweight, _ = _call(run, d)
    other = _call(run, replace(d, x=-d.x, cotangent=-d.cotangent))
    yield other[0], -y, c.y
    yield other[1], -gx, c.gx
    yield other[2], gweight, c.gweight


def _linear(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    _, gx, gweight, gbias = _call(run, d)
    doubled = _call(run, replace(d, cotangent=d.cotangent * 4.0))
    scales = (c.gx, c.gweight, c.gbias)
    for a, b, scale in zip(doubled[1:], (gx, gweight, gbias), scales, strict=True):
        yield a, b * 4.0, 4 * scale
    weighted = _call(run, replace(d, weight=d.weight * 0.5))
    yield weighted[1], gx * 0.5, c.gx
    yield weighted[2], gweight, c.gweight


def _shift(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    # A power of two far above x: adding it rounds, so the rounded batch is shifted back and forth.
    offset = 2.0 ** (np.ceil(np.log2(np.abs(d.x).max() + 1e-300)) + 20)
    far = d.x + offset
    near = replace(d, x=far - offset)  # exact
    c = _Channels(near)
    y, gx, gweight, gbias = _call(run, near)
    moved = _call(run, replace(d, x=far))
    # Rounding the mean to the dtype costs its share of the spread, which is what 2²⁰ ε is for.
    loss = 2.0**20 * (1 + np.abs(d.x).max() * np.max(c.s))
    yield moved[0], y, c.y * loss + c.along(c.gamma) * loss
    yield moved[1], gx, c.gx * loss
    yield moved[2], gweight, c.gbias * loss
    yield moved[3], gbias, c.gbias


def _permutation(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    first = d.reduced_axes[0]
    order = np.random.default_rng(0).permutation(d.x.shape[first])
    y, gx, gweight, gbias = _call(run, d)
    other = _call(
        run, replace(d, x=d.x.take(order, first), cotangent=d.cotangent.take(order, first))
    )
    wide = np.broadcast_to(c.gx, d.x.shape).take(order, first)
    yield other[0], y.take(order, first), c.y
    yield other[1], gx.take(order, first), wide
    yield other[2], gweight, c.gweight
    yield other[3], gbias, c.gbias


def _duplication(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    first = d.reduced_axes[0]
    y, gx, gweight, gbias = _call(run, d)
    twice = replace(
        d,
        x=np.concatenate([d.x, d.x], first),
        cotangent=np.concatenate([d.cotangent, d.cotangent], first),
    )
    other = _call(run, twice)
    kept = range(d.x.shape[first])
    yield other[0].take(kept, first), y, c.y
    yield other[1].take(kept, first), gx, c.gx
    yield other[2], 2 * gweight, 2 * c.gweight
    yield other[3], 2 * gbias, 2 * c.gbias


def _channels_apart(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    x, g = d.x.copy(), d.cotangent.copy()
    np.moveaxis(x, d.axis, 0)[-1] *= -3.0
    np.moveaxis(g, d.axis, 0)[-1] += 1.0
    mine, other = _call(run, d), _call(run, replace(d, x=x, cotangent=g))
    scales = (c.y, c.gx, c.gweight, c.gbias)
    for a, b, scale in zip(other, mine, scales, strict=True):
        axis = d.axis if a.ndim > 1 else 0
        kept = range(d.channels - 1)
        wide = np.broadcast_to(scale, a.shape)
        yield a.take(kept, axis), b.take(kept, axis), wide.take(kept, axis)


def _euler(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    y, _, gweight, gbias = _call(run, d)
    scale = c.gamma * c.gweight + np.abs(d.bias) * c.gbias
    yield c.sum(d.cotangent * y), d.weight * gweight + d.bias * gbias, scale


def _moments(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    c = _Channels(d)
    plain = replace(d, weight=np.ones_like(d.weight), bias=np.zeros_like(d.bias))
    y = _call(run, plain)[0]
    size = np.abs(c.x_hat)
    yield c.sum(y) / d.count, np.zeros(d.channels), size.mean(c.others)
    yield c.sum(y * y) / d.count, (c.var / (c.var + d.eps)).astype(float), (size**2).mean(c.others)


def _other(cotangent: np.ndarray) -> np.ndarray:
    """Return a second cotangent, unrelated to the first but fixed by its shape."""
    rng = np.random.default_rng(cotangent.shape)
    return signed_uniform(rng, 0.5, 1.5, cotangent.shape)


#: Laws of batch norm in training: s = 1/√(v + ε), m values per channel, G(g) = gx.
TRAINING_LAWS = (
    Law("sum of gx", "Σ gx = 0 in every channel", _sum_is_zero),
    Law("component along x̂", "⟨gx, x̂⟩ = γ s ⟨g, x̂⟩ ε/(v+ε)", _component_along_x_hat),
    Law("self-adjoint", "⟨u, G(v)⟩ = ⟨v, G(u)⟩", _self_adjoint),
    Law("power of two", "BN(2ᵏx; 4ᵏε) = BN(x; ε), gx scaled by 2⁻ᵏ", _power_of_two, 0),
    Law("negation", "BN(-x) = -BN(x) where β = 0", _negation, 0),
    Law("linear in g and γ", "G(4g) = 4 G(g); γ/2 halves gx", _linear, 0),
    Law("shift", "BN(x + c) = BN(x)", _shift),
    Law("permutation", "BN(Px) = P BN(x) for a permuted batch", _permutation),
    Law("duplication", "a batch given twice leaves y and gx, doubles gγ and gβ", _duplication),
    Law("channels apart", "no channel sees another", _channels_apart, 0),
    Law("Euler", "⟨g, y⟩ = γ gγ + β gβ", _euler),
    Law("moments", "mean x̂ = 0, mean x̂² = v/(v+ε)", _moments),
)


def _samples_apart(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    axis = d.reduced_axes[0]
    y, gx, *_ = _call(run, d)
    one = replace(d, x=d.x.take([0], axis), cotangent=d.cotangent.take([0], axis))
    alone = _call(run, one)
    for a, b in ((alone[0], y.take([0], axis)), (alone[1], gx.take([0], axis))):
        yield a, b, np.abs(b)


def _affine(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    z = _other(d.x) * np.abs(d.x).max()
    middle = _call(run, replace(d, x=(d.x + z) / 2))
    here, there = _call(run, d), _call(run, replace(d, x=z))
    # The terms of the sum are γ s x and the constant, which is y at x = 0.
    constant = np.abs(_call(run, replace(d, x=np.zeros_like(d.x)))[0])
    slope = np.abs(here[1]).max() / np.abs(d.cotangent).min()
    yield middle[0], (here[0] + there[0]) / 2, constant + slope * np.abs(d.x).max() * 2
    yield middle[1], here[1], np.abs(here[1])


def _euler_given(run: BatchNormRun, d: Any) -> Iterator[Sides]:
    others = d.reduced_axes
    y, _, gweight, gbias = _call(run, d)
    g = np.abs(d.cotangent)
    shape = _Channels(d).shape
    bias = np.abs(d.bias).reshape(shape)
    scale = (g * (np.abs(y) + 2 * bias)).sum(others)
    yield (d.cotangent * y).sum(others), d.weight * gweight + d.bias * gbias, scale


#: Laws of batch norm in evaluation, by given statistics.
EVALUATION_LAWS = (
    Law("samples apart", "no sample sees another", _samples_apart, 0),
    Law("affine", "BN((x + z)/2) = (BN(x) + BN(z))/2, and gx knows nothing of x", _affine),
    Law("Euler", "⟨g, y⟩ = γ gγ + β gβ", _euler_given),
)
