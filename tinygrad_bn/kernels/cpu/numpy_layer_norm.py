"""Layer, group and instance norm in NumPy: rows normalized in cache, on several threads.

All that a row needs is computed while its block is in cache, in the dtype of x (half precision: in
float32): its mean, which is subtracted as a high and a low part, so that a constant row is exactly
0 and a mean far from 0 costs no digits, then the variance of what is left, then y. What leaves the
range of float32 is declined. Instance norm with channels last, whose rows do not lie together, is
batch norm with a group for each sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import memory, numpy_batch_norm, threads
from tinygrad_bn.kernels.cpu.halves import narrow, widen
from tinygrad_bn.kernels.cpu.rows import Array, Axes, Block, along, dots, rows_of

# A variance below this may come of squares that float32 rounded to subnormals, or to 0.
SMALLEST_SQUARE = 1e-30
# What is nearer to the ends of float32 may have lost what it is made of: products of γ and g.
SMALLEST_GAMMA, LARGEST_MEAN = 1e-8, 1e30
# Where the variance is so much less than ε, x̂ is so small that products with it may be lost.
SMALLEST_SHARE = 1e-16


class OutOfRangeError(Exception):
    """What is computed left the range in which the dtype of the work can be trusted."""


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes,
    channels: Axes,
    eps: float,
) -> Any:
    """Return what `ops.normalization.layer_norm` returns, or NotImplemented."""
    if _per_sample(x, axis, channels):
        found = numpy_batch_norm.forward(x, weight, bias, axis=channels, eps=eps, groups=x.shape[0])
        if found is NotImplemented:
            return NotImplemented
        shape = tuple(size if i in axis else 1 for i, size in enumerate(x.shape))
        mean, var = (found.residuals[name].reshape(shape) for name in ("mean", "var"))
        return saving(found.out, mean=mean, var=var)
    normalized = normalize_rows(x, weight, bias, axis, channels, eps, centred=True)
    if normalized is None:
        return NotImplemented
    out, mean, var = normalized
    return saving(out, mean=mean, var=var)


def vjp(
    g: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    var: Array,
    axis: Axes,
    channels: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.normalization.layer_norm` returns, or NotImplemented."""
    if _per_sample(x, axis, channels):
        grads = numpy_batch_norm.vjp(
            g, x, weight, None, mean, var, channels, eps, x.shape[0], needs
        )
        return grads if grads is NotImplemented else grads[:3]
    grads = pull_back_rows(g, x, weight, mean, var, axis, channels, eps, needs)
    return NotImplemented if grads is None else grads


def _per_sample(x: Array, axis: Axes, channels: Axes) -> bool:
    """Return whether this is instance norm with channels last: one mean for each γ and sample."""
    return axis == (0, *channels) and channels[0] > 1


def normalize_rows(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    axis: Axes,
    channels: Axes,
    eps: float,
    centred: bool,
) -> tuple[Array, Array, Array] | None:
    """Return y, the mean and the mean square deviation of each row; None to decline.

    centred: False leaves the mean in, as RMS norm does; what is returned for it is then 0.
    """
    rows = rows_of(x, axis, channels)
    if rows is None:
        return None
    out = memory.empty(x.shape, x.dtype)
    source, target = rows.matrix(x), rows.matrix(out)
    gamma, beta = rows.spread(weight), rows.spread(bias)
    mean, square = np.zeros((2, rows.count))

    def work(blocks: list[Block]) -> None:
        with np.errstate(all="ignore"):
            for block in blocks:
                part = slice(block.top, block.bottom)
                d, y = widen(source[part], "x"), target[part]
                work = y if y.dtype == rows.dtype else _scratch("narrowed", d)
                if centred:
                    d = _centre(d, mean[part], work)
                square[part] = dots(d, d) / rows.length
                scale = _scale(d, square[part], eps)
                np.multiply(d, scale[:, None], out=work)
                _times(work, gamma, block)
                if beta is not None:
                    samples = _samples(work, block)
                    np.add(samples, along(beta, block), out=samples)
                narrow(work, y)

    try:
        rows.share_out(work)
    except OutOfRangeError:
        return None
    return out, mean.reshape(rows.kept_shape), square.reshape(rows.kept_shape)


def _centre(x: Array, mean: Array, out: Array) -> Array:
    """Return x minus the mean of each row, in `out`; write the means, float64, into `mean`."""
    high = (dots(x) / x.shape[1]).astype(x.dtype)
    np.subtract(x, high[:, None], out=out)
    low = dots(out) / x.shape[1]
    np.subtract(out, low.astype(x.dtype)[:, None], out=out)
    np.add(high, low, out=mean)
    return out


def _scale(d: Array, square: Array, eps: float) -> Array:
    """Return 1 / √(square + ε) of each row in the dtype of d; raise where it is not to be trusted.

    d: what was squared: a row of a square near 0 must be 0 throughout.
    """
    if not numpy_batch_norm.in_range(square + eps):
        raise OutOfRangeError
    small = square < SMALLEST_SQUARE
    if small.any() and d[small].any():
        raise OutOfRangeError
    return (1 / np.sqrt(square + eps)).astype(d.dtype)


def pull_back_rows(
    g: Array,
    x: Array,
    weight: Array | None,
    mean: Array | None,
    square: Array,
    axis: Axes,
    channels: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> tuple[Array | None, ...] | None:
    """Return the cotangents of x, weight and bias; None to decline.

    mean: None where the mean was left in.
    """
    rows = rows_of(x, axis, channels)
    square = square.ravel()
    lost = (square > 0) & (square < SMALLEST_SHARE * (square + eps))
    if rows is None or g.dtype != x.dtype or not g.flags.c_contiguous or lost.any():
        return None
    if not numpy_batch_norm.in_range(square + eps):
        return None
    gx = memory.empty(x.shape, x.dtype) if needs[0] else None
    source, cotangent = rows.matrix(x), rows.matrix(g)
    target = None if gx is None else rows.matrix(gx)
    gamma = rows.spread(weight)
    if gamma is not None and not _spans(gamma):
        return None
    scale = (1 / np.sqrt(square + eps)).astype(rows.dtype)[:, None]
    means = None if mean is None else mean.reshape(-1, 1)

    def work(blocks: list[Block]) -> Array:
        total = np.zeros((2, rows.places, rows.length))
        with np.errstate(all="ignore"):
            for block in blocks:
                part = slice(block.top, block.bottom)
                x_hat = _x_hat(source[part], None if means is None else means[part], scale[part])
                h = widen(cotangent[part], "g")
                product = _scratch("d", h)
                if needs[1]:
                    rows.add_columns(total[0], np.multiply(h, x_hat, out=product), block)
                if any(needs[2:]):
                    rows.add_columns(total[1], h, block)
                if target is None:
                    continue
                h = _scaled(h, gamma, block, product)
                out = target[part]
                work = out if out.dtype == rows.dtype else _scratch("narrowed", h)
                _project(h, x_hat, mean is not None, work)
                np.multiply(work, scale[part], out=work)
                narrow(work, out)
        return total

    try:
        sums = np.sum(rows.share_out(work), axis=0)
    except OutOfRangeError:
        return None
    if not np.isfinite(sums).all():
        return None
    sums = [rows.fold(total).reshape([x.shape[a] for a in channels]) for total in sums]
    return (gx, *(total if need else None for total, need in zip(sums, needs[1:], strict=False)))


def _x_hat(x: Array, mean: Array | None, scale: Array) -> Array:
    """Return (x - mean) · scale in scratch."""
    d = widen(x, "x")
    out = _scratch("x_hat", d)
    if mean is None:
        return np.multiply(d, scale, out=out)
    high = mean.astype(d.dtype)
    np.subtract(d, high, out=out)
    np.subtract(out, (mean - high).astype(d.dtype), out=out)
    return np.multiply(out, scale, out=out)


def _project(h: Array, x_hat: Array, centred: bool, out: Array) -> None:
    """Write h - x̂ mean(h x̂), and without its mean if `centred`, into `out`; x̂ is overwritten.

    Raises where an h has become infinite, which none of its means can hide, or is nearly so.
    """
    means = [dots(h, x_hat), dots(h)] if centred else [dots(h, x_hat)]
    slope, *level = (mean[:, None] / h.shape[1] for mean in means)
    if not all((np.abs(mean) <= LARGEST_MEAN).all() for mean in (slope, *level)):
        raise OutOfRangeError
    np.multiply(x_hat, slope.astype(h.dtype), out=x_hat)
    np.subtract(h, x_hat, out=out)
    if centred:
        np.subtract(out, level[0].astype(h.dtype), out=out)


def _spans(gamma: Array) -> bool:
    """Return whether γ g is a number of float32 with all its digits for any g but the tiniest: at
    each place γ is 0 throughout, or is somewhere large enough."""
    largest = np.abs(gamma).max(axis=1)
    return bool(((largest == 0) | (largest >= SMALLEST_GAMMA)).all())


def _scaled(g: Array, gamma: Array | None, block: Block, out: Array) -> Array:
    """Return γ g in `out`, or g itself where there is no γ."""
    if gamma is None:
        return g
    np.multiply(_samples(g, block), along(gamma, block), out=_samples(out, block))
    return out


def _times(work: Array, gamma: Array | None, block: Block) -> None:
    if gamma is not None:
        samples = _samples(work, block)
        np.multiply(samples, along(gamma, block), out=samples)


def _samples(rows: Array, block: Block) -> Array:
    """Return the rows of a block as (samples, places, D): a view."""
    return rows.reshape(-1, block.last - block.first, rows.shape[1])


def _scratch(name: str, like: Array) -> Array:
    return threads.scratch(name, like.shape, like.dtype)
