"""Matrix products."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op

_CASES = (
    case((3, 4), (4, 2)),
    case((4,), (4, 2)),
    case((3, 4), (4,)),
    case((4,), (4,)),
    case((2, 3, 4), (4, 2)),
    case((2, 3, 4), (2, 4, 1)),
    case((2, 1, 3, 4), (3, 4, 2)),
    case((4,), (2, 4, 3)),
    case((2, 3, 4), (4,)),
    case((3, 4), (2, 4, 3)),
)


@op(domain=Domain((Real(), Real()), _CASES))
def matmul(x: Any, y: Any) -> Any:
    """Return the matrix product of x and y, with NumPy's rules.

    x: (..., n, k) or (k,). y: (..., k, m) or (k,). Leading axes broadcast.
    """
    out = x @ y
    # NumPy has no product of bfloat16: it computes one in float32, and leaves it there.
    return out.astype(x.dtype) if x.dtype == y.dtype != out.dtype else out


def _transposed(x: Any) -> Any:
    """Return a stack of matrices with each matrix transposed."""
    return x.transpose((*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def _as_matrices(g: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
    """Return g, x, y as stacks of matrices: a vector x as one row, a vector y as one column."""
    if y.ndim == 1:
        y, g = y.reshape((-1, 1)), g.reshape((*g.shape, 1))
        if x.ndim == 1:
            return g.reshape((1, 1)), x.reshape((1, -1)), y
        return g, x, y
    if x.ndim == 1:
        x, g = x.reshape((1, -1)), g.reshape((*g.shape[:-1], 1, g.shape[-1]))
    return g, x, y


def _matmul_vjp_x(g: Any, x: Any, y: Any) -> Any:
    # G Yᵀ
    vector = x.ndim == 1
    g, x, y = _as_matrices(g, x, y)
    if x.ndim == 2 and g.ndim > 2 and y.ndim == g.ndim and not vector:
        # One matrix x met a stack: join the stack's columns, one product instead of a sum of many.
        return matmul(_side_by_side(g), _transposed(_side_by_side(y)))
    gx = matmul(g, _transposed(y))
    return gx.reshape((*gx.shape[:-2], gx.shape[-1])) if vector else gx


def _matmul_vjp_y(g: Any, x: Any, y: Any) -> Any:
    # Xᵀ G
    vector = y.ndim == 1
    g, x, y = _as_matrices(g, x, y)
    if y.ndim == 2 and x.ndim > 2:
        # A stack met one matrix y: join the stack's rows, one product instead of a sum of many.
        x, g = x.reshape((-1, x.shape[-1])), g.reshape((-1, g.shape[-1]))
    gy = matmul(_transposed(x), g)
    return gy.reshape(gy.shape[:-1]) if vector else gy


def _side_by_side(x: Any) -> Any:
    """Return a stack (..., n, m) as one matrix (n, ... m)."""
    axes = (x.ndim - 2, *range(x.ndim - 2), x.ndim - 1)
    return x.transpose(axes).reshape((x.shape[-2], -1))


matmul.def_vjp(x=_matmul_vjp_x, y=_matmul_vjp_y)
matmul.use_kernels(
    numpy="tinygrad_bn.kernels.cpu.numpy_matmul", cuda="tinygrad_bn.kernels.cuda.matmul"
)
