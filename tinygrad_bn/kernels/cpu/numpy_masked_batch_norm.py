"""Batch norm in NumPy, with a mask: as `numpy_batch_norm`, which serves without one.

A mask is the same in all channels, so the shares p of its values are a number for each sample and
position. A block of them is spread over the channels beside the block of x that it goes with. What
does not count is overwritten, with 0 before sums and with β or 0 after: NaN times 0 would be NaN.

    mean = shift + Σ p d      var = Σ p d² - (Σ p d)²      gx = γ s (g - p (Σ g + x̂ Σ g x̂))

with d = x - shift, the shift being the value with the largest share, or, where that turns out to
be far from the mean, the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import numpy_batch_norm, threads
from tinygrad_bn.kernels.cpu.channel_blocks import Array, Axes, Blocks, Task
from tinygrad_bn.kernels.cpu.halves import narrow, widen
from tinygrad_bn.kernels.cpu.numpy_batch_norm import (
    FAR,
    SMALLEST_SQUARE,
    SMALLEST_SUM,
    SMALLEST_VALUE,
    affine,
    blocks_for,
    column_sums,
    in_range,
    narrowed,
)
from tinygrad_bn.kernels.cpu.shares import shares_of


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
    if mask is None:
        return numpy_batch_norm.forward(x, weight, bias, axis=axis, eps=eps, groups=groups)
    blocks = blocks_for(x, axis, groups)
    shares = None if blocks is None else _shares(mask, x, axis, blocks)
    if blocks is None or shares is None:
        return NotImplemented
    share, total = shares
    laid, out = blocks.parts(blocks.lay(x)), blocks.empty(x.dtype)
    found = []
    for part, p in zip(laid, share, strict=True):
        mean, var = _statistics(blocks, part, p)
        if not in_range(var + eps) or not _trusted(blocks, part, p, var):
            return NotImplemented
        found.append((mean, var))
    otherwise = np.zeros(blocks.channels) if bias is None else bias.ravel()
    with np.errstate(all="ignore"):
        otherwise = otherwise.astype(x.dtype)
    for part, y, p, stats in zip(laid, blocks.parts(out), share, found, strict=True):
        if not affine(blocks, part, *stats, weight, bias, eps, y):
            return NotImplemented
        _overwrite(blocks, y, p, otherwise)
    mean, var = (np.array(values).reshape(blocks.kept_shape) for values in zip(*found, strict=True))
    count = total.reshape((-1,) * (groups > 1) + (1,) * x.ndim)
    return saving(blocks.back(out), mean=mean, var=var, count=count)


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
    if mask is None:
        return numpy_batch_norm.vjp(g, x, weight, bias, mean, var, axis, eps, groups, needs)
    blocks = blocks_for(x, axis, groups)
    if blocks is None or g.dtype != x.dtype or not in_range(var + eps):
        return NotImplemented
    shares = _shares(mask, x, axis, blocks)
    if shares is None:
        return NotImplemented
    gx = blocks.empty(x.dtype)
    total = np.zeros((2, blocks.channels))  # Σ g x̂ and Σ g
    for *parts, mu, v in zip(
        blocks.parts(blocks.lay(g)),
        blocks.parts(blocks.lay(x)),
        blocks.parts(gx),
        shares[0],
        mean.reshape(groups, -1),
        var.reshape(groups, -1),
        strict=True,
    ):
        sums = _vjp_of_group(blocks, parts, mu, v, weight, eps, needs[0])
        if sums is None:
            return NotImplemented
        total += sums
    shape = tuple(x.shape[a] for a in axis)
    return (
        blocks.back(gx) if needs[0] else None,
        total[0].reshape(shape) if needs[1] else None,
        total[1].reshape(shape) if needs[2] else None,
        None,
    )


def _vjp_of_group(
    blocks: Blocks,
    parts: list[Array],
    mean: Array,
    var: Array,
    weight: Array | None,
    eps: float,
    needs_gx: bool,
) -> tuple[Array, Array] | None:
    """Return Σ g x̂ and Σ g of one group, after writing its part of gx; None to decline.

    parts: g, x, gx and the shares of the group.
    """
    laid_g, laid, gx, share = parts
    high = mean.astype(blocks.dtype).astype(np.float64)
    low = mean - high
    sum_g, sum_gd, every = _sums_with_cotangent(blocks, laid_g, laid, share, high)
    lost = (np.abs(sum_gd) < SMALLEST_SUM) & (sum_g != 0) & (var > 0)
    if lost.any() or not (np.isfinite(sum_g).all() and np.isfinite(sum_gd).all()):
        return None
    s = 1 / np.sqrt(var + eps)
    sum_gx = s * (sum_gd - low * sum_g)
    if needs_gx:
        # γ s (g - p (Σ g + x̂ Σ g x̂)), collected by powers of x - high
        scale = s if weight is None else s * weight.ravel()
        slope = -scale * s * sum_gx
        vectors = narrowed(blocks, scale, slope, -scale * sum_g - slope * low, high)
        if vectors is None:
            return None
        _combine(blocks, laid_g, laid, share, vectors, gx)
    return sum_gx, every


# --- shares --------------------------------------------------------------------------------------


def _shares(mask: Array, x: Array, axis: Axes, blocks: Blocks) -> tuple[Array, Array] | None:
    """Return what `shares_of` does, the shares in the dtype of the work; None if it cannot."""
    found = shares_of(mask, x.shape, axis, blocks.order, blocks.groups)
    if found is None or ((found[0] > 0) & (found[0] < SMALLEST_VALUE)).any():
        return None
    return found[0].astype(blocks.dtype), found[1]


def _walk(
    blocks: Blocks, tasks: list[Task], share: Array, laid: list[Array], vectors: list[Array]
) -> Iterator[tuple[Task, Array, Array, list[Array], list[Array]]]:
    """Yield as `Blocks.walk` does, with each block's shares and where they are 0 after the task."""
    periods = blocks.width // blocks.period  # to a row
    cut = blocks.rows * periods * blocks.run
    main, tail = share[:cut].reshape(blocks.rows, -1), share[cut:].reshape(1, -1)
    for task, arrays, spread in blocks.walk(tasks, laid, vectors):
        rows = (tail if task.tail else main)[task.top : task.bottom]
        shape = len(rows), task.right - task.left
        p = threads.scratch("share", shape, blocks.dtype)
        if task.left == 0 and task.right % blocks.period == 0:
            parts = len(rows), -1, blocks.channels, blocks.run
            np.copyto(p.reshape(parts), rows.reshape(len(rows), -1, 1, blocks.run))
        else:  # a part of one period
            columns = np.arange(task.left, task.right) % blocks.run
            np.take(rows, columns, axis=1, out=p, mode="clip")
        off = np.equal(p, 0, out=threads.scratch("off", shape, bool))
        yield task, p, off, arrays, spread


# --- passes --------------------------------------------------------------------------------------


def _statistics(blocks: Blocks, laid: Array, share: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, float64; 0 and 1 if nothing counts."""
    if not share.any():
        return np.zeros(blocks.channels), np.ones(blocks.channels)
    shift = _most_shared(blocks, laid, share).astype(blocks.dtype)
    mean, var = _statistics_about(blocks, laid, share, shift)
    with np.errstate(all="ignore"):
        if (np.abs(mean - shift) > FAR * np.sqrt(var)).any():
            return _statistics_about(blocks, laid, share, mean.astype(blocks.dtype))
    return mean, var


def _most_shared(blocks: Blocks, laid: Array, share: Array) -> Array:
    """Return each channel's value with the largest share."""
    sample, position = divmod(int(np.argmax(share)), blocks.run)
    return laid.reshape(-1, blocks.channels, blocks.run)[sample, :, position]


def _statistics_about(
    blocks: Blocks, laid: Array, share: Array, shift: Array
) -> tuple[Array, Array]:
    """Return mean and biased variance from Σ p d and Σ p d², d = x - shift."""

    def sums(tasks: list[Task]) -> Array:
        total = np.zeros((2, blocks.channels))
        with np.errstate(all="ignore"):
            for task, p, off, (x,), (about,) in _walk(blocks, tasks, share, [laid], [shift]):
                d = threads.scratch("d", x.shape, blocks.dtype)
                np.subtract(widen(x, "x"), about, out=d)
                np.copyto(d, 0, where=off)
                np.multiply(p, d, out=p)
                blocks.fold(total[0], column_sums(p), task.left, task.right)
                squares = np.einsum("rk,rk->k", p, d)
                blocks.fold(total[1], squares, task.left, task.right)
        return total

    # Shares rounded to float32 add up to nearly 1, and that is what they are of.
    whole = share.sum(dtype=np.float64)
    first, second = np.sum(blocks.share_out(sums), axis=0) / whole
    with np.errstate(all="ignore"):
        return shift.astype(np.float64) + first, np.maximum(second - first * first, 0.0)


def _trusted(blocks: Blocks, laid: Array, share: Array, var: Array) -> bool:
    """Return whether channels of a variance near 0 are constant: else squares were lost."""
    small = var < SMALLEST_SQUARE
    if not small.any():
        return True
    values = laid.reshape(-1, blocks.channels, blocks.run)[:, small]
    same = values == _most_shared(blocks, laid, share)[small, None]
    return bool((same | (share == 0).reshape(-1, 1, blocks.run)).all())


def _overwrite(blocks: Blocks, out: Array, share: Array, values: Array) -> None:
    """Write each channel's value into `out` wherever nothing counts."""

    def write(tasks: list[Task]) -> None:
        for _, _, off, (y,), (row,) in _walk(blocks, tasks, share, [out], [values]):
            np.copyto(y, row, where=off)

    blocks.share_out(write)


def _sums_with_cotangent(
    blocks: Blocks, laid_g: Array, laid: Array, share: Array, high: Array
) -> tuple[Array, Array, Array]:
    """Return Σ g and Σ g (x - high) of what counts in each channel, and Σ g of all, float64."""
    about = high.astype(blocks.dtype)

    def sums(tasks: list[Task]) -> Array:
        total = np.zeros((3, blocks.channels))
        with np.errstate(all="ignore"):
            for task, passed, off, (g, x), (high,) in _walk(
                blocks, tasks, share, [laid_g, laid], [about]
            ):
                d = threads.scratch("d", x.shape, blocks.dtype)
                np.subtract(widen(x, "x"), high, out=d)
                np.copyto(d, 0, where=off)
                g = widen(g, "g")
                blocks.fold(total[2], column_sums(g), task.left, task.right)
                np.copyto(passed, g)
                np.copyto(passed, 0, where=off)
                blocks.fold(total[0], column_sums(passed), task.left, task.right)
                products = np.einsum("rk,rk->k", passed, d)
                blocks.fold(total[1], products, task.left, task.right)
        return total

    sum_g, sum_gd, every = np.sum(blocks.share_out(sums), axis=0)
    return sum_g, sum_gd, every


def _combine(
    blocks: Blocks, laid_g: Array, laid: Array, share: Array, vectors: list[Array], out: Array
) -> None:
    """Write scale · g + p (slope · (x - high) + constant) into `out`, 0 where nothing counts.

    vectors: scale, slope, constant and high.
    """

    def combine(tasks: list[Task]) -> None:
        with np.errstate(all="ignore"):
            for _, p, off, (g, x, y), (a, b, c, high) in _walk(
                blocks, tasks, share, [laid_g, laid, out], vectors
            ):
                d = threads.scratch("d", x.shape, blocks.dtype)
                np.subtract(widen(x, "x"), high, out=d)
                np.multiply(d, b, out=d)
                np.add(d, c, out=d)
                np.multiply(d, p, out=d)
                work = y if y.dtype == blocks.dtype else p
                np.multiply(widen(g, "g"), a, out=work)
                np.add(work, d, out=work)
                np.copyto(work, 0, where=off)
                narrow(work, y)

    blocks.share_out(combine)
