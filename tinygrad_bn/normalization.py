"""Functional batch norm: arguments checked, the op called, running averages kept up to date.

Conventions are PyTorch's: `momentum` weights the *new* value, the running variance is the unbiased
one, and channels are on axis 1 unless said otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tinygrad_bn.backend import accumulation_dtype, kernels, largest, placed
from tinygrad_bn.normalization_checks import (
    Axis,
    check_floating,
    check_state,
    check_vectors,
    checked_numbers,
    checked_sample,
    kept_axes,
    raw,
)
from tinygrad_bn.ops import batch_norm as _ops
from tinygrad_bn.ops import fused as _fused
from tinygrad_bn.ops.elementwise import relu, where
from tinygrad_bn.tape import TensorBase


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
    mask: Any = None,
    groups: int = 1,
    correction: float = 1,
) -> Any:
    """Return `x` normalized per channel: weight · (x - mean) / √(var + eps) + bias.

    x: (N, C, *spatial), or any shape with its channels along `axis`; floating.
    running_mean, running_var: one value per channel, arrays or Tensors. In training they are
        updated in place: r ← (1 - momentum) · r + momentum · (statistic of the batch), and stay
        within their dtype: a variance beyond it becomes its largest number. Otherwise they are
        what x is normalized by.
    weight, bias: one value per channel; None means 1 and 0.
    training: normalize by the statistics of this batch. Without running statistics that is done
        in any case.
    momentum: weight of the new value, in [0, 1].
    eps: added to the variance, in units of x².
    axis: the channel axis, or a tuple of axes that are kept; weight and the rest then have the
        sizes of these axes, in x's order. -1 is channels-last.
    mask: how often each value counts (frequencies >= 0, or booleans): as many dimensions as x, size
        1 along `axis`, broadcastable along the others, e.g. (N, 1, 1, 1). What counts 0 times, be
        it NaN, gives bias and takes no gradient. Applies to the statistics of the batch.
    groups: into how many equal parts axis 0 is split, each normalized by itself (ghost batches).
        The running statistics make one step, towards the average over the groups.
    correction: of the *running* variance, which divides by m - correction: 1 unbiased (PyTorch),
        0 biased (Keras, Flax). The batch itself is always normalized by the biased variance.

    The result has the dtype of x; statistics are computed in float64. A constant channel gives
    exactly bias where eps > 0. So does, for any eps, a batch or group in which a mask leaves fewer
    than two values; that one moves no running statistic. Source: Ioffe and Szegedy 2015,
    Algorithm 1.

    Raises ValueError for a rank below 2, arguments that do not fit x, and in training for one
    value per channel, whose variance says nothing; TypeError for integers.

    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> print(batch_norm(x, training=True))
    [[-1.22474258 -1.22474258]
     [ 0.          0.        ]
     [ 1.22474258  1.22474258]]
    """
    return _batch_norm(
        "batch_norm", x, running_mean, running_var, weight, bias, training, momentum, eps,
        axis, mask, groups, correction, plain,
    )  # fmt: skip


class Finish(NamedTuple):
    """What is done with y, batch norm's output, before it is handed out.

    relu: take max(y, 0). residual: add it to y first, where it is not None.
    """

    relu: bool = False
    residual: Any = None

    def __call__(self, y: Any) -> Any:
        """Return y finished, by ordinary ops."""
        y = y if self.residual is None else y + self.residual
        return relu(y) if self.relu else y


plain = Finish()


def _batch_norm(
    name: str,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: float,
    eps: float,
    axis: Axis,
    mask: Any,
    groups: int,
    correction: float,
    finish: Finish,
) -> Any:
    axes = kept_axes(name, x, axis)
    vectors = {"running_mean": running_mean, "running_var": running_var}
    check_vectors(name, {**vectors, "weight": weight, "bias": bias}, axes, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: give both running_mean and running_var, or neither")
    eps, momentum = checked_numbers(name, eps, momentum, correction)
    if training:
        check_state(name, vectors)
    if not training and running_mean is not None:
        return finish(
            _ops.batch_norm_given(x, running_mean, running_var, weight, bias, axis=axes, eps=eps)
        )
    mask, groups = checked_sample(name, x, axes, mask, groups)
    out, found = by_the_batch(x, weight, bias, mask, axes, eps, groups, finish)
    if running_mean is not None:
        found.move(running_mean, running_var, momentum, correction)
    return out


#: Kernels that move running statistics, by family.
_MOVES = {"cuda": "tinygrad_bn.kernels.cuda.running_statistics"}


class BatchStatistics(NamedTuple):
    """What one batch says about each channel, in float64: raw, and without part in the graph.

    mean, var: the mean and the biased variance, one value per channel in order (with groups: per
        group and channel), in whatever shape.
    count: of how many values; an array where a mask makes that data, and 0 where they are too few.
    groups: of how many groups there are statistics.
    """

    mean: Any
    var: Any
    count: Any
    groups: int = 1

    def step(self, correction: float) -> tuple[Any, Any, Any]:
        """Return the mean and the corrected variance that running statistics step towards, averaged
        over the groups that have enough values, and whether there is any such group."""
        mean, var, count, groups = self
        if isinstance(count, int):
            var = var * _corrected(count, correction)
            if groups == 1:
                return mean, var, True
            return mean.mean(axis=0), var.mean(axis=0), True
        count_of_rest = where(count > correction, count - correction, count)
        var = var * (count / where(count_of_rest > 0, count_of_rest, 1.0))
        if groups == 1:
            return mean, var, count.reshape(()) > 0
        enough = count > 0
        weights = enough / where(enough.sum() > 0, enough.sum(), 1)
        return (mean * weights).sum(axis=0), (var * weights).sum(axis=0), enough.any()

    def move(self, running_mean: Any, running_var: Any, momentum: Any, correction: float) -> Any:
        """Return whether there were enough values to move the running statistics, after doing so.

        momentum: weight of the new value, a number or an array of one. Where a mask makes it data
        whether there were enough values, the result is an array too: nothing waits for a device.
        """
        if isinstance(self.count, int) and self.count == 0:
            return False
        with placed("batch_norm", (raw(running_mean), self.mean)):
            if self._moved_by_a_kernel(running_mean, running_var, momentum, correction):
                return True
            mean, var, counted = self.step(correction)
            update_running(running_mean, mean, momentum, counted)
            update_running(running_var, var, momentum, counted)
            return counted

    def _moved_by_a_kernel(
        self, running_mean: Any, running_var: Any, momentum: Any, correction: float
    ) -> bool:
        """Return whether a kernel has moved both running statistics at once."""
        if not isinstance(self.count, int):
            return False
        factor = _corrected(self.count, correction)
        both = raw(running_mean), raw(running_var)
        for move in kernels.candidates(_MOVES, "move", (self.mean,)):
            if move(self.mean, self.var, *both, raw(momentum), factor=factor, groups=self.groups):
                for running in (running_mean, running_var):
                    if isinstance(running, TensorBase):
                        running.note_write()
                return True
        return False


def _corrected(count: int, correction: float) -> float:
    """Return what a biased variance of `count` values is multiplied by."""
    return count / (count - correction) if count > correction else 1.0


def batch_norm_and_statistics(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Axis = 1,
    mask: Any = None,
    groups: int = 1,
    finish: Finish = plain,
) -> tuple[Any, BatchStatistics]:
    """Return what `batch_norm` returns in training, finished, and the statistics of this batch.

    For callers with a use of their own for the statistics. Arguments and errors as `batch_norm`'s.

    >>> import numpy as np
    >>> _, found = batch_norm_and_statistics(np.array([[1.0], [3.0]]))
    >>> found.mean.item(), found.var.item(), found.count
    (2.0, 1.0, 2)
    """
    axes = kept_axes("batch_norm", x, axis)
    check_vectors("batch_norm", {"weight": weight, "bias": bias}, axes, x)
    mask, groups = checked_sample("batch_norm", x, axes, mask, groups)
    return by_the_batch(x, weight, bias, mask, axes, float(eps), groups, finish)


def by_the_batch(
    x: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    axes: tuple[int, ...],
    eps: float,
    groups: int,
    finish: Finish = plain,
) -> tuple[Any, BatchStatistics]:
    """Return x normalized by the batch and finished, and the statistics that were found; all is
    checked."""
    fused: Any = NotImplemented
    if finish.relu and mask is None and groups == 1:
        fused = _fused.batch_norm_relu.served(x, weight, bias, finish.residual, axis=axes, eps=eps)
    if fused is not NotImplemented:
        out, found = fused
    else:
        y, found = _ops.batch_norm.call_with_residuals(
            x, weight, bias, mask, axis=axes, eps=eps, groups=groups
        )
        out = finish(y)
    count = found["count"] if x.size else 0
    return out, BatchStatistics(found["mean"], found["var"], count, groups)


def batch_norm_relu(
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
    mask: Any = None,
    groups: int = 1,
    correction: float = 1,
    residual: Any = None,
) -> Any:
    """Return max(batch_norm(x) + residual, 0).

    residual: an array or a Tensor of x's shape, or None for 0. Its dtype takes part in that of the
        result, as in any sum. The other arguments and the errors are those of `batch_norm`; a
        kernel may serve it in the passes of batch norm alone.

    Raises ValueError for a residual of another shape, TypeError for one that is no array.

    >>> import numpy as np
    >>> batch_norm_relu(np.array([[-1.0], [1.0]]), training=True, eps=0.0)
    array([[0.],
           [1.]])
    """
    if residual is not None:
        check_floating("batch_norm_relu", x)
        if not hasattr(residual, "shape"):
            raise TypeError(
                f"batch_norm_relu: residual is a {type(residual).__name__}, expected an array or a "
                f"Tensor of x's shape, {tuple(x.shape)}"
            )
        if tuple(residual.shape) != tuple(x.shape):
            raise ValueError(
                f"batch_norm_relu: residual has shape {tuple(residual.shape)}, expected x's, "
                f"{tuple(x.shape)}"
            )
    return _batch_norm(
        "batch_norm_relu", x, running_mean, running_var, weight, bias, training, momentum, eps,
        axis, mask, groups, correction, Finish(True, residual),
    )  # fmt: skip


def update_running(running: Any, value: Any, momentum: Any, counted: Any = True) -> None:
    """Write (1 - momentum) · running + momentum · value into `running` (array or Tensor).

    counted: whether there is a value at all; an array of one boolean where only a device knows.
    """
    data = raw(running)
    if counted is not True:
        momentum = where(counted, momentum, 0.0)
    # In the wide dtype, and not as running + momentum · (value - running): from 1, a variance of
    # 1e-20 would come out as 0, also where momentum is 1.
    before = data.astype(accumulation_dtype(data.dtype))
    if hasattr(momentum, "astype"):
        momentum = momentum.astype(before.dtype)  # 1 - momentum is not to be rounded to float32
    moved = (1 - momentum) * before + momentum * value.reshape(data.shape)
    write_within_range(running, moved)


def write_within_range(running: Any, value: Any) -> None:
    """Write `value`, raw, into `running` (array or Tensor); what is beyond the dtype of `running`
    becomes its largest number: from infinity, no later batch would bring it back."""
    data = raw(running)
    most = largest(data.dtype)
    data[...] = value.reshape(data.shape).clip(-most, most)
    if isinstance(running, TensorBase):
        running.note_write()


def batch_norm_composite(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, axis: Axis = 1
) -> Any:
    """Return what `batch_norm` in training returns, from ordinary ops: the definition.

    Arguments as in `batch_norm`. On Tensors the tape differentiates every step of it, which makes
    it the oracle for the analytic rule, at any order; it costs several times the time and memory.

    Raises as `batch_norm` does for shapes, axes and dtypes that do not fit.

    >>> import numpy as np
    >>> x = np.arange(18.0).reshape(1, 2, 3, 3)
    >>> print(batch_norm_composite(x)[0, 0])
    [[-1.54919218 -1.16189413 -0.77459609]
     [-0.38729804  0.          0.38729804]
     [ 0.77459609  1.16189413  1.54919218]]
    """
    axes = kept_axes("batch_norm_composite", x, axis)
    check_vectors("batch_norm_composite", {"weight": weight, "bias": bias}, axes, x)
    return _ops.batch_norm_composite(x, weight, bias, axis=axes, eps=float(eps))
