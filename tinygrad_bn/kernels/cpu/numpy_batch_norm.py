"""Batch norm in NumPy, a cache-sized block at a time, on several threads.

The generic form computes in float64 and walks over the whole tensor a dozen times. Here every
block is read twice forward (statistics, then y) and twice backward (two sums, then gx), in the
dtype of x, and what must be exact is kept in float64 per channel:

- The statistics are sums of d = x - shift and d², where the shift is a mean of the channel's first
  values. They do not cancel, since the shift lies within the data; a constant channel has d = 0 and
  so exactly its constant as mean and exactly 0 as variance.
- The mean is used as a high and a low part in the dtype of x: x - high is exact where the mean is
  far larger than the spread, and the low part goes into the constant that is added anyway.
- Where no channel's mean is far from 0, measured by its spread, shift and high part are left out:
  there is nothing that a subtraction could save.

What leaves the range of float32 is noticed (not finite, or too small to trust) and declined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.kernels.cpu.channel_blocks import Array, Axes, Blocks, Task, memory_order

# Below this many entries the Python around each block costs more than the blocks save.
SMALLEST = 4096
# A mean within so many deviations of 0 costs under two bits without a shift.
NEAR = 3.0
# Between these, var + eps and its powers that occur here are far from the ends of float32.
SMALLEST_VARIANCE, LARGEST_VARIANCE = 1e-24, 1e24
# A sum of products below this may consist of products that float32 rounded to 0.
SMALLEST_SUM = 1e-30


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
) -> Any:
    """Return what `ops.batch_norm.batch_norm` returns, or NotImplemented."""
    blocks = blocks_for(x, axis)
    if blocks is None or mask is not None or groups != 1:
        return NotImplemented
    laid = blocks.lay(x)
    mean, var = _statistics(blocks, laid)
    if not in_range(var + eps):
        return NotImplemented
    out = affine(blocks, laid, mean, var, weight, bias, eps)
    kept = blocks.kept_shape
    return saving(blocks.back(out), mean=mean.reshape(kept), var=var.reshape(kept), count=blocks.m)


def vjp(
    g: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mask: Array | None,
    mean: Array,
    var: Array,
    axis: Axes,
    eps: float,
    groups: int,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.batch_norm.batch_norm` returns, or NotImplemented."""
    blocks = blocks_for(x, axis)
    if blocks is None or mask is not None or groups != 1 or g.dtype != x.dtype:
        return NotImplemented
    mean, var = mean.ravel(), var.ravel()
    if not in_range(var + eps):
        return NotImplemented
    s = 1 / np.sqrt(var + eps)
    high = _high_part(blocks, mean, var)
    low = mean if high is None else mean - high
    laid, laid_g = blocks.lay(x), blocks.lay(g)
    # Σ g and Σ g (x - high); from them Σ g x̂ = s (Σ g (x - high) - low Σ g)
    sum_g, sum_gd = _sums_with_cotangent(blocks, laid_g, laid, high)
    sum_gx = s * (sum_gd - low * sum_g)
    lost = (np.abs(sum_gd) < SMALLEST_SUM) & (sum_g != 0) & (var > 0)
    if lost.any() or not (np.isfinite(sum_g).all() and np.isfinite(sum_gx).all()):
        return NotImplemented
    gx = None
    if needs[0]:
        # γ s (g - mean(g) - x̂ mean(g x̂)), collected by powers of x - high
        scale = s if weight is None else s * weight.ravel()
        slope = -scale * s * sum_gx / blocks.m
        constant = -scale * sum_g / blocks.m - slope * low
        gx = blocks.back(_combine(blocks, laid_g, laid, high, scale, slope, constant))
    shape = tuple(x.shape[a] for a in axis)
    return (
        gx,
        sum_gx.reshape(shape) if needs[1] else None,
        sum_g.reshape(shape) if needs[2] else None,
        None,
    )


def blocks_for(x: Array, axis: Axes) -> Blocks | None:
    """Return how to walk over x, or None for what is left to the generic form."""
    if x.size < SMALLEST or x.dtype not in (np.float16, np.float32, np.float64):
        return None
    order = memory_order(x, axis)
    return None if order is None else Blocks(x.shape, x.dtype, axis, order)


def in_range(var: Array) -> bool:
    """Return whether float32 can be trusted with deviations √var; not where one is NaN."""
    return bool(((var >= SMALLEST_VARIANCE) & (var <= LARGEST_VARIANCE)).all())


def affine(
    blocks: Blocks,
    laid: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
) -> Array:
    """Return γ (x - mean) / √(var + eps) + β, laid out as `laid`."""
    scale = 1 / np.sqrt(var + eps)
    if weight is not None:
        scale = scale * weight.ravel()
    high = _high_part(blocks, mean, var)
    low = mean if high is None else mean - high
    constant = -low * scale if bias is None else bias.ravel() - low * scale
    out = blocks.empty(laid.dtype)
    same = laid.dtype == blocks.dtype

    def apply(tasks: list[Task]) -> None:
        vectors = _narrowed(blocks, scale, constant, *([] if high is None else [high]))
        with np.errstate(all="ignore"):
            for _, (x, y), (a, b, *shift) in blocks.walk(tasks, (laid, out), vectors):
                d = y if same else _scratch(blocks, x)
                if shift:
                    np.multiply(np.subtract(x, shift[0], out=d), a, out=d)
                else:
                    np.multiply(x, a, out=d, dtype=blocks.dtype)
                np.add(d, b, out=y, casting="same_kind")

    blocks.share_out(apply)
    return out


def _statistics(blocks: Blocks, laid: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, float64."""
    shift = _shift(blocks, laid)

    def sums(tasks: list[Task]) -> Array:
        total = np.zeros((2, blocks.channels))
        vectors = [] if shift is None else [shift]
        with np.errstate(all="ignore"):
            for task, (x,), spread in blocks.walk(tasks, (laid,), vectors):
                d = x
                if spread:
                    d = np.subtract(x, spread[0], out=_scratch(blocks, x))
                elif x.dtype != blocks.dtype:
                    d = x.astype(blocks.dtype)
                blocks.fold(total[0], _column_sums(d), task.left, task.right)
                squares = np.einsum("rk,rk->k", d, d)
                blocks.fold(total[1], squares, task.left, task.right)
        return total

    first, second = np.sum(blocks.share_out(sums), axis=0)
    with np.errstate(all="ignore"):
        offset = first / blocks.m
        var = np.maximum(second / blocks.m - offset * offset, 0.0)
    return (offset if shift is None else shift.astype(np.float64) + offset), var


def _shift(blocks: Blocks, laid: Array) -> Array | None:
    """Return a value within each channel's data, in the dtype of the work; None where 0 serves.

    It is the mean of the channel's first values: exactly the constant of a constant channel, whose
    sum in float64 is exact.
    """
    head = laid.reshape(-1)[: blocks.period * max(1, min(blocks.m // blocks.run, 64 // blocks.run))]
    head = head.reshape(-1, blocks.channels, blocks.run).astype(np.float64)
    with np.errstate(all="ignore"):
        mean, spread = head.mean(axis=(0, 2)), head.std(axis=(0, 2))
        return None if (np.abs(mean) < NEAR * spread).all() else mean.astype(blocks.dtype)


def _high_part(blocks: Blocks, mean: Array, var: Array) -> Array | None:
    """Return the mean rounded to the dtype of the work; None where 0 serves as well."""
    with np.errstate(all="ignore"):
        if (np.abs(mean) < NEAR * np.sqrt(var)).all():
            return None
        return mean.astype(blocks.dtype).astype(np.float64)


def _sums_with_cotangent(
    blocks: Blocks, laid_g: Array, laid: Array, high: Array | None
) -> tuple[Array, Array]:
    """Return Σ g and Σ g (x - high) of each channel, float64."""

    def sums(tasks: list[Task]) -> Array:
        total = np.zeros((2, blocks.channels))
        vectors = [] if high is None else _narrowed(blocks, high)
        with np.errstate(all="ignore"):
            for task, (g, x), spread in blocks.walk(tasks, (laid_g, laid), vectors):
                d = np.subtract(x, spread[0], out=_scratch(blocks, x)) if spread else x
                if g.dtype != blocks.dtype:
                    g, d = g.astype(blocks.dtype), d.astype(blocks.dtype, copy=False)
                blocks.fold(total[0], _column_sums(g), task.left, task.right)
                blocks.fold(total[1], np.einsum("rk,rk->k", g, d), task.left, task.right)
        return total

    first, second = np.sum(blocks.share_out(sums), axis=0)
    return first, second


def _combine(
    blocks: Blocks,
    laid_g: Array,
    laid: Array,
    high: Array | None,
    scale: Array,
    slope: Array,
    constant: Array,
) -> Array:
    """Return scale · g + slope · (x - high) + constant, laid out as `laid`."""
    out = blocks.empty(laid.dtype)
    same = laid.dtype == blocks.dtype

    def combine(tasks: list[Task]) -> None:
        vectors = _narrowed(blocks, scale, slope, constant, *([] if high is None else [high]))
        with np.errstate(all="ignore"):
            for _, (g, x, y), (a, b, c, *shift) in blocks.walk(tasks, (laid_g, laid, out), vectors):
                d = _scratch(blocks, x)
                if shift:
                    np.multiply(np.subtract(x, shift[0], out=d), b, out=d)
                else:
                    np.multiply(x, b, out=d, dtype=blocks.dtype)
                np.add(d, c, out=d)
                if same:
                    np.add(np.multiply(g, a, out=y), d, out=y)
                else:
                    np.add(g * a, d, out=y, casting="same_kind")

    blocks.share_out(combine)
    return out


def _column_sums(block: Array) -> Array:
    """Return the sum of each column: a matrix product is the fastest sum over rows there is."""
    return np.ones(len(block), block.dtype) @ block


def _scratch(blocks: Blocks, like: Array) -> Array:
    return threads.scratch("batch_norm", like.shape, blocks.dtype)


def _narrowed(blocks: Blocks, *vectors: Array) -> list[Array]:
    with np.errstate(all="ignore"):
        return [vector.astype(blocks.dtype) for vector in vectors]
