"""Batch norm in compiled loops, with a mask: as `numba_batch_norm`, which serves without one.

A mask is the same in all channels, so its shares p are a number for each sample and position:
little beside x. With them, for d = x - shift,

    mean = shift + Σ p d      var = Σ p d² - (Σ p d)²      gx = γ s (g - p (Σ g + x̂ Σ g x̂))

and the shift is the value with the largest share, from which no sum can cancel by more than the
number of values. What does not count is not looked at: y is β there, gx is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import numba_batch_norm
from tinygrad_bn.kernels.cpu.channels import Array, Axes, Channels, channels_of
from tinygrad_bn.kernels.cpu.halves import work_dtype
from tinygrad_bn.kernels.cpu.masked_channel_loops import (
    add_moments,
    add_products,
    combine,
    normalize,
)
from tinygrad_bn.kernels.cpu.numba_batch_norm import (
    NUMBERS,
    affine,
    of_groups,
    one_each,
    over_groups,
)
from tinygrad_bn.kernels.cpu.shares import shares_of
from tinygrad_bn.kernels.cpu.stored import loops_take
from tinygrad_bn.kernels.cpu.vector_loops import first_values, moments, slopes


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
        return numba_batch_norm.forward(x, weight, bias, axis=axis, eps=eps, groups=groups)
    channels = channels_of(x, axis, groups, may_spread=False)
    if channels is None or not loops_take(x.dtype):
        return NotImplemented
    shares = shares_of(mask, x.shape, axis, channels.order, groups)
    if shares is None:
        return NotImplemented
    share, total = shares
    laid, out = channels.lay(x), channels.empty(x.dtype)
    parts = channels.laid(out)
    gamma, beta = one_each(weight), one_each(bias)
    dtype = work_dtype(x.dtype)
    (otherwise,) = channels.rows(1, dtype)
    otherwise[: len(beta)] = beta
    found = np.empty((groups, 2, channels.channels))
    served = [False] * groups
    loop, sizes = normalize.of(laid.dtype, dtype), (channels.channels, channels.run)

    def one(i: int) -> None:
        found[i] = _statistics(channels, laid[i], share[i])
        vectors = affine(channels, x.dtype, found[i], gamma, beta, eps)
        if vectors is None:
            return

        def write(part: slice) -> None:
            own = _part(share[i], part, channels.channels)
            loop(laid[i][part], own, vectors, otherwise, *sizes, parts[i][part])

        channels.share_out(write)
        served[i] = True

    over_groups(one, groups)
    if not all(served):
        return NotImplemented
    mean, var = (found[:, k].reshape(channels.kept_shape) for k in (0, 1))
    count = total.reshape((-1,) * (groups > 1) + (1,) * x.ndim)
    return saving(channels.back(out), mean=mean, var=var, count=count)


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
        return numba_batch_norm.vjp(g, x, weight, bias, mean, var, axis, eps, groups, needs)
    channels = channels_of(x, axis, groups, may_spread=False)
    if channels is None or g.dtype != x.dtype or not g.flags.aligned or not loops_take(x.dtype):
        return NotImplemented
    shares = shares_of(mask, x.shape, axis, channels.order, groups)
    if shares is None:
        return NotImplemented
    share, _ = shares
    laid, laid_g, gx = channels.lay(x), channels.lay(g), channels.empty(x.dtype)
    parts = channels.laid(gx)
    found = of_groups(mean, var, groups)
    gamma, beta = one_each(weight), one_each(bias)
    sums: list[Any] = [None] * groups

    def one(i: int) -> None:
        vectors = affine(channels, x.dtype, found[i], gamma, beta, eps)
        if vectors is not None:
            sums[i] = _vjp_of_group(
                channels, laid_g[i], laid[i], share[i], found[i], gamma, eps, vectors,
                parts[i] if needs[0] else None,
            )  # fmt: skip

    over_groups(one, groups)
    if any(each is None for each in sums):
        return NotImplemented
    shape = tuple(x.shape[a] for a in axis)
    gweight, gbias = (total.reshape(shape) for total in np.sum(sums, axis=0))
    gx = channels.back(gx) if needs[0] else None
    return gx, gweight if needs[1] else None, gbias if needs[2] else None, None


def _part(share: Array, part: slice, C: int) -> Array:
    """Return the shares of the samples in `part`, a slice of a laid group of C channels."""
    return share[part.start // C : part.stop // C]


def _statistics(channels: Channels, laid: Array, share: Array) -> Array:
    """Return mean and biased variance of each channel, float64: 0 and 1 if nothing counts."""
    C, S = channels.channels, channels.run
    found = np.repeat([[0.0], [1.0]], C, axis=1)
    sample, position = divmod(int(np.argmax(share)), S)
    if share[sample * S + position] == 0:
        return found
    (shift,) = channels.rows(1)
    first = laid[sample * C * S + position :]  # one that counts
    first_values.of(laid.dtype)(first, C, S, *channels.spreading, shift)
    add = add_moments.of(laid.dtype)
    sums = channels.sums(
        lambda part, sums: add(laid[part], _part(share, part, C), shift, C, S, sums)
    )
    moments.of()(sums, shift, C, *channels.spreading, 1, found)
    return found


def _vjp_of_group(
    channels: Channels,
    laid_g: Array,
    laid: Array,
    share: Array,
    found: Array,
    weight: Array,
    eps: float,
    vectors: Array,
    gx: Array | None,
) -> Array | None:
    """Return Σ g x̂ and Σ g of each channel, after writing gx, if it is wanted; None to decline."""
    dtypes, C, S = (laid.dtype, vectors.dtype), channels.channels, channels.run
    add, write = add_products.of(*dtypes), combine.of(*dtypes)

    def add_part(part: slice, sums: Array) -> None:
        add(laid_g[part], laid[part], _part(share, part, C), vectors, C, S, sums)

    sums = channels.sums(add_part, rows=3)
    grads = np.empty((2, C))
    # The shares are in the loops: to the numbers per channel, a mean is a sum.
    options = 1, NUMBERS[vectors.dtype], *channels.spreading
    if not slopes.of(vectors.dtype)(sums, found, weight, eps, *options, vectors, grads):
        return None
    if gx is not None:

        def write_part(part: slice) -> None:
            own = _part(share, part, C)
            write(laid_g[part], laid[part], own, vectors, C, S, gx[part])

        channels.share_out(write_part)
    # What does not count takes β: its cotangents go there too.
    grads[1] = sums[:, 2, :C].sum(axis=0)
    return grads
