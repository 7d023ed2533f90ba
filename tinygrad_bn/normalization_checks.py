"""What is asked of the arguments of a norm before anything is computed."""

from __future__ import annotations

import operator
from typing import Any

from tinygrad_bn.backend import is_floating, placed
from tinygrad_bn.ops.batch_norm import values_per_channel
from tinygrad_bn.tape import TensorBase

Axis = int | tuple[int, ...]


def kept_axes(name: str, x: Any, axis: Axis) -> tuple[int, ...]:
    """Return the channel axes of x, sorted and non-negative; raise for an x that has none."""
    check_floating(name, x)
    if x.ndim < 2:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected at least 2 dimensions, a batch axis "
            f"and a channel axis"
        )
    axes = axis if isinstance(axis, tuple) else (axis,)
    kept = sorted({a % x.ndim for a in axes if -x.ndim <= a < x.ndim})
    if len(kept) != len(axes) or not kept:
        raise ValueError(
            f"{name}: axis {axis} does not name distinct axes of x, which has {x.ndim} dimensions"
        )
    if len(kept) == x.ndim:
        raise ValueError(f"{name}: axis {axis} keeps every axis of x; none is left to average over")
    return tuple(kept)


def check_floating(name: str, x: Any) -> None:
    """Raise TypeError unless x is an array or a Tensor of a floating dtype."""
    if not (hasattr(x, "dtype") and hasattr(x, "ndim")):
        raise TypeError(f"{name}: x is a {type(x).__name__}, expected an array or a Tensor")
    if not is_floating(x.dtype):
        raise TypeError(
            f"{name}: x is {x.dtype}, expected a floating dtype; convert it, for example with "
            f".astype('float32')"
        )


def check_vectors(name: str, vectors: dict[str, Any], axes: tuple[int, ...], x: Any) -> None:
    """Raise ValueError unless each vector has one value for every channel of x, on its device."""
    placed(name, map(raw, (x, *vectors.values())))
    channels = tuple(x.shape[a] for a in axes)
    wrong = [
        f"{what} has shape {tuple(vector.shape)}"
        for what, vector in vectors.items()
        if vector is not None and tuple(vector.shape) != channels
    ]
    if wrong:
        raise ValueError(
            f"{name}: {' and '.join(wrong)}, expected {channels}: x has shape {tuple(x.shape)} "
            f"and its channels are on axis {axes if len(axes) > 1 else axes[0]}"
        )


def checked_numbers(
    name: str, eps: float, momentum: float, correction: float
) -> tuple[float, float]:
    """Return eps and momentum as floats; raise TypeError for what is no number, ValueError for one
    that makes no sense."""
    for what, value in (("eps", eps), ("momentum", momentum), ("correction", correction)):
        if not hasattr(value, "__float__"):
            raise TypeError(f"{name}: {what} is {value!r}, expected a number")
    eps, momentum = float(eps), float(momentum)
    if not eps >= 0:
        raise ValueError(f"{name}: eps is {eps}, expected a number >= 0")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{name}: momentum is {momentum}, expected a weight of the new value in [0, 1]"
        )
    if not correction >= 0:
        raise ValueError(
            f"{name}: correction is {correction}, expected a number >= 0: the running variance "
            f"divides by m - correction (1 unbiased, 0 biased)"
        )
    return eps, momentum


def check_state(name: str, vectors: dict[str, Any]) -> None:
    """Raise unless running_mean and running_var among `vectors`, where given, can be moved."""
    for what in ("running_mean", "running_var"):
        data = raw(vectors[what])
        if data is None:
            continue
        if not is_floating(data.dtype):
            raise TypeError(
                f"{name}: {what} is {data.dtype}, expected a floating dtype, since training moves "
                f"it by fractions"
            )
        if not getattr(data.flags, "writeable", True):
            raise ValueError(
                f"{name}: {what} is read-only, and training moves it; pass a copy, or "
                f"training=False"
            )


def checked_sample(
    name: str, x: Any, axes: tuple[int, ...], mask: Any, groups: int
) -> tuple[Any, int]:
    """Return the mask as a raw array, and groups, after checking that x can be averaged so."""
    shape = tuple(x.shape)
    try:
        groups = operator.index(groups)
    except TypeError:
        raise TypeError(f"{name}: groups is {groups!r}, expected an integer") from None
    if groups < 1 or shape[0] % groups or (groups > 1 and 0 in axes):
        raise ValueError(
            f"{name}: groups={groups} does not split axis 0 of x, of shape {shape} and with its "
            f"channels on {axes}, into equal parts; choose a divisor of the batch size"
        )
    m = values_per_channel(shape, axes) // groups
    if m == 1 and mask is None and x.size:
        raise ValueError(
            f"{name}: x of shape {shape} has one value per channel"
            f"{' and group' if groups > 1 else ''} (channels on axis {axes}), whose variance is 0 "
            f"whatever it is; use a larger batch, or training=False with running statistics"
        )
    if mask is None:
        return None, groups
    mask = raw(mask)
    kind = getattr(mask, "dtype", None)
    if kind is None or not (kind.kind in "biu" or is_floating(kind)):
        raise TypeError(
            f"{name}: mask is {type(mask).__name__ if kind is None else kind}, expected an array "
            f"or a Tensor of booleans or of numbers >= 0, how often each value counts"
        )
    fits = len(mask.shape) == len(shape) and all(
        n == 1 or (n == size and i not in axes)
        for i, (n, size) in enumerate(zip(mask.shape, shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{name}: mask has shape {tuple(mask.shape)}, expected as many dimensions as x, of "
            f"shape {shape}, each of x's size or 1, and 1 along the channel axes {axes}"
        )
    return mask, groups


def raw(value: Any) -> Any:
    """Return the array of a Tensor, and anything else as it is."""
    return value.data if isinstance(value, TensorBase) else value
