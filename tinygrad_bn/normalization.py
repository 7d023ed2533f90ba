"""Functional batch norm: arguments checked, the op called, running averages kept up to date.

Conventions are PyTorch's: `momentum` weights the *new* value, the running variance is the unbiased
one, and channels are on axis 1 unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Any

from tinygrad_bn.backend import is_floating
from tinygrad_bn.ops import batch_norm as _ops
from tinygrad_bn.tape import TensorBase

Axis = int | tuple[int, ...]


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: Axis = 1,
    correction: float = 1,
) -> Any:
    """Return `x` normalized per channel: weight · (x - mean) / √(var + eps) + bias.

    x: (N, C, *spatial), or any shape with its channels along `axis`; floating.
    running_mean, running_var: one value per channel, arrays or Tensors. In training they are
        updated in place: r ← (1 - momentum) · r + momentum · (statistic of the batch); otherwise
        they are what x is normalized by.
    weight, bias: one value per channel; None means 1 and 0.
    training: normalize by the statistics of this batch. Without running statistics that is done
        in any case.
    momentum: weight of the new value, in [0, 1].
    eps: added to the variance, in units of x².
    axis: the channel axis, or a tuple of axes that are kept; weight and the rest then have the
        sizes of these axes, in x's order. -1 is channels-last.
    correction: of the *running* variance, which divides by m - correction: 1 unbiased (PyTorch),
        0 biased (Keras, Flax). The batch itself is always normalized by the biased variance.

    The result has the dtype of x; statistics are computed in float64. A constant channel gives
    exactly bias. Source: Ioffe and Szegedy 2015, Algorithm 1.

    Raises ValueError for a rank below 2, vectors that do not fit the channels, and in training
    for one value per channel, whose variance says nothing; TypeError for integers.

    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> print(batch_norm(x, training=True))
    [[-1.22474258 -1.22474258]
     [ 0.          0.        ]
     [ 1.22474258  1.22474258]]
    """
    axes = kept_axes("batch_norm", x, axis)
    channels = tuple(x.shape[a] for a in axes)
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    _check_vectors(vectors, channels, axes, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: give both running_mean and running_var, or neither")
    eps, momentum = float(eps), float(momentum)
    if not eps >= 0:
        raise ValueError(f"batch_norm: eps is {eps}, expected a number >= 0")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"batch_norm: momentum is {momentum}, expected a weight of the new value in [0, 1]"
        )
    if not training and running_mean is not None:
        return _ops.batch_norm_given(x, running_mean, running_var, weight, bias, axis=axes, eps=eps)
    m = _ops.values_per_channel(x.shape, axes)
    if m == 1 and math.prod(channels) > 0:
        raise ValueError(
            f"batch_norm: x of shape {tuple(x.shape)} has one value per channel (axis {axis}), "
            f"whose variance is 0 whatever it is; use a larger batch, or training=False with "
            f"running statistics"
        )
    out, statistics = _ops.batch_norm.call_with_residuals(x, weight, bias, axis=axes, eps=eps)
    if running_mean is not None and m > 0:
        update_running(running_mean, statistics["mean"], momentum)
        corrected = m / (m - correction) if m > correction else 1.0
        update_running(running_var, statistics["var"] * corrected, momentum)
    return out


def update_running(running: Any, value: Any, momentum: float) -> None:
    """Write (1 - momentum) · running + momentum · value into `running` (array or Tensor)."""
    is_tensor = isinstance(running, TensorBase)
    data = running.data if is_tensor else running
    value = value.reshape(data.shape)
    # Written as a whole, not added to: the sum is formed in the wide dtype of `value`.
    data[...] = data + momentum * (value - data)
    if is_tensor:
        running.version[0] += 1


def batch_norm_composite(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, axis: Axis = 1
) -> Any:
    """Return what `batch_norm` in training returns, from ordinary ops: the definition.

    Arguments as in `batch_norm`. On Tensors the tape differentiates every step of it, which makes
    it the oracle for the analytic rule, at any order; it costs several times the time and memory.

    >>> import numpy as np
    >>> x = np.arange(18.0).reshape(1, 2, 3, 3)
    >>> print(batch_norm_composite(x)[0, 0])
    [[-1.54919218 -1.16189413 -0.77459609]
     [-0.38729804  0.          0.38729804]
     [ 0.77459609  1.16189413  1.54919218]]
    """
    axes = kept_axes("batch_norm_composite", x, axis)
    channels = tuple(x.shape[a] for a in axes)
    _check_vectors({"weight": weight, "bias": bias}, channels, axes, x)
    return _ops.batch_norm_composite(x, weight, bias, axis=axes, eps=float(eps))


def kept_axes(name: str, x: Any, axis: Axis) -> tuple[int, ...]:
    """Return the channel axes of x, sorted and non-negative; raise for an x that has none."""
    if not (hasattr(x, "dtype") and hasattr(x, "ndim")):
        raise TypeError(f"{name}: x is a {type(x).__name__}, expected an array or a Tensor")
    if x.ndim < 2:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}, expected at least 2 dimensions, a batch axis "
            f"and a channel axis"
        )
    if not is_floating(x.dtype):
        raise TypeError(
            f"{name}: x is {x.dtype}, expected a floating dtype; convert it, for example with "
            f".astype('float32')"
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


def _check_vectors(
    vectors: dict[str, Any], channels: tuple[int, ...], axes: tuple[int, ...], x: Any
) -> None:
    wrong = [
        f"{name} has shape {tuple(vector.shape)}"
        for name, vector in vectors.items()
        if vector is not None and tuple(vector.shape) != channels
    ]
    if wrong:
        raise ValueError(
            f"batch_norm: {' and '.join(wrong)}, expected {channels}: x has shape {tuple(x.shape)} "
            f"and its channels are on axis {axes if len(axes) > 1 else axes[0]}"
        )
