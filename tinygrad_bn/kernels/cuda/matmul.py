"""Matrix products by cuBLAS: NumPy's rules, and arrays of any strides, made into one call."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.cuda.blas import SERVED, Matrices

Shape = tuple[int, ...]


def forward(x: Any, y: Any) -> Any:
    """Return what `ops.linalg.matmul` returns, or NotImplemented.

    x: (..., n, k) or (k,). y: (..., k, m) or (k,). Floating; half precision is added up in float32
    and rounded once. float32 is computed in float32 (see `allow_tf32`).
    """
    blas = launch.runtime().blas
    dtype = array_module(x).result_type(x.dtype, y.dtype)
    if blas is None or dtype.name not in SERVED or not (x.size and y.size):
        return NotImplemented
    if not (x.ndim and y.ndim) or x.shape[-1] != y.shape[-2 if y.ndim > 1 else 0]:
        return NotImplemented  # the generic form says what is wrong
    out_shape = _out_shape(x.shape, y.shape)
    if out_shape is None:
        return NotImplemented
    with launch.on_device_of(x):
        x, y = x.astype(dtype, copy=False), y.astype(dtype, copy=False)
        x = x.reshape((1, -1)) if x.ndim == 1 else x
        y = y.reshape((-1, 1)) if y.ndim == 1 else y
        if x.ndim > 2 and y.ndim == 2:
            x = x.reshape((-1, x.shape[-1]))  # all rows of the stack in one product
        out = _multiply(blas, x, y)
    return out.reshape(out_shape)


def _out_shape(x: Shape, y: Shape) -> Shape | None:
    """Return the shape of the product, or None where the stacks do not broadcast."""
    stack = _broadcast(x[:-2], y[:-2])
    if stack is None:
        return None
    return (*stack, *x[-2:-1], *(y[-1:] if len(y) > 1 else ()))


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    length = max(len(a), len(b))
    a, b = (1,) * (length - len(a)) + a, (1,) * (length - len(b)) + b
    if any(n != m and 1 not in (n, m) for n, m in zip(a, b, strict=True)):
        return None
    return tuple(m if n == 1 else n for n, m in zip(a, b, strict=True))


def _multiply(blas: Any, x: Any, y: Any) -> Any:
    """Return the product of two stacks of matrices, or of one matrix and a stack of them."""
    xp = array_module(x)
    stack: Any = _broadcast(x.shape[:-2], y.shape[:-2])
    n, k, m = x.shape[-2], x.shape[-1], y.shape[-1]
    x, left = _matrices(x, stack)
    y, right = _matrices(y, stack)
    out = xp.empty((*stack, n, m), dtype=x.dtype)
    product = Matrices(launch.runtime().address(out), False, m, n * m)
    # BLAS reads memory column by column, in which rows of ours are columns: it sees every matrix
    # transposed, and is asked for outᵀ = yᵀ xᵀ.
    blas.multiply(x.dtype.name, (m, n, k, math.prod(stack)), right, left, product)
    return out


def _matrices(x: Any, stack: Shape) -> tuple[Any, Matrices]:
    """Return x, copied if need be, and how BLAS is to read it: once for each of `stack`.

    The array is returned to be kept: until the product is under way, its memory is in use.
    """
    xp = array_module(x)
    count = math.prod(stack)
    if math.prod(x.shape[:-2]) not in (1, count):
        x = xp.broadcast_to(x, (*stack, *x.shape[-2:]))
    layout = _layout(x)
    if layout is None:
        x = xp.ascontiguousarray(x)
        layout = False, x.shape[-1]
    stride = 0 if math.prod(x.shape[:-2]) == 1 else _stack_stride(x)
    if stride is None:
        x = xp.ascontiguousarray(x)
        layout, stride = (False, x.shape[-1]), x.shape[-2] * x.shape[-1]
    return x, Matrices(launch.runtime().address(x), layout[0], layout[1], stride)


def _layout(x: Any) -> tuple[bool, int] | None:
    """Return whether the matrices of x stand column by column, and the entries from one row (or
    column) to the next; None if they stand in neither way.

    The stride along an axis of size 1 says nothing.
    """
    (rows, columns), (down, across) = x.shape[-2:], x.strides[-2:]
    size = x.itemsize
    if columns == 1 or across == size:
        if rows == 1:
            return False, columns
        if down % size == 0 and down >= columns * size:
            return False, down // size
    if (rows == 1 or down == size) and columns > 1 and across % size == 0 and across >= rows * size:
        return True, across // size
    return None


def _stack_stride(x: Any) -> int | None:
    """Return the entries from one matrix of a stack to the next, or None if they are not even."""
    sizes, strides = x.shape[:-2], x.strides[:-2]
    axes = [(n, s) for n, s in zip(sizes, strides, strict=True) if n > 1]
    for (_, outer), (n, inner) in pairwise(axes):
        if outer != n * inner:
            return None
    step = axes[-1][1]
    return step // x.itemsize if step >= 0 and step % x.itemsize == 0 else None
