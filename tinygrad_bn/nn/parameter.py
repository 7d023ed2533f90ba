"""The Parameter: a Tensor that a Module finds among its attributes and an optimizer updates."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.creation import tensor
from tinygrad_bn.tape import require_floating
from tinygrad_bn.tensor import Tensor


class Parameter(Tensor):
    """A leaf Tensor around a copy of `data`, that requires grad unless told otherwise.

    data: an array, a Tensor, a number or nested lists of numbers; copied, so that in-place
        updates reach nobody else's memory.
    dtype, device: as for a Tensor.
    requires_grad: False for a frozen parameter.

    As an attribute of a Module it belongs to the module's `parameters()`.

    >>> from tinygrad_bn import nn
    >>> nn.Parameter([1.0, 2.0])
    Parameter([1., 2.], dtype=float32, requires_grad=True)
    """

    __slots__ = ()

    def __init__(
        self,
        data: Any,
        *,
        dtype: Any = None,
        device: str | None = None,
        requires_grad: bool = True,
    ):
        if requires_grad and dtype is None and hasattr(data, "dtype"):
            require_floating("Parameter", data.dtype)
        super().__init__(tensor(data, dtype=dtype, device=device), requires_grad=requires_grad)
