"""What `momentum` weights, how the running variance is corrected, and the defaults: by library.

The same word means opposite things. PyTorch's momentum weights the new value, everybody else's the
old one; PyTorch and Chainer keep the unbiased variance, Keras and Flax the biased one. A convention
sets meaning and defaults together; its numbers stand in `CONVENTIONS`.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple


class Default(enum.Enum):
    """A default that the convention fills in: whatever is given in its place wins."""

    BY_CONVENTION = "by convention"

    def __repr__(self) -> str:
        return "<by convention>"


BY_CONVENTION = Default.BY_CONVENTION


class Convention(NamedTuple):
    """How one library keeps running statistics.

    weights_new: whether momentum weights the new value (or the old one).
    momentum, eps: their defaults.
    correction: the running variance divides by m - correction: 1 is unbiased, 0 biased.
    axis: where the channels are by default.

    >>> import tinygrad_bn as tg
    >>> keras = tg.nn.CONVENTIONS["keras"]
    >>> keras.momentum, round(keras.weight_of_new(keras.momentum), 2), keras.correction
    (0.99, 0.01, 0)
    """

    name: str
    weights_new: bool
    momentum: float
    eps: float
    correction: float
    axis: int

    @property
    def weighted(self) -> str:
        """Which value momentum weights, in words."""
        return "new" if self.weights_new else "old"

    def weight_of_new(self, momentum: float) -> float:
        """Return the weight of the new value, which is what running statistics are moved by."""
        return momentum if self.weights_new else 1 - momentum

    def explain(self) -> str:
        """Return what momentum does, as a clause."""
        if self.weights_new:
            return "running = (1 - momentum) * running + momentum * new"
        return "running = momentum * running + (1 - momentum) * new"


#: From the libraries' documentation: PyTorch 2, Keras 3, Flax (linen and nnx), Chainer 7.
CONVENTIONS = {
    "torch": Convention("torch", True, 0.1, 1e-5, 1, 1),
    "keras": Convention("keras", False, 0.99, 1e-3, 0, -1),
    "flax": Convention("flax", False, 0.99, 1e-5, 0, -1),
    "chainer": Convention("chainer", False, 0.9, 2e-5, 1, 1),
}


def convention_named(caller: str, name: str) -> Convention:
    """Return the convention of that name; ValueError for another."""
    if name not in CONVENTIONS:
        raise ValueError(
            f"{caller}: convention is {name!r}, expected one of {sorted(CONVENTIONS)}; for a "
            f"library of another kind take the nearest and give momentum, eps and correction"
        )
    return CONVENTIONS[name]


def convert_running_var(
    running_var: Any, count: float, source: str | float, target: str | float
) -> Any:
    """Return a running variance as another convention would hold it.

    running_var: array, Tensor or number.
    count: m, how many values per channel each batch had: batch size times positions. It is not
        part of any checkpoint, so only you know it.
    source, target: names of conventions ("torch", "keras", "flax", "chainer"), or corrections.

    v · (m - source) / (m - target). Exact if every batch had m values and the start value has
    faded: of it, a share (1 - w)^k is left after k batches, w being the weight of the new value.
    Where a correction leaves nothing to divide by (m <= correction), it does not apply, as in
    `F.batch_norm`.

    Raises ValueError for an unknown convention and a count below 1.

    >>> convert_running_var(4.0, 8, "torch", "keras")  # 4 · 7 / 8
    3.5
    """
    m = float(count)
    if not m >= 1:
        raise ValueError(
            f"convert_running_var: count is {count}, expected how many values per channel a batch "
            f"had: batch size times positions"
        )
    divisors = []
    for correction in (source, target):
        if isinstance(correction, str):
            correction = convention_named("convert_running_var", correction).correction
        divisors.append(m - correction if m > correction else m)
    return running_var * (divisors[0] / divisors[1])
