"""Functional Batch Renorm: batch norm that is corrected towards the running statistics."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import accumulation_dtype, placed
from tinygrad_bn.normalization import BatchStatistics, batch_norm, by_the_batch
from tinygrad_bn.normalization_checks import (
    Axis,
    check_state,
    check_vectors,
    checked_numbers,
    checked_sample,
    kept_axes,
    raw,
)
from tinygrad_bn.ops.elementwise import maximum, minimum, sqrt


def batch_renorm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    axis: Axis = 1,
    correction: float = 1,
) -> Any:
    """Return x normalized by the batch and corrected towards the running statistics.

    In training y = weight · (x̂ r + d) + bias, where x̂ is normalized by the batch, and
    r = σ_batch / σ_running limited to [1 / r_max, r_max], d = (μ_batch - μ_running) / σ_running
    limited to [-d_max, d_max] (σ = √(var + eps)) are constants for the gradient: unlimited,
    training computes what evaluation does. Raise the limits from (1, 0), which is `batch_norm`, as
    training goes on. The rest as in `batch_norm`, and its errors; r_max below 1 and d_max below 0
    raise ValueError too, as does training without running statistics.

    Source: Ioffe, "Batch Renormalization", 2017 (arXiv:1702.03275), Algorithm 1.

    >>> import numpy as np
    >>> x = np.array([[0.0], [2.0]])
    >>> batch_renorm(x, np.zeros(1), np.full(1, 4.0), training=True, eps=0.0)  # r = d = 1/2
    array([[0.],
           [1.]])
    """
    if not training:
        return batch_norm(x, running_mean, running_var, weight, bias, eps=eps, axis=axis)
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(
            f"batch_renorm: r_max is {r_max} and d_max {d_max}, expected r_max >= 1 and d_max >= 0"
        )
    if running_mean is None or running_var is None:
        raise ValueError(
            "batch_renorm: running_mean or running_var is None, expected both in training, which "
            "corrects towards them; give what they start from, for example zeros and ones"
        )
    eps, momentum = checked_numbers("batch_renorm", eps, momentum, correction)
    check_state("batch_renorm", {"running_mean": running_mean, "running_var": running_var})
    y, found = batch_renorm_and_statistics(
        x, running_mean, running_var, weight, bias, eps, r_max=r_max, d_max=d_max, axis=axis
    )
    found.move(running_mean, running_var, momentum, correction)
    return y


def batch_renorm_and_statistics(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    r_max: Any = 3.0,
    d_max: Any = 5.0,
    axis: Axis = 1,
) -> tuple[Any, BatchStatistics]:
    """Return what `batch_renorm` returns in training, and the statistics of this batch.

    The running statistics stay as they are. Arguments and errors as `batch_renorm`'s; the limits
    may also be arrays of one number, and are not looked at.
    """
    axes = kept_axes("batch_renorm", x, axis)
    vectors = {"running_mean": running_mean, "running_var": running_var}
    check_vectors("batch_renorm", {**vectors, "weight": weight, "bias": bias}, axes, x)
    checked_sample("batch_renorm", x, axes, None, 1)
    wide = accumulation_dtype(x.dtype)
    # r and d go into weight and bias, so that y is rounded once; they need the statistics first.
    _, found = by_the_batch(raw(x), None, None, None, axes, float(eps), 1)
    with placed("batch_renorm", (raw(running_mean),)):
        before_mean = raw(running_mean).astype(wide)
        before_deviation = sqrt(raw(running_var).astype(wide) + float(eps))
        shape = before_mean.shape
        r = sqrt(found.var.reshape(shape) + float(eps)) / before_deviation
        d = (found.mean.reshape(shape) - before_mean) / before_deviation
        r = minimum(maximum(r, 1 / r_max), r_max)
        d = minimum(maximum(d, -d_max), d_max)
    scale = r if weight is None else weight * r
    shift = d if weight is None else weight * d
    shift = shift if bias is None else shift + bias
    y, _ = by_the_batch(x, scale, shift, None, axes, float(eps), 1)
    return y, found
