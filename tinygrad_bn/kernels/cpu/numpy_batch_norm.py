"""Batch norm in NumPy, a cache-sized block at a time, on several threads.

The generic form computes in float64 and walks over the whole tensor a dozen times. Here every
block is read twice forward (statistics, then y) and twice backward (two sums, then gx), in the
dtype of x (half precision: in float32), and what must be exact is kept in float64 per channel:

- The statistics are sums of d = x - shift and d², where the shift is a mean of the channel's first
  values. They do not cancel where the shift lies within the data, and where it turns out not to,
  they are taken again about the mean that was found. A constant channel has d = 0 and so exactly
  its constant as mean and exactly 0 as variance.
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
from tinygrad_bn.kernels.cpu.halves import narrow, widen, work_dtype

# Below this many entries the Python around each block costs more than the blocks save.
SMALLEST = 4096
# A mean within so many deviations of 0, or of the shift, costs under two bits, or under four.
NEAR, FAR = 3.0, 10.0
# Between these, var + eps and its powers that occur here are far from the ends of float32.
SMALLEST_VARIANCE, LARGEST_VARIANCE = 1e-24, 1e24
# Below this, a variance may come of squares that float32 rounded to subnormals, or to 0; and so
# may a sum of products.
SMALLEST_SQUARE = SMALLEST_SUM = 1e-30
# Values per channel are used as float32 where they are 0 or within these.
SMALLEST_VALUE, LARGEST_VALUE = 1e-35, 1e35


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
) -> Any:
    """Return what `ops.batch_norm.batch_norm` does without a mask, or NotImplemented."""
    blocks = blocks_for(x, axis, groups)
    if blocks is None:
        return NotImplemented
    laid = blocks.lay(x)
    found = []
    for part in blocks.parts(laid):
        mean, var = _statistics(blocks, part)
        if not in_range(var + eps) or not _trusted(blocks, part, var):
            return NotImplemented
        found.append((mean, var))
    out = blocks.empty(x.dtype)
    parts = zip(blocks.parts(laid), blocks.parts(out), found, strict=True)
    if not all(affine(blocks, part, *stats, weight, bias, eps, y) for part, y, stats in parts):
        return NotImplemented
    mean, var = (np.array(values).reshape(blocks.kept_shape) for values in zip(*found, strict=True))
    return saving(blocks.back(out), mean=mean, var=var, count=blocks.m)


def vjp(
    g: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
    axis: Axes,
    eps: float,
    groups: int,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of that op does without a mask, or NotImplemented."""
    blocks = blocks_for(x, axis, groups)
    if blocks is None or g.dtype != x.dtype or not in_range(var + eps):
        return NotImplemented
    gx = blocks.empty(x.dtype) if needs[0] else None
    total = np.zeros((2, blocks.channels))  # Σ g x̂ and Σ g
    for part, part_g, part_gx, mu, v in zip(
        blocks.parts(blocks.lay(x)),
        blocks.parts(blocks.lay(g)),
        [None] * groups if gx is None else blocks.parts(gx),
        mean.reshape(groups, -1),
        var.reshape(groups, -1),
        strict=True,
    ):
        sums = _vjp_of_group(blocks, part_g, part, mu, v, weight, eps, part_gx)
        if sums is None:
            return NotImplemented
        total += sums
    shape = tuple(x.shape[a] for a in axis)
    return (
        None if gx is None else blocks.back(gx),
        total[0].reshape(shape) if needs[1] else None,
        total[1].reshape(shape) if needs[2] else None,
        None,
    )


def _vjp_of_group(
    blocks: Blocks,
    laid_g: Array,
    laid: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    eps: float,
    gx: Array | None,
) -> tuple[Array, Array] | None:
    """Return Σ g x̂ and Σ g of one group, after writing its part of gx; None to decline."""
    sums = sums_of_products(blocks, laid_g, laid, mean, var)
    if sums is None:
        return None
    sum_g, sum_gd = sums
    s = 1 / np.sqrt(var + eps)
    sum_gx = s * sum_gd
    if gx is not None:
        # γ s (g - mean(g) - x̂ mean(g x̂)), collected by powers of x - high
        high = _high_part(blocks, mean, var)
        low = mean if high is None else mean - high
        scale = s if weight is None else s * weight.ravel()
        slope = -scale * s * sum_gx / blocks.m
        constant = -scale * sum_g / blocks.m - slope * low
        if not _combine(blocks, laid_g, laid, high, scale, slope, constant, gx):
            return None
    return sum_gx, sum_g


def blocks_for(x: Array, axis: Axes, groups: int = 1) -> Blocks | None:
    """Return how to walk over x, or None for what is left to the generic form."""
    dtype = work_dtype(x.dtype)
    if dtype is None or x.size < SMALLEST * groups:
        return None
    order = memory_order(x, axis)
    if order is None or (groups > 1 and order[0] != 0):
        return None
    return Blocks(x.shape, dtype, axis, order, groups)


def in_range(var: Array) -> bool:
    """Return whether float32 can be trusted with deviations √var; not where one is NaN."""
    return bool(((var >= SMALLEST_VARIANCE) & (var <= LARGEST_VARIANCE)).all())


def _trusted(blocks: Blocks, laid: Array, var: Array) -> bool:
    """Return whether channels of a variance near 0 are constant: else squares were lost."""
    small = var < SMALLEST_SQUARE
    if not small.any():
        return True
    values = laid.reshape(-1, blocks.channels, blocks.run)[:, small]
    return bool((values == values[:1, :, :1]).all())


def affine(
    blocks: Blocks,
    laid: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    near: float = NEAR,
) -> bool:
    """Write γ (x - mean) / √(var + eps) + β into `out`, laid out as `laid`; return whether the
    dtype of the work holds the values per channel, and nothing is written if it does not.

    near: of how many deviations a mean may be to go without subtraction; 0 where mean and var are
        not of x, which may be much nearer to the mean.
    """
    scale = 1 / np.sqrt(var + eps)
    if weight is not None:
        scale = scale * weight.ravel()
    high = _high_part(blocks, mean, var, near)
    low = mean if high is None else mean - high
    constant = -low * scale if bias is None else bias.ravel() - low * scale
    vectors = narrowed(blocks, scale, constant, *([] if high is None else [high]))
    if vectors is None:
        return False

    def apply(tasks: list[Task]) -> None:
        with np.errstate(all="ignore"):
            for _, (x, y), (a, b, *shift) in blocks.walk(tasks, (laid, out), vectors):
                d = y if y.dtype == blocks.dtype else _scratch("narrowed", blocks, x)
                x = widen(x, "x")
                if shift:
                    np.multiply(np.subtract(x, shift[0], out=d), a, out=d)
                else:
                    np.multiply(x, a, out=d)
                np.add(d, b, out=d)
                narrow(d, y)

    blocks.share_out(apply)
    return True


def _statistics(blocks: Blocks, laid: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, float64."""
    shift = _shift(blocks, laid)
    mean, var = _statistics_about(blocks, laid, shift)
    with np.errstate(all="ignore"):
        offset = mean if shift is None else mean - shift
        # A first value may be a stray, or the only one that is not.
        if (np.abs(offset) > FAR * np.sqrt(var)).any():
            return _statistics_about(blocks, laid, mean.astype(blocks.dtype))
    return mean, var


def _statistics_about(blocks: Blocks, laid: Array, shift: Array | None) -> tuple[Array, Array]:
    """Return mean and biased variance from the sums of d = x - shift and of d²."""

    def sums(tasks: list[Task]) -> Array:
        total = np.zeros((2, blocks.channels))
        vectors = [] if shift is None else [shift]
        with np.errstate(all="ignore"):
            for task, (x,), spread in blocks.walk(tasks, (laid,), vectors):
                d = widen(x, "x")
                if spread:
                    d = np.subtract(d, spread[0], out=_scratch("d", blocks, x))
                blocks.fold(total[0], column_sums(d), task.left, task.right)
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


def _high_part(blocks: Blocks, mean: Array, var: Array, near: float = NEAR) -> Array | None:
    """Return the mean rounded to the dtype of the work; None where 0 serves as well."""
    with np.errstate(all="ignore"):
        if (np.abs(mean) < near * np.sqrt(var)).all():
            return None
        return mean.astype(blocks.dtype).astype(np.float64)


def _sums_with_cotangent(
    blocks: Blocks, laid_g: Array, laid: Array, high: Array | None
) -> tuple[Array, Array]:
    """Return Σ g and Σ g (x - high) of each channel, float64."""
    vectors = [] if high is None else [high.astype(blocks.dtype)]

    def sums(tasks: list[Task]) -> Array:
        total = np.zeros((2, blocks.channels))
        with np.errstate(all="ignore"):
            for task, (g, x), spread in blocks.walk(tasks, (laid_g, laid), vectors):
                g, d = widen(g, "g"), widen(x, "x")
                if spread:
                    d = np.subtract(d, spread[0], out=_scratch("d", blocks, x))
                blocks.fold(total[0], column_sums(g), task.left, task.right)
                blocks.fold(total[1], np.einsum("rk,rk->k", g, d), task.left, task.right)
        return total

    first, second = np.sum(blocks.share_out(sums), axis=0)
    return first, second


def sums_of_products(
    blocks: Blocks, laid_g: Array, laid: Array, mean: Array, var: Array, near: float = NEAR
) -> tuple[Array, Array] | None:
    """Return Σ g and Σ g (x - mean) of each channel, float64; None where they left float32."""
    high = _high_part(blocks, mean, var, near)
    sum_g, sum_gd = _sums_with_cotangent(blocks, laid_g, laid, high)
    lost = (np.abs(sum_gd) < SMALLEST_SUM) & (sum_g != 0) & (var > 0)
    if lost.any() or not (np.isfinite(sum_g).all() and np.isfinite(sum_gd).all()):
        return None
    # Σ g (x - mean) = Σ g (x - high) - low Σ g
    return sum_g, sum_gd - (mean if high is None else mean - high) * sum_g


def _combine(
    blocks: Blocks,
    laid_g: Array,
    laid: Array,
    high: Array | None,
    scale: Array,
    slope: Array,
    constant: Array,
    out: Array,
) -> bool:
    """Write scale · g + slope · (x - high) + constant into `out`; return as `affine` does."""
    vectors = narrowed(blocks, scale, slope, constant, *([] if high is None else [high]))
    if vectors is None:
        return False

    def combine(tasks: list[Task]) -> None:
        with np.errstate(all="ignore"):
            for _, (g, x, y), (a, b, c, *shift) in blocks.walk(tasks, (laid_g, laid, out), vectors):
                d = _scratch("d", blocks, x)
                work = y if y.dtype == blocks.dtype else _scratch("narrowed", blocks, x)
                g, x = widen(g, "g"), widen(x, "x")
                if shift:
                    np.multiply(np.subtract(x, shift[0], out=d), b, out=d)
                else:
                    np.multiply(x, b, out=d)
                np.add(d, c, out=d)
                np.add(np.multiply(g, a, out=work), d, out=work)
                narrow(work, y)

    blocks.share_out(combine)
    return True


def column_sums(block: Array) -> Array:
    """Return the sum of each column: a matrix product is the fastest sum over rows there is."""
    if len(block) == 1:
        return block[0]
    return np.ones(len(block), block.dtype) @ block


def _scratch(name: str, blocks: Blocks, like: Array) -> Array:
    return threads.scratch(name, like.shape, blocks.dtype)


def narrowed(blocks: Blocks, *vectors: Array) -> list[Array] | None:
    """Return values per channel in the dtype of the work, None where one is beyond its range."""
    for vector in vectors:
        size = np.abs(vector)
        if ((size > LARGEST_VALUE) | ((size < SMALLEST_VALUE) & (size > 0))).any():
            return None
    return [vector.astype(blocks.dtype) for vector in vectors]
