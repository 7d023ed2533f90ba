"""Layers without parameters: activations, and what reshapes or thins out."""

from __future__ import annotations

from typing import Any

from tinygrad_bn import functional as F
from tinygrad_bn.nn.module import Module


class ReLU(Module):
    """max(x, 0).

    >>> import tinygrad_bn as tg
    >>> tg.nn.ReLU()(tg.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def forward(self, x: Any) -> Any:
        """Return max(x, 0)."""
        return F.relu(x)


class Tanh(Module):
    """The hyperbolic tangent.

    >>> import tinygrad_bn as tg
    >>> tg.nn.Tanh()(tg.tensor([0.0])).tolist()
    [0.0]
    """

    def forward(self, x: Any) -> Any:
        """Return the hyperbolic tangent of x."""
        return F.tanh(x)


class Sigmoid(Module):
    """1 / (1 + e ** -x).

    >>> import tinygrad_bn as tg
    >>> tg.nn.Sigmoid()(tg.tensor([0.0])).tolist()
    [0.5]
    """

    def forward(self, x: Any) -> Any:
        """Return 1 / (1 + e ** -x)."""
        return F.sigmoid(x)


class Softmax(Module):
    """eˣ / Σ eˣ over `axis`. For a loss, use `F.cross_entropy` on the logits instead.

    >>> import tinygrad_bn as tg
    >>> tg.nn.Softmax()(tg.tensor([0.0, 0.0])).tolist()
    [0.5, 0.5]
    """

    def __init__(self, axis: int = -1):
        self.axis = axis

    def forward(self, x: Any) -> Any:
        """Return eˣ / Σ eˣ."""
        return F.softmax(x, self.axis)

    def extra_repr(self) -> str:
        """Return the axis."""
        return f"axis={self.axis}"


class Identity(Module):
    """Its input, unchanged: a place in a network where nothing is wanted.

    >>> from tinygrad_bn import nn
    >>> nn.Identity()(1)
    1
    """

    def forward(self, x: Any) -> Any:
        """Return x."""
        return x


class Flatten(Module):
    """The axes from `start_axis` on joined into one: (N, ...) to (N, features).

    >>> import tinygrad_bn as tg
    >>> tg.nn.Flatten()(tg.ones(2, 3, 4)).shape
    (2, 12)
    """

    def __init__(self, start_axis: int = 1):
        self.start_axis = start_axis

    def forward(self, x: Any) -> Any:
        """Return x with its last axes joined."""
        return F.flatten(x, self.start_axis)

    def extra_repr(self) -> str:
        """Return the first axis that is joined."""
        return f"start_axis={self.start_axis}"


class Dropout(Module):
    """In training, zeros with probability p and the other entries divided by 1 - p; else x.

    >>> import tinygrad_bn as tg
    >>> tg.nn.Dropout(0.5).eval()(tg.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """

    def __init__(self, p: float = 0.5):
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: p is {p}, expected a probability in [0, 1]")
        self.p = float(p)

    def forward(self, x: Any) -> Any:
        """Return x, thinned out in training."""
        return F.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the probability."""
        return f"p={self.p}"
