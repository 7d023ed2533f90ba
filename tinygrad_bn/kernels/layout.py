"""How an array lies in memory, as the order of its axes there."""

from __future__ import annotations

from typing import Any

Axes = tuple[int, ...]


def dense_order(x: Any) -> Axes | None:
    """Return the order of axes in which x lies in memory without gaps, None if there is none."""
    if x.flags.c_contiguous:
        return tuple(range(x.ndim))
    order = tuple(sorted(range(x.ndim), key=lambda i: (-x.strides[i], i)))
    return order if x.transpose(order).flags.c_contiguous else None


def memory_order(x: Any, axis: Axes) -> Axes | None:
    """Return `dense_order` if the channel axes lie together in it, in x's order; else None."""
    order = dense_order(x)
    if order is None:
        return None
    first = order.index(axis[0])
    return order if order[first : first + len(axis)] == axis else None


def inverse(order: Axes) -> Axes:
    """Return the order that undoes a transposition by `order`.

    >>> inverse((2, 0, 1))
    (1, 2, 0)
    """
    return tuple(sorted(range(len(order)), key=order.__getitem__))
