"""Shapes, axes and memory layouts."""

from __future__ import annotations

from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tinygrad_bn.testing.layouts import LAYOUTS, Layout

Shape = tuple[int, ...]
T = TypeVar("T")


def shapes(
    *, min_dims: int = 0, max_dims: int = 4, min_side: int = 1, max_side: int = 5
) -> st.SearchStrategy[Shape]:
    """Return a strategy for shapes, shrinking to few and short axes.

    >>> from hypothesis import find
    >>> find(shapes(min_dims=2), lambda shape: True)
    (1, 1)
    """
    side = st.integers(min_side, max_side)
    return st.lists(side, min_size=min_dims, max_size=max_dims).map(tuple)


def broadcastable_shapes(
    count: int, *, max_dims: int = 3, min_side: int = 1, max_side: int = 4
) -> st.SearchStrategy[tuple[Shape, ...]]:
    """Return a strategy for `count` shapes that broadcast together.

    >>> from hypothesis import find
    >>> find(broadcastable_shapes(2), lambda pair: len(pair[0]) >= 1)
    ((1,), ())
    """
    if count == 1:
        return shapes(max_dims=max_dims, min_side=min_side, max_side=max_side).map(lambda s: (s,))
    return npst.mutually_broadcastable_shapes(
        num_shapes=count, max_dims=max_dims, min_side=min_side, max_side=max_side
    ).map(lambda drawn: drawn.input_shapes)


def axes(ndim: int) -> st.SearchStrategy[int | tuple[int, ...] | None]:
    """Return a strategy for what a reduction of `ndim` axes accepts: None, an axis, some axes.

    >>> from hypothesis import find
    >>> find(axes(3), lambda axis: isinstance(axis, int) and axis < 0)
    -1
    """
    if ndim == 0:
        return st.none()
    one = st.integers(-ndim, ndim - 1)
    several = st.lists(one, min_size=1, max_size=ndim, unique_by=lambda axis: axis % ndim).map(
        tuple
    )
    return st.none() | one | several


def layouts() -> st.SearchStrategy[Layout]:
    """Return a strategy for memory layouts: functions that lay out an equal array otherwise.

    >>> from hypothesis import find
    >>> find(layouts(), lambda layout: True).name
    'C'
    """
    return st.sampled_from(LAYOUTS)
