"""The fully connected layer."""

from __future__ import annotations

from typing import Any

from tinygrad_bn import creation
from tinygrad_bn import functional as F
from tinygrad_bn.nn.init import like_pytorch_
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.parameter import Parameter


class Linear(Module):
    """x Wᵀ + b over the last axis: (..., in_features) to (..., out_features).

    in_features, out_features: the sizes.
    bias: whether to add b.
    dtype, device: of the parameters.

    `weight` is (out_features, in_features), `bias` (out_features,) or None. Both start from
    U(-1/√in_features, 1/√in_features), as PyTorch's.

    >>> import tinygrad_bn as tg
    >>> tg.nn.Linear(3, 2)(tg.ones(5, 3)).shape
    (5, 2)
    """

    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: Any = None,
        device: str | None = None,
    ):
        self.in_features = in_features
        self.out_features = out_features
        where = {"dtype": dtype, "device": device}
        self.weight = Parameter(creation.empty(out_features, in_features, **where))
        self.bias = Parameter(creation.empty(out_features, **where)) if bias else None
        like_pytorch_(self.weight, self.bias)

    def forward(self, x: Any) -> Any:
        """Return x Wᵀ + b."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )
