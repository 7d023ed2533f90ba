"""Functional layer, group, instance and RMS norm: arguments checked, the ops called.

Arguments are in PyTorch's order. Statistics are computed in float64 and the result has the dtype of
x; a constant sample gives exactly bias, and a NaN stays in what shares a mean with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinygrad_bn.backend import machine_epsilon
from tinygrad_bn.normalization import BatchStatistics, batch_norm
from tinygrad_bn.normalization_checks import check_floating, check_vectors, kept_axes
from tinygrad_bn.ops import normalization as _ops
from tinygrad_bn.ops.batch_norm import values_per_channel

Shape = int | Sequence[int]


def layer_norm(
    x: Any, normalized_shape: Shape, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Return x normalized over its last axes: weight · (x - mean) / √(var + eps) + bias.

    x: (..., *normalized_shape), floating. normalized_shape: the sizes of the axes that share a mean
    and a variance; an integer is one axis. weight, bias: of normalized_shape; None means 1 and 0.

    Raises ValueError for shapes that do not fit and for one value per sample, whose variance says
    nothing; TypeError for integers. Source: Ba, Kiros and Hinton 2016, equation 3.

    >>> import numpy as np
    >>> layer_norm(np.array([[1.0, 3.0], [5.0, 5.0]]), 2, eps=0.0625, bias=np.array([0.0, 0.5]))
    array([[-0.9701425,  1.4701425],
           [ 0.       ,  0.5      ]])
    """
    kept, normalized = _last_axes("layer_norm", x, normalized_shape)
    check_vectors("layer_norm", {"weight": weight, "bias": bias}, normalized, x)
    _check("layer_norm", x, kept, eps)
    return _ops.layer_norm(x, weight, bias, axis=kept, channels=normalized, eps=float(eps))


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Any:
    """Return x normalized over groups of channels, each sample by itself.

    x: (N, C, *spatial), or with its channels on another axis but 0. num_groups: a divisor of C; 1
    is layer norm over all but the batch, C is instance norm. weight, bias: (C,), None for 1 and 0.

    Raises ValueError for shapes that do not fit and for one value per group; TypeError for
    integers. Source: Wu and He 2018, equations 1 to 7.

    >>> import numpy as np
    >>> group_norm(np.array([[1.0, 3.0, 8.0, 8.0]]), 2, eps=0.0625)
    array([[-0.9701425,  0.9701425,  0.       ,  0.       ]])
    """
    (channel,) = _channel_axis("group_norm", x, axis)
    check_vectors("group_norm", {"weight": weight, "bias": bias}, (channel,), x)
    size = x.shape[channel]
    if num_groups < 1 or size % num_groups:
        raise ValueError(
            f"group_norm: num_groups={num_groups} does not split the {size} channels of x, of "
            f"shape {tuple(x.shape)}, into equal parts; choose a divisor"
        )
    split = num_groups, size // num_groups
    grouped = x.reshape((*x.shape[:channel], *split, *x.shape[channel + 1 :]))
    weight = None if weight is None else weight.reshape(split)
    bias = None if bias is None else bias.reshape(split)
    kept, channels = (0, channel), (channel, channel + 1)
    _check("group_norm", grouped, kept, eps)
    y = _ops.layer_norm(grouped, weight, bias, axis=kept, channels=channels, eps=float(eps))
    return y.reshape(x.shape)


def instance_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Any:
    """Return x normalized over its spatial axes: each channel of each sample by itself.

    x: (N, C, *spatial), or with its channels on another axis but 0. running_mean, running_var: (C,)
    arrays or Tensors; with `use_input_stats` they move towards the averages over the samples of
    mean and unbiased variance, `momentum` weighting the new value, and otherwise x is normalized by
    them. weight, bias: (C,), None for 1 and 0.

    Raises ValueError for shapes that do not fit and for one value per channel and sample; TypeError
    for integers. Source: Ulyanov, Vedaldi and Lempitsky 2016, equation 4.

    >>> import numpy as np
    >>> instance_norm(np.array([[[1.0, 3.0], [8.0, 8.0]]]), eps=0.0625)
    array([[[-0.9701425,  0.9701425],
            [ 0.       ,  0.       ]]])
    """
    (channel,) = _channel_axis("instance_norm", x, axis)
    vectors = {"running_mean": running_mean, "running_var": running_var}
    check_vectors("instance_norm", {**vectors, "weight": weight, "bias": bias}, (channel,), x)
    if (running_mean is None) != (running_var is None):
        raise ValueError("instance_norm: give both running_mean and running_var, or neither")
    if not use_input_stats:
        if running_mean is None:
            raise ValueError(
                "instance_norm: use_input_stats=False needs running_mean and running_var"
            )
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps, axis=channel)
    momentum = float(momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"instance_norm: momentum is {momentum}, expected a weight of the new value in [0, 1]"
        )
    y, found = instance_norm_and_statistics(x, weight, bias, eps, axis=channel)
    if running_mean is not None:
        found.move(running_mean, running_var, momentum, 1)
    return y


def instance_norm_and_statistics(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, axis: int = 1
) -> tuple[Any, BatchStatistics]:
    """Return what `instance_norm` returns for its own statistics, and these: per sample and
    channel, as groups of a batch norm are. Arguments and errors as `instance_norm`'s."""
    (channel,) = _channel_axis("instance_norm", x, axis)
    check_vectors("instance_norm", {"weight": weight, "bias": bias}, (channel,), x)
    kept = (0, channel)
    _check("instance_norm", x, kept, eps)
    y, found = _ops.layer_norm.call_with_residuals(
        x, weight, bias, axis=kept, channels=(channel,), eps=float(eps)
    )
    samples, channels = x.shape[0], x.shape[channel]
    mean, var = (found[name].reshape((samples, channels)) for name in ("mean", "var"))
    count = values_per_channel(tuple(x.shape), kept) if x.size else 0
    return y, BatchStatistics(mean, var, count, samples)


def rms_norm(x: Any, normalized_shape: Shape, weight: Any = None, eps: float | None = None) -> Any:
    """Return x divided by its root mean square over the last axes: weight · x / √(mean(x²) + eps).

    x: (..., *normalized_shape), floating. weight: of normalized_shape; None means 1.
    eps: None is the distance from 1 to the next number of x's dtype, as in PyTorch.

    Raises ValueError for shapes that do not fit; TypeError for integers. Source: Zhang and Sennrich
    2019, equation 4.

    >>> import numpy as np
    >>> rms_norm(np.array([[1.0, 7.0]]), 2)  # mean(x²) = 25
    array([[0.2, 1.4]])
    """
    kept, normalized = _last_axes("rms_norm", x, normalized_shape)
    check_vectors("rms_norm", {"weight": weight}, normalized, x)
    eps = machine_epsilon(x.dtype) if eps is None else float(eps)
    _check_eps("rms_norm", eps)
    return _ops.rms_norm(x, weight, axis=kept, channels=normalized, eps=eps)


def _last_axes(
    name: str, x: Any, normalized_shape: Shape
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes of x before the normalized ones, and these; raise if the sizes differ."""
    sizes = (
        tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    )
    check_floating(name, x)
    first = x.ndim - len(sizes)
    if not sizes or first < 0 or tuple(x.shape[first:]) != sizes:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)} and normalized_shape is {sizes}, expected the "
            f"sizes of the last axes of x"
        )
    return tuple(range(first)), tuple(range(first, x.ndim))


def _channel_axis(name: str, x: Any, axis: int) -> tuple[int, ...]:
    axes = kept_axes(name, x, axis)
    if axes == (0,):
        raise ValueError(
            f"{name}: axis={axis} is the batch axis of x, of shape {tuple(x.shape)}; each sample "
            f"is normalized by itself, so its channels must be on another axis"
        )
    return axes


def _check(name: str, x: Any, kept: tuple[int, ...], eps: float) -> None:
    _check_eps(name, eps)
    if values_per_channel(tuple(x.shape), kept) == 1 and x.size:
        raise ValueError(
            f"{name}: x of shape {tuple(x.shape)} has one value for each mean (kept axes {kept}), "
            f"whose variance is 0 whatever it is; normalize over more than one value"
        )


def _check_eps(name: str, eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"{name}: eps is {eps}, expected a number >= 0")
