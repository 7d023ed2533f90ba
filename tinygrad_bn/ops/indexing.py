"""Reading and writing parts of an array: `getitem`, and the two ops that put entries back.

An index is anything NumPy accepts: integers, slices, None, Ellipsis, integer and boolean arrays.
Arrays (and Tensors) in it must be on the device of what is indexed, as all that an op is given is;
lists go along.
"""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module, backend_of, extremes, placed
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op

_INDICES: tuple[tuple[tuple[int, ...], Any, tuple[int, ...]], ...] = (
    ((4, 3), (slice(1, 3),), (2, 3)),
    ((4, 3), (2, slice(None, None, -1)), (3,)),
    ((2, 3), (Ellipsis, None, 1), (2, 1)),
    ((4, 3), ([0, 2, 2],), (3, 3)),
    ((4, 3), ([0, 3, 0], [1, 1, 1]), (3,)),
    ((2, 2), ([[True, False], [True, True]],), (3,)),
)


def is_basic(index: Any) -> bool:
    """Return whether an index has only integers, slices, None and Ellipsis: no entry twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (isinstance(part, int) and not isinstance(part, bool))
        for part in parts
    )


def check_index(name: str, x: Any, shape: tuple[int, ...], index: Any) -> None:
    """Raise ValueError for arrays in `index` on another device than x, and IndexError for integers
    among them that are out of bounds of `shape`, where a GPU would wrap them round and is to be
    asked (see `check_data`); NumPy looks for itself."""
    parts = index if isinstance(index, tuple) else (index,)
    arrays = [part for part in parts if hasattr(part, "dtype")]
    placed(name, (x, *arrays))
    if not any(backend_of(array).accelerator is not None for array in arrays):
        return
    widths = [_axes_taken(part) for part in parts]
    rest = len(shape) - sum(widths)
    axis = 0
    for part, width in zip(parts, widths, strict=True):
        if part is Ellipsis:
            axis += rest
        if hasattr(part, "dtype") and part.dtype.kind in "iu":
            found = extremes(part)
            if found is not None and not -shape[axis] <= found[0] <= found[1] < shape[axis]:
                raise IndexError(
                    f"{name}: indices range from {found[0]} to {found[1]}, but axis {axis} of the "
                    f"shape {shape} has the entries 0 to {shape[axis] - 1}"
                )
        axis += width


def _axes_taken(part: Any) -> int:
    """Return how many axes a part of an index stands for."""
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if hasattr(part, "dtype") and part.dtype.kind == "b" else 1


@op(view=True, domain=Domain(cases=tuple(case(shape, index=i) for shape, i, _ in _INDICES)))
def getitem(x: Any, *, index: Any) -> Any:
    """Return x[index]: a view for a basic index, even of one entry; a copy for an advanced one."""
    check_index("getitem", x, x.shape, index)
    out = x[index]
    if hasattr(out, "base") and type(out) is type(x):
        return out
    # NumPy copies a single entry into a scalar; CuPy gives a view. With an Ellipsis both do.
    return x[(*(index if isinstance(index, tuple) else (index,)), Ellipsis)]


getitem.def_vjp(x=lambda g, x_shape, index: scatter_add(g, index=index, shape=x_shape))


@op(domain=Domain(cases=tuple(case(part, index=i, shape=shape) for shape, i, part in _INDICES)))
def scatter_add(x: Any, *, index: Any, shape: tuple[int, ...]) -> Any:
    """Return zeros of `shape` to whose entries at `index` x was added, repeated entries repeatedly.

    It is the transpose of `getitem`, and `getitem` is its.
    """
    check_index("scatter_add", x, shape, index)
    xp = array_module(x)
    out = xp.zeros(shape, dtype=x.dtype)
    if is_basic(index):
        out[index] = x
    else:
        xp.add.at(out, index, x)
    return out


scatter_add.def_vjp(x=lambda g, index: g[index])


@op(
    domain=Domain(
        (Real(), Real()),
        (
            case((4, 3), (2, 3), index=(slice(1, 3),)),
            case((4, 3), (3,), index=(slice(1, 3),)),
            case((4, 3), (), index=(0, 1)),
            case((4, 3), (2, 3), index=([3, 0],)),
        ),
    )
)
def setitem(x: Any, value: Any, *, index: Any) -> Any:
    """Return a copy of x with `value`, broadcast, at `index`.

    If an integer-array index names an entry twice, which value it keeps is left open, as in NumPy,
    and both receive its cotangent.
    """
    check_index("setitem", x, x.shape, index)
    out = x.copy()
    out[index] = value
    return out


setitem.def_vjp(
    x=lambda g, index: setitem(g, 0, index=index),
    value=lambda g, index: g[index],
)
