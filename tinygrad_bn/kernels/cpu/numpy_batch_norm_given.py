"""Batch norm with given statistics in NumPy, a cache-sized block at a time, on several threads."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.channel_blocks import Array, Axes
from tinygrad_bn.kernels.cpu.numpy_batch_norm import (
    affine,
    blocks_for,
    in_range,
    sums_of_products,
)


def forward(
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes,
    eps: float,
) -> Any:
    """Return what `ops.batch_norm.batch_norm_given` returns, or NotImplemented."""
    blocks = blocks_for(x, axis)
    mean, var = mean.ravel().astype(np.float64), var.ravel().astype(np.float64)
    if blocks is None or not in_range(var + eps):
        return NotImplemented
    out = blocks.empty(x.dtype)
    if not affine(blocks, blocks.lay(x), mean, var, weight, bias, eps, out, near=0.0):
        return NotImplemented
    return blocks.back(out)


def vjp(
    g: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    axis: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.batch_norm.batch_norm_given` returns, or NotImplemented."""
    blocks = blocks_for(x, axis)
    mean, var = mean.ravel().astype(np.float64), var.ravel().astype(np.float64)
    if blocks is None or g.dtype != x.dtype or not in_range(var + eps):
        return NotImplemented
    laid_g, gx = blocks.lay(g), None
    if needs[0]:
        gx = blocks.empty(x.dtype)
        # γ s g is affine in g: the forward with mean 0 and no bias.
        if not affine(blocks, laid_g, np.zeros_like(mean), var, weight, None, eps, gx):
            return NotImplemented
        gx = blocks.back(gx)
    sums: Any = np.zeros((2, blocks.channels))
    if any(needs[1:]):
        sums = sums_of_products(blocks, laid_g, blocks.lay(x), mean, var, near=0.0)
        if sums is None:
            return NotImplemented
    sum_g, sum_gd = sums
    s = 1 / np.sqrt(var + eps)
    scale = s if weight is None else s * weight.ravel()
    shape = tuple(x.shape[a] for a in axis)
    vectors = (-scale * sum_g, -0.5 * scale * s * s * sum_gd, s * sum_gd, sum_g)
    wanted = zip(vectors, needs[1:], strict=True)
    return (gx, *(vector.reshape(shape) if need else None for vector, need in wanted))
