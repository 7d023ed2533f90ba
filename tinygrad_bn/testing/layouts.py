"""Memory layouts: the same array of numbers, arranged otherwise in memory, on the same device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_bn.backend import array_module

Array = Any


@dataclass(frozen=True)
class Layout:
    """A way to lay out an array: `layout(x)` is equal to x and has memory of its own.

    keeps_values: False for zero strides, which repeat the first entry along an axis.
    """

    name: str
    arrange: Callable[[Array], Array]
    keeps_values: bool = True

    def __call__(self, array: Array) -> Array:
        """Return `array` laid out this way."""
        return self.arrange(array)

    def __repr__(self) -> str:
        return f"<layout {self.name}>"


def _permuted(x: Array) -> Array:
    """Return x with its last axis outermost in memory, as NHWC is to NCHW."""
    if x.ndim < 2:
        return x.copy()
    xp = array_module(x)
    return xp.moveaxis(xp.moveaxis(x, -1, 0).copy(order="C"), 0, -1)


def _negative(x: Array) -> Array:
    xp = array_module(x)
    return xp.flip(xp.flip(x).copy())


def _strided(x: Array) -> Array:
    """Return x with a gap behind every entry of its last axis, and unequal values in the gaps."""
    if x.ndim == 0:
        return x.copy()
    wide = x.repeat(2, axis=-1)
    wide[..., 1::2] = 1
    return wide[..., ::2]


def _read_only(x: Array) -> Array:
    x = x.copy()
    if isinstance(x, np.ndarray):  # a GPU's arrays are always writeable
        x.flags.writeable = False
    return x


def _zero_strides(x: Array) -> Array:
    """Return the first entry along axis 0, repeated by a stride of 0 (as broadcast_to does)."""
    return array_module(x).broadcast_to(x[:1].copy(), x.shape) if x.ndim else x.copy()


def _zero_strides_last(x: Array) -> Array:
    return array_module(x).broadcast_to(x[..., :1].copy(), x.shape) if x.ndim else x.copy()


LAYOUTS = (
    Layout("C", lambda x: x.copy(order="C")),
    Layout("Fortran", lambda x: x.copy(order="F")),
    Layout("permuted", _permuted),
    Layout("negative strides", _negative),
    Layout("strided", _strided),
    Layout("read-only", _read_only),
    Layout("zero strides", _zero_strides, keeps_values=False),
    Layout("zero strides, last axis", _zero_strides_last, keeps_values=False),
)
