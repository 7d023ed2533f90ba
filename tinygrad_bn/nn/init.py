"""Initial values, written in place into a Tensor, which is returned: `init.zeros_(layer.bias)`.

Random ones are drawn on the host from the library's generator: after `manual_seed(n)` the same
parameters on every device and, up to rounding, in every dtype.

The fan-in of a weight is the number of inputs that meet in one output: (out, in) has `in`, and
(out, in, *kernel) has `in` times the kernel's size; the fan-out likewise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from tinygrad_bn.backend import creation, placed
from tinygrad_bn.tensor import Tensor

T = TypeVar("T", bound=Tensor)

#: What an activation leaves of the standard deviation of its input, inverted.
GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2.0)}


def constant_(tensor: T, value: float) -> T:
    """Return `tensor` after setting every entry to `value`.

    >>> import tinygrad_bn as tg
    >>> constant_(tg.empty(2), 0.5)
    Tensor([0.5, 0.5], dtype=float32)
    """
    with placed("constant_", (tensor.data,)):
        tensor.data[...] = float(value)
    tensor.note_write()
    return tensor


def zeros_(tensor: T) -> T:
    """Return `tensor` after setting every entry to 0."""
    return constant_(tensor, 0.0)


def ones_(tensor: T) -> T:
    """Return `tensor` after setting every entry to 1."""
    return constant_(tensor, 1.0)


def uniform_(tensor: T, low: float = 0.0, high: float = 1.0) -> T:
    """Return `tensor` filled from the uniform distribution on [low, high).

    >>> import tinygrad_bn as tg
    >>> x = uniform_(tg.empty(100), -1, 1)
    >>> bool(x.min() >= -1), bool(x.max() < 1)
    (True, True)
    """
    values = creation.uniform(float(low), float(high), tensor.shape, tensor.dtype, "cpu")
    return _written(tensor, values)


def normal_(tensor: T, mean: float = 0.0, std: float = 1.0) -> T:
    """Return `tensor` filled from the normal distribution with `mean` and deviation `std`.

    >>> import tinygrad_bn as tg
    >>> normal_(tg.empty(3), mean=2.0, std=0.0)
    Tensor([2., 2., 2.], dtype=float32)
    """
    if not std >= 0:
        raise ValueError(f"normal_: std is {std}, expected a number >= 0")
    values = creation.normal(float(mean), float(std), tensor.shape, tensor.dtype, "cpu")
    return _written(tensor, values)


def kaiming_uniform_(
    tensor: T, *, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> T:
    """Return `tensor` filled from U(-b, b) with b = gain · √(3 / fan).

    a: the negative slope of a leaky ReLU: gain = √(2 / (1 + a²)).
    mode: which fan, "fan_in" (keeps the size of activations) or "fan_out" (of gradients).
    nonlinearity: "leaky_relu", or one of `GAINS`.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 10.

    >>> import tinygrad_bn as tg
    >>> x = kaiming_uniform_(tg.empty(10, 6), nonlinearity="relu")
    >>> bool(x.abs().max() <= 1)  # √2 · √(3 / 6)
    True
    """
    bound = math.sqrt(3.0) * _deviation("kaiming_uniform_", tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound)


def kaiming_normal_(
    tensor: T, *, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> T:
    """Return `tensor` filled from N(0, σ²) with σ = gain / √fan; see `kaiming_uniform_`."""
    return normal_(tensor, 0.0, _deviation("kaiming_normal_", tensor, a, mode, nonlinearity))


def xavier_uniform_(tensor: T, gain: float = 1.0) -> T:
    """Return `tensor` filled from U(-b, b) with b = gain · √(6 / (fan_in + fan_out)).

    Source: Glorot and Bengio 2010, equation 16.
    """
    bound = gain * math.sqrt(6.0 / max(1, sum(fans(tensor.shape))))
    return uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: T, gain: float = 1.0) -> T:
    """Return `tensor` filled from N(0, σ²) with σ = gain · √(2 / (fan_in + fan_out))."""
    return normal_(tensor, 0.0, gain * math.sqrt(2.0 / max(1, sum(fans(tensor.shape)))))


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """Return (fan-in, fan-out) of a weight of `shape`; ValueError below two dimensions.

    >>> fans((20, 3, 5, 5))
    (75, 500)
    """
    if len(shape) < 2:
        raise ValueError(
            f"init: a tensor of shape {tuple(shape)} has no fan-in and fan-out, expected "
            f"(out, in, *kernel); use normal_ or uniform_"
        )
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def like_pytorch_(weight: Tensor, bias: Tensor | None) -> None:
    """Fill the parameters of a linear or convolution layer as PyTorch does by default.

    Both from U(-b, b) with b = 1/√fan-in, which for the weight is its `kaiming_uniform_(a=√5)`.
    """
    kaiming_uniform_(weight, a=math.sqrt(5.0))
    if bias is not None:
        bound = 1.0 / math.sqrt(max(1, fans(weight.shape)[0]))
        uniform_(bias, -bound, bound)


def _deviation(name: str, tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"{name}: mode is {mode!r}, expected 'fan_in' or 'fan_out'")
    if nonlinearity == "leaky_relu":
        gain = math.sqrt(2.0 / (1.0 + a * a))
    elif nonlinearity in GAINS:
        gain = GAINS[nonlinearity]
    else:
        raise ValueError(
            f"{name}: nonlinearity is {nonlinearity!r}, expected 'leaky_relu' or one of "
            f"{sorted(GAINS)}"
        )
    # An empty weight (no inputs) has a fan of 0, and nothing to fill.
    return gain / math.sqrt(max(1, fans(tensor.shape)[mode == "fan_out"]))


def _written(tensor: T, values: Any) -> T:
    with placed("init", (tensor.data,)):
        tensor.data[...] = creation.like(values, tensor.data)
    tensor.note_write()
    return tensor
