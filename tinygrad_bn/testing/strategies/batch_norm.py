"""Inputs for batch norm, over the whole range in which it must be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinygrad_bn import backend
from tinygrad_bn.testing.cotangents import signed_uniform
from tinygrad_bn.testing.strategies.arrays import seeds
from tinygrad_bn.testing.strategies.shown import shown_fields

Shape = tuple[int, ...]


#: Whether there is a weight, and whether there is a bias.
_VECTORS = ((True, True), (False, False), (True, False), (False, True))


@dataclass(frozen=True, repr=False)
class BatchNormInputs:
    """What `F.batch_norm` takes, and a cotangent for what it returns.

    x, cotangent: any rank from 2 to 5, C channels along `axis`.
    weight, bias: (C,), or None. running_mean, running_var: (C,).
    """

    x: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray
    running_var: np.ndarray
    training: bool
    momentum: float
    eps: float
    cotangent: np.ndarray
    axis: int

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # What Hypothesis prints by; without it a dataclass is spelt out to the last entry.
        printer.text(repr(self))

    def __repr__(self) -> str:
        return shown_fields("BatchNormInputs", vars(self))

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.x.shape[self.axis]

    @property
    def count(self) -> int:
        """The number of values per channel, m."""
        return self.x.size // self.channels

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        """The axes that the statistics are taken over."""
        return tuple(a for a in range(self.x.ndim) if a != self.axis % self.x.ndim)


@st.composite
def batch_norm_inputs(
    draw: st.DrawFn,
    *,
    shape: Shape | None = None,
    axis: int | None = None,
    dtype: Any = "float64",
    training: bool | None = None,
    affine: bool | None = None,
    max_ratio: float = 1e6,
    max_spread: float = 1e3,
    max_eps: float = 1e8,
    small: bool = False,
) -> BatchNormInputs:
    """Return a strategy for `BatchNormInputs`; what is given is fixed, the rest is drawn.

    axis: 1 or -1. affine: whether there are weight and bias; None: both, one of them, or neither.
    max_ratio: the largest |offset| / spread.
    max_spread: the largest spread of x, and one over the smallest.
    max_eps: the largest eps / variance.
    small: whether channels and spatial axes have at most two entries.

    The spread of x is 1e-3 to 1e3, its offset up to `max_ratio` spreads, each channel with its own
    within a factor of about 10; eps goes from 1e-8 to 1e8 times the variance; the weight has zeros.
    Every channel has at least three values and a variance, and no cotangent is constant. In half
    precision the spread is 0.1 to 10, the offset at most 10 spreads: more would overflow, or round
    the variance away.

    >>> from hypothesis import find
    >>> drawn = find(batch_norm_inputs(), lambda inputs: True)
    >>> drawn.x.shape, drawn.training
    ((3, 1), True)
    """
    if shape is None:
        axis = draw(st.sampled_from((1, -1))) if axis is None else axis
        shape = _draw_shape(draw, axis, 2 if small else 4)
    else:
        axis = 1 if axis is None else axis
    choices = (
        (0, 1, -1, 2, -2, 3, -3),  # log₁₀ of the spread
        (0.0, 1.0, -10.0, 1e3, -1e4, 1e6),  # offset / spread
        # eps / variance: as most people have it; far below; far above.
        (1e-5, 1e-8, 1e-3, 1.0, 1e4, 1e8),
        ("drawn", "with zeros", "zero", "one"),
        _VECTORS if affine is None else _VECTORS[:1] if affine else ((False, False),),
        (0.1, 0.0, 0.5, 1.0),
        (True, False) if training is None else (training,),
    )
    picked, seed = _pick(draw, choices)
    exponent, ratio, factor, weights, vectors, momentum, trained = picked
    if _is_half(dtype):
        # The squares of x leave the range even so, as statistics in the dtype find out.
        max_ratio, max_spread = min(max_ratio, 10.0), min(max_spread, 10.0)
    spread = min(max(10.0**exponent, 1 / max_spread), max_spread)
    ratio = math.copysign(min(abs(ratio), max_ratio), ratio)
    eps = min(factor, max_eps) * spread**2
    rng = np.random.default_rng(seed)
    return _assemble(
        rng, shape, axis, dtype, spread, ratio, eps, momentum, trained, vectors, weights
    )


def _pick(draw: st.DrawFn, choices: Sequence[tuple[Any, ...]]) -> tuple[list[Any], int]:
    """Return one of each of the choices, and a seed, all decided by a single draw.

    Four draws take as long as five forward passes of a batch norm. A byte decides each choice, and
    shrinks to 0, which is the first.
    """
    size = len(choices) + 4
    drawn = draw(st.binary(min_size=size, max_size=size))
    picked = [options[byte % len(options)] for byte, options in zip(drawn, choices, strict=False)]
    return picked, int.from_bytes(drawn[len(choices) :])


@st.composite
def degenerate_batch_norm_inputs(
    draw: st.DrawFn, *, axis: int | None = None, dtype: Any = "float64"
) -> BatchNormInputs:
    """Return a strategy for the cases that `batch_norm_inputs` leaves out.

    Constant channels (zero variance, up to 1e6 in size, 6e4 in half precision), one or two values
    per channel, constant and zero cotangents.

    >>> from hypothesis import find
    >>> find(degenerate_batch_norm_inputs(), lambda inputs: inputs.count == 1).x.shape
    (1, 1)
    """
    kind = draw(st.sampled_from(["few values", "constant channel", "constant x", "cotangent"]))
    axis = draw(st.sampled_from((1, -1))) if axis is None else axis
    shape = _draw_shape(draw, axis)
    if kind == "few values":
        channels = shape[axis]
        batch = draw(st.integers(1, 2))
        rest = [1] * (len(shape) - 2)
        shape = (batch, channels, *rest) if axis == 1 else (batch, *rest, channels)
    rng = np.random.default_rng(draw(seeds()))
    offset = draw(st.sampled_from([0.0, 1.0, -1e3, 6e4 if _is_half(dtype) else 1e6]))
    # Not so few values that their deviation cannot be normalised: that is not wanted here.
    drawn = _assemble(
        rng,
        shape,
        axis,
        dtype,
        1.0,
        offset,
        1e-5,
        0.1,
        True,
        (True, True),
        "with zeros",
        kind != "few values",
    )
    x, cotangent = drawn.x.copy(), drawn.cotangent.copy()
    # Not round in binary: the mean of equal values then needs care to be exact.
    constants = offset * rng.uniform(0.5, 1.0, drawn.channels).reshape((-1,) + (1,) * (x.ndim - 1))
    if kind == "constant channel":
        np.moveaxis(x, axis, 0)[:1] = constants[:1]
    elif kind == "constant x":
        np.moveaxis(x, axis, 0)[...] = constants
    elif kind == "cotangent":
        cotangent[...] = draw(st.sampled_from([0.0, 1.0]))
    return replace(drawn, x=x, cotangent=cotangent)


#: Shapes of thousands of values: small batches are below what fused kernels take, and their sums
#: too short for a narrow accumulator to show.
_LARGE = {
    1: ((16, 3, 12, 12), (24, 2, 10, 10), (6000, 1), (3000, 2), (8, 4, 6, 6, 4), (2, 3, 1000)),
    -1: ((16, 12, 12, 3), (2500, 2), (2, 1000, 3), (8, 6, 6, 4, 4)),
}


@st.composite
def verified_inputs(
    draw: st.DrawFn,
    *,
    axes: tuple[int, ...] = (1, -1),
    dtypes: tuple[str, ...] = ("float64", "float32", "float16"),
    degenerate: bool = False,
    large: bool = False,
    **options: Any,
) -> BatchNormInputs:
    """Return a strategy for what `verify_batch_norm` tries: any of `axes` and `dtypes`.

    degenerate: of `degenerate_batch_norm_inputs` instead. large: batches that fused kernels serve.
    options: of `batch_norm_inputs`.
    """
    axis = draw(st.sampled_from(axes))
    if degenerate:
        # Up to 1e6 in size, which float16 does not reach.
        dtype = draw(st.sampled_from(("float64", "float32")))
        return draw(degenerate_batch_norm_inputs(axis=axis, dtype=dtype))
    dtype = draw(st.sampled_from(dtypes))
    if large:
        shape = draw(st.sampled_from(_LARGE[axis]))
        options = {**options, "shape": shape}
    return draw(batch_norm_inputs(axis=axis, dtype=dtype, **options))


def _is_half(dtype: Any) -> bool:
    return backend.as_dtype(dtype).itemsize == 2


def _draw_shape(draw: st.DrawFn, axis: int, most: int = 4) -> Shape:
    """Return a shape of rank 2 to 5 with at least three values per channel."""
    channels = draw(st.integers(1, most))
    spatial = draw(st.lists(st.integers(1, most), max_size=3))
    # The batch makes up what the other axes lack to three.
    least = -(-3 // math.prod(spatial))
    batch = draw(st.integers(least, least + 4))
    return (batch, channels, *spatial) if axis == 1 else (batch, *spatial, channels)


def _assemble(
    rng: np.random.Generator,
    shape: Shape,
    axis: int,
    dtype: Any,
    spread: float,
    ratio: float,
    eps: float,
    momentum: float,
    training: bool,
    affine: tuple[bool, bool],
    weights: str,
    normalise: bool = True,
) -> BatchNormInputs:
    """Return inputs expanded from `rng`, each channel with exactly the deviation it should have."""
    ndim, channels = len(shape), shape[axis]
    others = tuple(a for a in range(ndim) if a != axis % ndim)
    kept = tuple(channels if a == axis % ndim else 1 for a in range(ndim))
    z = rng.standard_normal(shape)
    if normalise:
        z -= z.mean(others, keepdims=True)
        z /= np.sqrt(np.square(z).mean(others, keepdims=True))
    spreads = spread * 10.0 ** rng.uniform(-0.5, 0.5, kept)
    x = spreads * z + ratio * spread * rng.uniform(0.5, 1.0, kept)
    cast = backend.as_dtype(dtype)
    return BatchNormInputs(
        x=x.astype(cast, copy=False),
        weight=_weight(rng, weights, channels).astype(cast) if affine[0] else None,
        bias=rng.uniform(-2.0, 2.0, channels).astype(cast) if affine[1] else None,
        running_mean=(ratio * spread + spread * rng.uniform(-1, 1, channels)).astype(cast),
        running_var=(spread**2 * rng.uniform(0.5, 2.0, channels)).astype(cast),
        training=training,
        momentum=momentum,
        eps=float(eps),
        cotangent=signed_uniform(rng, 0.5, 1.5, shape).astype(cast, copy=False),
        axis=axis,
    )


def _weight(rng: np.random.Generator, kind: str, channels: int) -> np.ndarray:
    if kind == "drawn":
        return signed_uniform(rng, 0.5, 1.5, (channels,))
    if kind == "with zeros":
        return rng.uniform(-2.0, 2.0, channels) * (rng.random(channels) < 0.5)
    return np.full(channels, {"zero": 0.0, "one": 1.0}[kind])
