"""Softmax, its logarithm, and the cross-entropy: stable for logits of any size.

All three rest on log Σ eˣ, which shifts by the largest logit before it exponentiates. A logit of
-inf is a class that cannot be: probability 0, and no gradient.
"""

from __future__ import annotations

import math
from typing import Any

from tinygrad_bn.backend import array_module, extremes, is_floating, saving
from tinygrad_bn.domain import Domain, Integer, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.convolution import working_dtype
from tinygrad_bn.ops.elementwise import exp, where
from tinygrad_bn.ops.reduction import kept_shape, reduced_axes

Axis = int | tuple[int, ...]

_LOGITS = Real(-6.0, 6.0)
_CASES = (case((3, 4)), case((2, 3, 4), axis=1), case((5,)), case((2, 3), axis=0))


def _check_axis(name: str, x: Any, axis: Axis) -> None:
    try:
        axes = reduced_axes(axis, x.ndim)
    except (TypeError, ValueError):
        axes = ()
    if not axes or any(x.shape[a] == 0 for a in axes):
        raise ValueError(
            f"{name}: axis is {axis!r} and x has shape {x.shape}; expected an axis of x that has "
            f"at least one entry, for example axis=-1"
        )


def _working(x: Any, target: Any = None) -> tuple[Any, Any]:
    """Return x in the dtype to compute in, and the dtype of the result."""
    dtype, work = working_dtype(x, target)
    if target is not None and not is_floating(target.dtype):  # one-hot rows of integers or booleans
        dtype, work = working_dtype(x)
    if not is_floating(dtype):
        dtype = work = array_module(x).result_type(dtype, float)
    return x.astype(work, copy=False), dtype


def _logsumexp(x: Any, axis: Axis) -> Any:
    """Return log Σ eˣ with the reduced axes kept; -inf where all of x is."""
    xp = array_module(x)
    top = x.max(axis=axis, keepdims=True)
    # -inf - -inf would be NaN, and so would inf - inf.
    top = xp.where(xp.abs(top) == math.inf, 0, top).astype(x.dtype, copy=False)
    total = xp.exp(x - top).sum(axis=axis, keepdims=True)
    return top + xp.where(total == 0, -math.inf, xp.log(xp.where(total == 0, 1, total)))


@op(
    domain=Domain(
        (_LOGITS,),
        (case((3, 4)), case((2, 3, 4), axis=(0, 2)), case((2, 3), axis=0, keepdims=True)),
    )
)
def logsumexp(x: Any, *, axis: Axis = -1, keepdims: bool = False) -> Any:
    """Return log Σ eˣ over `axis`, without overflow; -inf where every entry is -inf."""
    _check_axis("logsumexp", x, axis)
    x, dtype = _working(x)
    out = _logsumexp(x, axis).astype(dtype, copy=False)
    if keepdims:
        return out
    kept = set(range(x.ndim)) - set(reduced_axes(axis, x.ndim))
    return out.reshape(tuple(x.shape[a] for a in sorted(kept)))


@logsumexp.def_vjp
def _(g: Any, out: Any, x: Any, axis: Axis) -> Any:
    # g softmax(x). Where all of x is -inf there is no largest entry to move, and -inf - -inf would
    # be NaN.
    shape = kept_shape(x.shape, axis)
    out = out.reshape(shape)
    gap = x - where(out == -math.inf, 0, out)
    return (g.reshape(shape) * exp(gap),)


@op(domain=Domain((_LOGITS,), _CASES))
def softmax(x: Any, *, axis: Axis = -1) -> Any:
    """Return eˣ / Σ eˣ over `axis`, without overflow.

    An entry of -inf gives 0; NaN where every entry is -inf, since no class is left.
    """
    _check_axis("softmax", x, axis)
    x, dtype = _working(x)
    xp = array_module(x)
    powers = xp.exp(x - x.max(axis=axis, keepdims=True))
    return (powers / powers.sum(axis=axis, keepdims=True)).astype(dtype, copy=False)


@softmax.def_vjp
def _(g: Any, out: Any, axis: Axis) -> Any:
    # s (g - Σ g s)
    return (out * (g - (g * out).sum(axis=axis, keepdims=True)),)


@op(domain=Domain((_LOGITS,), _CASES))
def log_softmax(x: Any, *, axis: Axis = -1) -> Any:
    """Return x - log Σ eˣ over `axis`: the logarithm of `softmax`, accurate where that is 0."""
    _check_axis("log_softmax", x, axis)
    x, dtype = _working(x)
    return _log_softmax(x, axis).astype(dtype, copy=False)


def _log_softmax(x: Any, axis: Axis) -> Any:
    # In this order: x - (top + log Σ) would lose log Σ beside a large top.
    xp = array_module(x)
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True))


@log_softmax.def_vjp
def _(g: Any, out: Any, axis: Axis) -> Any:
    # g - softmax Σ g
    return (g - exp(out) * g.sum(axis=axis, keepdims=True),)


# --- cross-entropy -----------------------------------------------------------------------------


def _check_target(logits: Any, target: Any) -> bool:
    """Return whether `target` holds labels (True) or probabilities; ValueError if neither fits."""
    shape = logits.shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(
            f"cross_entropy: logits have shape {shape}, expected (N, classes, ...) with classes on "
            f"axis 1; for a single example add a batch axis with logits[None]"
        )
    if target.shape == shape:
        return False
    labels = (shape[0], *shape[2:])
    if target.shape != labels:
        raise ValueError(
            f"cross_entropy: target has shape {target.shape} and logits {shape}; expected integer "
            f"labels of shape {labels}, or one-hot rows or probabilities of shape {shape}"
        )
    if target.dtype.kind not in "iu":
        raise ValueError(
            f"cross_entropy: target of shape {labels} holds labels and must be of an integer "
            f"dtype, not {target.dtype}; convert it, for example with target.astype('int64')"
        )
    range_ = extremes(target)
    if range_ is not None and not 0 <= range_[0] <= range_[1] < shape[1]:
        raise ValueError(
            f"cross_entropy: labels range from {range_[0]} to {range_[1]}, but "
            f"logits of shape {shape} have the classes 0 to {shape[1] - 1}; check the labels or "
            f"the size of the last layer"
        )
    return True


@op(
    differentiable=False,
    domain=Domain((Integer(0, 3),), (case((4,), classes=3), case((2, 3), classes=3))),
)
def is_class(labels: Any, *, classes: int) -> Any:
    """Return whether each class is the label: (N, ...) -> (N, classes, ...) of booleans."""
    xp = array_module(labels)
    order = xp.arange(classes).reshape((classes, *(1,) * (labels.ndim - 1)))
    return labels[:, None] == order


_REDUCTIONS = ("mean", "sum", "none")


@op(
    domain=Domain(
        (_LOGITS, Real(0.0, 1.0)),
        (
            case((3, 4), (3, 4)),
            case((2, 3, 2), (2, 3, 2), reduction="none"),
            case((2, 3), (2, 3), reduction="sum"),
        ),
    )
)
def cross_entropy(logits: Any, target: Any, *, reduction: str = "mean") -> Any:
    """Return -Σ_c target[n, c] log softmax(logits)[n, c], averaged over all n.

    logits: (N, classes, ...). target: integer labels (N, ...), or one-hot rows or probabilities of
    the logits' shape, which may require grad; a target of 0 contributes 0 even where the class is
    impossible. reduction: "mean" (over everything but the classes), "sum" or "none". The mean over
    an empty batch is NaN. float16 is computed in float32 and rounded once.

    >>> import numpy as np
    >>> cross_entropy(np.array([[0.0, 0.0], [0.0, 1000.0]]), np.array([0, 1]))
    array(0.34657359)

    Raises ValueError for shapes that do not fit, and for labels out of range.
    """
    has_labels = _check_target(logits, target)
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"cross_entropy: unknown reduction {reduction!r}; use one of {_REDUCTIONS}"
        )
    xp = array_module(logits)
    x, dtype = _working(logits, None if has_labels else target)
    logs = _log_softmax(x, 1)
    if has_labels:
        losses = -xp.take_along_axis(logs, target[:, None], axis=1).sum(axis=1)
    else:
        # Not target * logs alone, which is NaN where a target of 0 meets a logarithm of -inf.
        losses = -(target.astype(x.dtype) * xp.where(target == 0, 0, logs)).sum(axis=1)
    return saving(_reduced(xp, losses, reduction).astype(dtype, copy=False), logs=logs)


def _reduced(xp: Any, losses: Any, reduction: str) -> Any:
    if reduction == "none":
        return losses
    total = xp.asarray(losses.sum())
    if reduction == "sum":
        return total
    return total / losses.size if losses.size else total * math.nan


@cross_entropy.def_vjp
def _(g: Any, logits: Any, target: Any, logs: Any, reduction: str, needs: Any) -> Any:
    # (softmax Σ_c t - t) g for the logits, -log softmax g for the target
    if logs is None:
        logs = log_softmax(logits, axis=1)
    shape = logits.shape
    if reduction == "mean":
        g = g / max(1, math.prod(shape) // shape[1])
    g = g.reshape((shape[0], 1, *shape[2:]) if reduction == "none" else (1,) * len(shape))
    if target.ndim < len(shape):
        probabilities = exp(logs)
        hot = is_class(target, classes=shape[1])
        return (where(hot, probabilities - 1, probabilities) * g, None)
    glogits = None
    if needs[0]:
        glogits = (exp(logs) * target.sum(axis=1, keepdims=True) - target) * g
    return (glogits, -logs * g if needs[1] else None)


cross_entropy.use_kernels(
    numpy="tinygrad_bn.kernels.cpu.numpy_cross_entropy",
    cuda="tinygrad_bn.kernels.cuda.cross_entropy",
)
