"""Ops that move entries without changing them: their rules move cotangents back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tinygrad_bn import backend
from tinygrad_bn.autograd import sum_to_shape
from tinygrad_bn.backend import array_module, as_dtype
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op

Shape = tuple[int, ...]


@op(view=True, domain=Domain(cases=(case((3, 4), shape=(2, 6)), case((2, 3), shape=(-1,)))))
def reshape(x: Any, *, shape: Shape) -> Any:
    """Return x with another shape of the same size, in C order; one size may be -1."""
    return x.reshape(shape)


reshape.def_vjp(x=lambda g, x_shape: g.reshape(x_shape))


@op(
    view=True,
    domain=Domain(
        cases=(case((2, 3)), case((2, 3, 4), axes=(2, 0, 1)), case((2, 3), axes=(-1, 0)))
    ),
)
def transpose(x: Any, *, axes: Sequence[int] | None = None) -> Any:
    """Return x with its axes permuted (None: reversed)."""
    return x.transpose(axes)


@transpose.def_vjp
def _(g: Any, axes: Sequence[int] | None) -> Any:
    if axes is None:
        return (g.transpose(),)
    inverse = sorted(range(len(axes)), key=lambda i: axes[i] % len(axes))
    return (g.transpose(tuple(inverse)),)


@op(
    view=True,
    domain=Domain(
        cases=(case((3, 1), shape=(2, 3, 4)), case((4,), shape=(3, 4)), case((), shape=(2,)))
    ),
)
def broadcast_to(x: Any, *, shape: Shape) -> Any:
    """Return x repeated along axes of size 1 and new leading axes: a read-only view."""
    return array_module(x).broadcast_to(x, shape)


broadcast_to.def_vjp(x=lambda g, x_shape: sum_to_shape(g, x_shape))


@op(domain=Domain(cases=(case((2, 3), (1, 3), axis=0), case((2, 1), (2, 2), (2, 3), axis=-1))))
def concatenate(*arrays: Any, axis: int = 0) -> Any:
    """Return the arrays joined along an axis that they have."""
    return array_module(*arrays).concatenate(arrays, axis=axis)


@concatenate.def_vjp
def _(g: Any, arrays_shape: tuple[Shape, ...], axis: int) -> Any:
    axis %= g.ndim
    ends = list(accumulate(shape[axis] for shape in arrays_shape))
    before = (slice(None),) * axis
    return tuple(g[(*before, slice(i, j))] for i, j in zip([0, *ends], ends, strict=False))


@op(domain=Domain(cases=(case((2, 3), (2, 3)), case((3,), (3,), (3,), axis=-1))))
def stack(*arrays: Any, axis: int = 0) -> Any:
    """Return the arrays, all of one shape, joined along a new axis."""
    return array_module(*arrays).stack(arrays, axis=axis)


@stack.def_vjp
def _(g: Any, arrays_shape: tuple[Shape, ...], axis: int) -> Any:
    before = (slice(None),) * (axis % g.ndim)
    return tuple(g[(*before, i)] for i in range(len(arrays_shape)))


@op(
    domain=Domain(
        cases=(
            case((2, 3), pad_width=((1, 0), (0, 2))),
            case((3,), pad_width=((2, 1),), value=1.5),
        )
    )
)
def pad(x: Any, *, pad_width: Sequence[tuple[int, int]], value: float = 0.0) -> Any:
    """Return x with `(before, after)` entries of `value` added along each axis."""
    return array_module(x).pad(x, pad_width, constant_values=value)


@pad.def_vjp
def _(g: Any, x_shape: Shape, pad_width: Sequence[tuple[int, int]]) -> Any:
    inner = tuple(
        slice(before, before + size) for (before, _), size in zip(pad_width, x_shape, strict=True)
    )
    return (g[inner],)


@op(domain=Domain(cases=(case((2, 3), dtype="float64"),)))
def astype(x: Any, *, dtype: Any) -> Any:
    """Return x converted to `dtype`: always a copy."""
    return x.astype(as_dtype(dtype))


astype.def_vjp(x=lambda g: g)  # the engine casts cotangents back


@op(domain=Domain(cases=(case((2, 3)),)))
def copy(x: Any) -> Any:
    """Return a copy of x, in C order."""
    return x.copy()


copy.def_vjp(x=lambda g: g)


@op(
    domain=Domain(
        (Real(),), (case((2, 3), axis=1), case((4,), axis=0), case((2, 3, 2), axis=(0, 2)))
    ),
    view=True,
)
def flip(x: Any, *, axis: int | tuple[int, ...] | None = None) -> Any:
    """Return x with the order of entries reversed along `axis` (None: along all)."""
    return array_module(x).flip(x, axis)


flip.def_vjp(x=lambda g, axis: flip(g, axis=axis))


@op(view=True, domain=Domain(cases=(case((2, 3), device="cpu"),)))
def to_device(x: Any, *, device: str) -> Any:
    """Return x on `device`."""
    return backend.to_device(x, device)


to_device.def_vjp(x=lambda g, x_device: to_device(g, device=x_device))

# --- compositions ----------------------------------------------------------------------------


def flatten(x: Any, start_axis: int = 0) -> Any:
    """Return x with its axes from `start_axis` on joined into one."""
    kept = x.shape[: start_axis % x.ndim if x.ndim else 0]
    return x.reshape((*kept, math.prod(x.shape[len(kept) :])))


def expand_dims(x: Any, axis: int) -> Any:
    """Return x with a new axis of size 1 at `axis`."""
    ndim = x.ndim + 1
    if not -ndim <= axis < ndim:
        raise ValueError(f"expand_dims: axis {axis} is out of range for {x.ndim} dimensions")
    shape = list(x.shape)
    shape.insert(axis % ndim, 1)
    return x.reshape(tuple(shape))


def squeeze(x: Any, axis: int | tuple[int, ...] | None = None) -> Any:
    """Return x without its axes of size 1: all of them, or those at `axis`."""
    given = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {a % x.ndim for a in given}
    if axis is not None and any(x.shape[a] != 1 for a in axes):
        raise ValueError(f"squeeze: the sizes of axes {sorted(axes)} of {x.shape} are not all 1")
    return x.reshape(tuple(s for i, s in enumerate(x.shape) if s != 1 or i not in axes))
