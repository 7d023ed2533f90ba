"""The functional face, `F`: ops under their users' names, and short compositions of them.

Every function takes Tensors or raw arrays. A Tensor among the arguments makes the result a Tensor;
with raw arrays alone the result is a raw array and the tape is not involved. Dtypes promote as
NumPy's unless said otherwise; Python numbers take the dtype of what they meet.

Images are (N, C, H, W), or (N, H, W, C) with `layout="NHWC"`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinygrad_bn.backend import array_module, as_dtype, extremes, float32, generator
from tinygrad_bn.backend.creation import like
from tinygrad_bn.batch_renormalization import batch_renorm
from tinygrad_bn.conv_block import conv_block
from tinygrad_bn.layer_normalization import group_norm, instance_norm, layer_norm, rms_norm
from tinygrad_bn.normalization import (
    batch_norm,
    batch_norm_composite,
    batch_norm_relu,
)
from tinygrad_bn.ops import convolution as _convolution
from tinygrad_bn.ops import elementwise as _elementwise
from tinygrad_bn.ops import linalg as _linalg
from tinygrad_bn.ops import loss as _loss
from tinygrad_bn.ops import pooling as _pooling
from tinygrad_bn.ops import reduction as _reduction
from tinygrad_bn.ops import shape as _shape
from tinygrad_bn.tape import TensorBase

__all__ = [
    "accuracy",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_composite",
    "batch_norm_relu",
    "batch_renorm",
    "concatenate",
    "conv2d",
    "conv_block",
    "cross_entropy",
    "dropout",
    "flatten",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "log_softmax",
    "logsumexp",
    "max_pool2d",
    "maximum",
    "minimum",
    "mse_loss",
    "one_hot",
    "pad",
    "relu",
    "rms_norm",
    "sigmoid",
    "softmax",
    "stack",
    "tanh",
    "where",
]

Pair = int | tuple[int, int]

# --- layers ----------------------------------------------------------------------------------


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Return x Wᵀ + b over the last axis of x.

    x: (..., in). weight: (out, in). bias: (out,) or None. Returns (..., out).

    Raises ValueError where the sizes do not fit.

    >>> import numpy as np
    >>> linear(np.ones((1, 2)), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, 0.5]))
    array([[3.5, 7.5]])
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected x "
            f"(..., in) and weight (out, in) with the same `in`; flatten x, or transpose the weight"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"linear: bias has shape {tuple(bias.shape)}, expected {(weight.shape[0],)}, one value "
            f"per output of weight {tuple(weight.shape)}"
        )
    out = _linalg.matmul(x, _shape.transpose(weight))
    return out if bias is None else _elementwise.add(out, bias)


def conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    layout: str = "NCHW",
) -> Any:
    """Return the 2-D cross-correlation of x with weight, plus bias.

    x: images. weight: (O, C / groups, KH, KW) in either layout. bias: (O,) or None.
    stride, padding, dilation: an integer, or a pair (rows, columns); padding is of zeros.
    Returns images with O channels and ⌊(H + 2 padding - dilation (KH - 1) - 1) / stride⌋ + 1 rows.

    Raises ValueError where sizes do not fit.

    >>> import numpy as np
    >>> conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)), padding=1)[0, 0]
    array([[4., 6., 4.],
           [6., 9., 6.],
           [4., 6., 4.]])
    """
    return _convolution.conv2d(
        x,
        weight,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        layout=layout,
    )


def max_pool2d(
    x: Any,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    *,
    layout: str = "NCHW",
) -> Any:
    """Return the largest entry of each window; of equal ones the first takes the gradient.

    x: images in `layout`. kernel_size, stride (None: as the kernel), padding: an integer, or a pair
    (rows, columns); padding never wins. Returns images with ⌊(H + 2 padding - KH) / stride⌋ + 1
    rows.

    Raises ValueError where sizes do not fit.

    >>> import numpy as np
    >>> max_pool2d(np.arange(16.0).reshape(1, 1, 4, 4), 2)[0, 0]
    array([[ 5.,  7.],
           [13., 15.]])
    """
    return _pooling.max_pool2d(
        x, kernel_size=kernel_size, stride=stride, padding=padding, layout=layout
    )


def avg_pool2d(
    x: Any,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    *,
    layout: str = "NCHW",
) -> Any:
    """Return the mean of each window, its padding of zeros included.

    Arguments, shapes and errors as `max_pool2d`'s.

    >>> import numpy as np
    >>> avg_pool2d(np.arange(16.0).reshape(1, 1, 4, 4), 2)[0, 0]
    array([[ 2.5,  4.5],
           [10.5, 12.5]])
    """
    return _pooling.avg_pool2d(
        x, kernel_size=kernel_size, stride=stride, padding=padding, layout=layout
    )


def dropout(x: Any, p: float = 0.5, training: bool = True) -> Any:
    """Return x with entries set to zero with probability p and the others divided by 1 - p.

    training: False returns x itself. The mask is drawn on the host from the library's generator:
    one seed gives the same mask on every device. A dropped entry is zero even if it was infinite.

    Raises ValueError for a p outside [0, 1].

    >>> import numpy as np
    >>> sorted(set(dropout(np.ones(100), 0.5).tolist()))
    [0.0, 2.0]
    """
    p = float(p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p is {p}, expected a probability in [0, 1]")
    if not training or p == 0.0:
        return x
    raw = x.data if isinstance(x, TensorBase) else x
    keep = like(generator().random(raw.shape) >= p, raw)
    return _elementwise.multiply(_elementwise.where(keep, x, 0), 1.0 / (1.0 - p) if p < 1 else 0.0)


def flatten(x: Any, start_axis: int = 0) -> Any:
    """Return x with its axes from `start_axis` on joined into one.

    >>> import numpy as np
    >>> flatten(np.ones((2, 3, 4)), 1).shape
    (2, 12)
    """
    return _shape.flatten(x, start_axis)


# --- activations -----------------------------------------------------------------------------


def relu(x: Any) -> Any:
    """Return max(x, 0); its derivative at 0 is 0, and NaN stays NaN.

    >>> import numpy as np
    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    return _elementwise.relu(x)


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e ** -x), without overflow.

    >>> import numpy as np
    >>> sigmoid(np.array([0.0, -1000.0]))
    array([0.5, 0. ])
    """
    return _elementwise.sigmoid(x)


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent of x.

    >>> import numpy as np
    >>> tanh(np.array([0.0, 1000.0]))
    array([0., 1.])
    """
    return _elementwise.tanh(x)


def softmax(x: Any, axis: int = -1) -> Any:
    """Return eˣ / Σ eˣ over `axis`, without overflow.

    >>> import numpy as np
    >>> softmax(np.array([1000.0, 1000.0]))
    array([0.5, 0.5])
    """
    return _loss.softmax(x, axis=axis)


def log_softmax(x: Any, axis: int = -1) -> Any:
    """Return x - log Σ eˣ over `axis`: the logarithm of `softmax`, accurate where that is 0.

    >>> import numpy as np
    >>> log_softmax(np.array([0.0, -1000.0]))
    array([    0., -1000.])
    """
    return _loss.log_softmax(x, axis=axis)


def logsumexp(x: Any, axis: int = -1, keepdims: bool = False) -> Any:
    """Return log Σ eˣ over `axis`, without overflow.

    >>> import numpy as np
    >>> float(logsumexp(np.array([1000.0, 1000.0])))  # 1000 + log 2
    1000.693147
    """
    return _loss.logsumexp(x, axis=axis, keepdims=keepdims)


# --- losses and scores -----------------------------------------------------------------------


def cross_entropy(logits: Any, target: Any, *, reduction: str = "mean") -> Any:
    """Return the mean of -Σ_c target_c · log softmax(logits)_c.

    logits: (N, classes, ...), classes on axis 1. target: integer labels (N, ...), or one-hot rows
    or probabilities of the logits' shape. reduction: "mean" (over all but the classes), "sum" or
    "none". Returns a 0-d result, or (N, ...) for "none".

    Raises ValueError for shapes that do not fit and labels out of range.

    >>> import numpy as np
    >>> float(cross_entropy(np.zeros((1, 10)), np.array([3])))  # log 10
    2.302585
    """
    return _loss.cross_entropy(logits, target, reduction=reduction)


def mse_loss(x: Any, target: Any) -> Any:
    """Return the mean of (x - target)², 0-d. Both have one shape: ValueError otherwise.

    >>> import numpy as np
    >>> float(mse_loss(np.array([1.0, 2.0]), np.array([1.0, 4.0])))
    2.0
    """
    if tuple(x.shape) != tuple(target.shape):
        # Broadcasting (N,) against (N, 1) would silently average N² differences.
        raise ValueError(
            f"mse_loss: x has shape {tuple(x.shape)} and target {tuple(target.shape)}, expected "
            f"one shape; reshape one of them"
        )
    return _reduction.mean(_elementwise.square(_elementwise.subtract(x, target)))


def accuracy(logits: Any, target: Any) -> Any:
    """Return the share of rows whose largest logit is at the target, 0-d and float32.

    logits: (N, classes, ...). target: integer labels (N, ...), or one-hot rows or probabilities
    of the logits' shape, whose largest entry is the label. NaN for no rows; it takes no part in
    the graph. `float(...)` makes it a number.

    Raises ValueError for shapes that do not fit.

    >>> import numpy as np
    >>> float(accuracy(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 1])))
    0.5
    """
    labels = (logits.shape[0], *logits.shape[2:]) if logits.ndim > 1 else None
    if labels is None or tuple(target.shape) not in (labels, tuple(logits.shape)):
        raise ValueError(
            f"accuracy: logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}, "
            f"expected logits (N, classes, ...) and target (N, ...) or of the logits' shape"
        )
    if target.ndim == logits.ndim:
        target = _reduction.argmax(target, axis=1)
    hits = _elementwise.equal(_reduction.argmax(logits, axis=1), target)
    if hits.size == 0:
        return _elementwise.add(_reduction.sum(_shape.astype(hits, dtype=float32)), math.nan)
    return _reduction.mean(_shape.astype(hits, dtype=float32))


def one_hot(labels: Any, num_classes: int, *, dtype: Any = float32) -> Any:
    """Return rows that are 1 at the label and 0 elsewhere.

    labels: integers (...) in [0, num_classes). Returns (..., num_classes) of `dtype`.

    Raises TypeError for labels that are no integers, ValueError for labels out of range.

    >>> import numpy as np
    >>> one_hot(np.array([0, 2]), 3)
    array([[1., 0., 0.],
           [0., 0., 1.]], dtype=float32)
    """
    raw = labels.data if isinstance(labels, TensorBase) else labels
    if raw.dtype.kind not in "iu":
        raise TypeError(
            f"one_hot: labels are {raw.dtype}, expected integers; convert them, for example with "
            f".astype('int64')"
        )
    range_ = extremes(raw)
    if range_ is not None and not 0 <= range_[0] <= range_[1] < num_classes:
        raise ValueError(
            f"one_hot: labels range from {range_[0]} to {range_[1]}, expected 0 to "
            f"{num_classes - 1}; check num_classes"
        )
    classes = array_module(raw).arange(num_classes)
    hot = _elementwise.equal(_shape.expand_dims(labels, -1), like(classes, raw))
    return _shape.astype(hot, dtype=as_dtype(dtype))


# --- putting together and choosing -----------------------------------------------------------


def where(condition: Any, x: Any, y: Any) -> Any:
    """Return x where the condition holds, y elsewhere; the three broadcast.

    >>> import numpy as np
    >>> where(np.array([True, False]), np.array([1.0, 2.0]), 0.0)
    array([1., 0.])
    """
    return _elementwise.where(condition, x, y)


def maximum(x: Any, y: Any) -> Any:
    """Return the larger of x and y; equal entries share the gradient, NaN passes on.

    >>> import numpy as np
    >>> maximum(np.array([1.0, 3.0]), 2.0)
    array([2., 3.])
    """
    return _elementwise.maximum(x, y)


def minimum(x: Any, y: Any) -> Any:
    """Return the smaller of x and y; equal entries share the gradient, NaN passes on.

    >>> import numpy as np
    >>> minimum(np.array([1.0, 3.0]), 2.0)
    array([1., 2.])
    """
    return _elementwise.minimum(x, y)


def concatenate(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Return the arrays joined along an axis that they have.

    Their other sizes are the same. Raises ValueError where they are not, and for no arrays.

    >>> import numpy as np
    >>> concatenate([np.ones((2, 3)), np.zeros((1, 3))]).shape
    (3, 3)
    """
    return _shape.concatenate(*_several("concatenate", arrays), axis=axis)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Return the arrays joined along a new axis.

    All have one shape. Raises ValueError where they have not, and for no arrays.

    >>> import numpy as np
    >>> stack([np.ones(3), np.zeros(3)], axis=1).shape
    (3, 2)
    """
    return _shape.stack(*_several("stack", arrays), axis=axis)


def pad(x: Any, pad_width: Sequence[tuple[int, int]], value: float = 0.0) -> Any:
    """Return x with entries of `value` added along its axes, as in NumPy.

    pad_width: for each axis, how many to add `(before, after)` it.

    Raises ValueError unless there is a pair of sizes >= 0 for each axis.

    >>> import numpy as np
    >>> pad(np.ones(2), [(1, 2)])
    array([0., 1., 1., 0., 0.])
    """
    widths = tuple((int(before), int(after)) for before, after in pad_width)
    if len(widths) != x.ndim or any(width < 0 for pair in widths for width in pair):
        raise ValueError(
            f"pad: pad_width is {widths} for an x of shape {tuple(x.shape)}, expected one pair "
            f"(before, after) of sizes >= 0 for each of its {x.ndim} axes"
        )
    return _shape.pad(x, pad_width=widths, value=value)


def _several(name: str, arrays: Sequence[Any]) -> tuple[Any, ...]:
    arrays = tuple(arrays)
    if not arrays:
        raise ValueError(f"{name}: got no arrays, expected a sequence of at least one")
    return arrays
