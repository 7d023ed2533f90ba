"""Batch norm and ReLU on a GPU in the launches of batch norm alone: see `batch_norm`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.kernels.cuda import batch_norm
from tinygrad_bn.kernels.layout import Axes


def forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    residual: Any = None,
    *,
    axis: Axes,
    eps: float,
) -> Any:
    """Return what `ops.fused.batch_norm_relu` returns, or NotImplemented."""
    if residual is not None:  # its gradient takes the output, which the rule does not keep
        return NotImplemented
    return batch_norm.normalized(x, weight, bias, axis=axis, eps=eps, relu=True)


def vjp(
    g: Any,
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    mean: Any,
    var: Any,
    axis: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.fused.batch_norm_relu` returns, or NotImplemented."""
    if residual is not None:
        return NotImplemented
    call = (g, x, weight, bias, None, mean, var)
    grads = batch_norm.gradients(*call, axis=axis, eps=eps, needs=needs, relu=True)
    return grads if grads is NotImplemented else (*grads, None)[: len(needs)]
