"""Batch norm and ReLU in the passes of batch norm alone: see `numba_batch_norm`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.kernels.cpu import numba_batch_norm
from tinygrad_bn.kernels.cpu.numba_batch_norm import Array, Axes


def served(x: Array, residual: Array | None) -> bool:
    """Return whether ReLU may look at y before it is rounded: where rounding makes no 0 of it."""
    return residual is None and x.dtype.itemsize > 2


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    axis: Axes,
    eps: float,
) -> Any:
    """Return what `ops.fused.batch_norm_relu` returns, or NotImplemented."""
    if not served(x, residual):
        return NotImplemented
    return numba_batch_norm.forward(x, weight, bias, axis=axis, eps=eps, relu=True)


def vjp(
    g: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    mean: Array,
    var: Array,
    axis: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.fused.batch_norm_relu` returns, or NotImplemented."""
    if not served(x, residual):
        return NotImplemented
    return numba_batch_norm.vjp(g, x, weight, bias, mean, var, axis, eps, 1, needs, relu=True)
