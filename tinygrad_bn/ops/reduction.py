"""Ops that reduce axes: `sum`, `mean`, `max`, `min`, `var`, `argmax`.

`axis` is None (all), an integer or a tuple; `keepdims` leaves reduced axes with size 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinygrad_bn.backend import accumulation_dtype, array_module, is_floating, sum_dtype
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.shape import broadcast_to

Axis = int | tuple[int, ...] | None

_CASES = (
    case((3, 4)),
    case((3, 4), axis=0),
    case((2, 3, 4), axis=(0, 2)),
    case((2, 3, 4), axis=-1, keepdims=True),
    case((2, 1, 3), axis=(0, 1), keepdims=True),
    case((5,), axis=0),
    case(()),
)


def reduced_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Return `axis` as a sorted tuple of non-negative axes; ValueError if one is out of range."""
    axes = range(ndim) if axis is None else axis if isinstance(axis, (tuple, list)) else (axis,)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis {axis} is out of range for an array of {ndim} dimensions")
    return tuple(sorted({a % ndim for a in axes}))


def kept_shape(shape: Sequence[int], axis: Axis) -> tuple[int, ...]:
    """Return `shape` with the reduced axes set to 1, as `keepdims=True` would leave it."""
    axes = reduced_axes(axis, len(shape))
    return tuple(1 if i in axes else size for i, size in enumerate(shape))


def count(shape: Sequence[int], axis: Axis) -> int:
    """Return how many entries a reduction of `shape` over `axis` takes together."""
    return math.prod(shape[a] for a in reduced_axes(axis, len(shape)))


def _expanded(reduced: Any, shape: Sequence[int], axis: Axis) -> Any:
    """Return a reduction's result or cotangent with its reduced axes back, of size 1."""
    return reduced.reshape(kept_shape(shape, axis))


def _total(x: Any, axis: Axis, keepdims: bool) -> Any:
    """Return the sum of x, in float64 where x's own dtype would lose digits or overflow."""
    return x.sum(axis=axis, keepdims=keepdims, dtype=sum_dtype(x, reduced_axes(axis, x.ndim)))


def _divided(x: Any, n: float, dtype: Any) -> Any:
    """Return x / n in `dtype`, which need not be able to hold n."""
    return (x.astype(accumulation_dtype(dtype)) / n).astype(dtype)


@op(domain=Domain((Real(),), _CASES))
def sum(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Return the sum of x over `axis`, in the dtype of x; floats are accumulated as by `_total`."""
    total = _total(x, axis, keepdims)
    return total.astype(x.dtype) if is_floating(x.dtype) else total


@sum.def_vjp
def _(g: Any, x_shape: tuple[int, ...], axis: Axis) -> Any:
    return (broadcast_to(_expanded(g, x_shape, axis), shape=x_shape),)


@op(domain=Domain((Real(),), _CASES))
def mean(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Return the mean of x over `axis`, in the dtype of x (floats as in `sum`)."""
    if not is_floating(x.dtype):
        return x.mean(axis=axis, keepdims=keepdims)
    return _divided(_total(x, axis, keepdims), count(x.shape, axis), x.dtype)


@mean.def_vjp
def _(g: Any, x_shape: tuple[int, ...], axis: Axis) -> Any:
    g = _divided(g, count(x_shape, axis), g.dtype)
    return (broadcast_to(_expanded(g, x_shape, axis), shape=x_shape),)


@op(domain=Domain((Real(),), _CASES, distinct=True))
def max(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Return the largest entry over `axis`; equal entries share the cotangent, NaN passes on."""
    return x.max(axis=axis, keepdims=keepdims)


@op(domain=Domain((Real(),), _CASES, distinct=True))
def min(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Return the smallest entry over `axis`; equal entries share the cotangent, NaN passes on."""
    return x.min(axis=axis, keepdims=keepdims)


def _extremum_vjp(g: Any, out: Any, x: Any, axis: Axis) -> Any:
    chosen = (x == _expanded(out, x.shape, axis)).astype(g.dtype)
    shares = chosen / chosen.sum(axis=axis, keepdims=True)
    return (shares * _expanded(g, x.shape, axis),)


max.def_vjp(_extremum_vjp)
min.def_vjp(_extremum_vjp)


@op(
    domain=Domain(
        (Real(),),
        (
            case((3, 4)),
            case((4, 3), axis=0, correction=1),
            case((2, 3, 4), axis=(0, 2), keepdims=True),
            case((5,), axis=-1),
        ),
    )
)
def var(x: Any, *, axis: Axis = None, correction: float = 0, keepdims: bool = False) -> Any:
    """Return the variance of x over `axis`: Σ(x - mean)² / (n - correction), in two passes.

    Floats are computed in float64 (or wider) and rounded once, to the dtype of x.
    """
    dtype = x.dtype
    x = x.astype(accumulation_dtype(dtype)) if is_floating(dtype) else x
    centred = x - x.mean(axis=axis, keepdims=True)
    total = (centred * centred).sum(axis=axis, keepdims=keepdims)
    out = total / (count(x.shape, axis) - correction)
    return out.astype(dtype) if is_floating(dtype) else out


@var.def_vjp
def _(g: Any, x: Any, axis: Axis, correction: float) -> Any:
    # 2 g (x - mean) / (n - correction); the engine casts it back
    wide = accumulation_dtype(x.dtype)
    x, g = x.astype(wide), g.astype(wide)
    centred = x - x.mean(axis=axis, keepdims=True)
    scale = 2.0 / (count(x.shape, axis) - correction)
    return (_expanded(g, x.shape, axis) * scale * centred,)


@op(differentiable=False)
def argmax(x: Any, *, axis: int | None = None, keepdims: bool = False) -> Any:
    """Return the index of the largest entry (the first of equals)."""
    return array_module(x).argmax(x, axis=axis, keepdims=keepdims)
