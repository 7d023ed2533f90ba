"""Batch norm in compiled loops, on several threads: each pass at the speed of memory.

Forward reads x for its statistics and again for y; backward reads g and x for two sums and again
for gx. What must be exact is in float64: the sums, and all that is one number per channel.

- The statistics are sums of d = x - shift and d², with the channel's first value for shift. They
  cannot cancel by more than the number of values, since the shift is one of them; a constant
  channel has d = 0, and so exactly its constant as mean and exactly 0 as variance.
- The mean is used as a high part in the dtype of x and a low part: x - high is exact where the mean
  is far larger than the spread, and the low part goes into the constant that is added anyway.

Where float32 cannot hold a number per channel, or one is not finite, the call is declined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.kernels.cpu.channels import Array, Axes, Channels, channels_of
from tinygrad_bn.kernels.cpu.compiled import usable
from tinygrad_bn.kernels.cpu.numba_channels import add_moments, add_products, combine, normalize

# Far enough from the ends of float32 (and float64) for products of two such numbers to be held.
RANGE = {np.dtype(np.float32): (1e-24, 1e24), np.dtype(np.float64): (1e-200, 1e200)}


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
    relu: bool = False,
) -> Any:
    """Return what `ops.batch_norm.batch_norm` returns, or NotImplemented; max(y, 0) if `relu`."""
    channels = channels_of(x, axis, groups)
    if channels is None or mask is not None or not usable():
        return NotImplemented
    laid, out = channels.lay(x), channels.empty(x.dtype)
    parts = out.reshape(groups, -1)
    found: list[Any] = [None] * groups

    def one(i: int) -> None:
        mean, var = _statistics(channels, laid[i])
        vectors = affine(x.dtype, mean, var, weight, bias, eps)
        if vectors is not None:
            found[i] = mean, var
            apply(channels, laid[i], vectors, relu, parts[i])

    over_groups(one, groups)
    if None in found:
        return NotImplemented
    mean, var = (np.array(v).reshape(channels.kept_shape) for v in zip(*found, strict=True))
    return saving(channels.back(out), mean=mean, var=var, count=channels.count)


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
    relu: bool = False,
) -> Any:
    """Return what the rule of `ops.batch_norm.batch_norm` returns, or NotImplemented.

    relu: g is the cotangent of max(y, 0).
    """
    channels = channels_of(x, axis, groups)
    if channels is None or mask is not None or g.dtype != x.dtype or not g.flags.aligned:
        return NotImplemented
    if not usable():
        return NotImplemented
    laid, laid_g, gx = channels.lay(x), channels.lay(g), channels.empty(x.dtype)
    mean, var = mean.reshape(groups, -1), var.reshape(groups, -1)
    parts = gx.reshape(groups, -1)
    found: list[Any] = [None] * groups

    def one(i: int) -> None:
        found[i] = _vjp_of_group(
            channels, laid_g[i], laid[i], mean[i], var[i], weight, bias, eps, relu,
            parts[i] if needs[0] else None,
        )  # fmt: skip

    over_groups(one, groups)
    if None in found:
        return NotImplemented
    shape = tuple(x.shape[a] for a in axis)
    gweight, gbias = (np.sum(sums, axis=0).reshape(shape) for sums in zip(*found, strict=True))
    gx = channels.back(gx) if needs[0] else None
    return gx, gweight if needs[1] else None, gbias if needs[2] else None, None


def over_groups(one: Any, groups: int) -> None:
    """Run `one(i)` for every group: a single one has all threads to itself, several share them."""
    if groups == 1:
        one(0)
    else:
        threads.parallel(one, groups)


def _statistics(channels: Channels, laid: Array) -> tuple[Array, Array]:
    """Return mean and biased variance of each channel, float64."""
    shift = laid[: channels.channels * channels.run : channels.run].astype(np.float64)
    loop, wide = add_moments.of(laid.dtype), channels.spread(shift[None])[0]

    def work(part: slice, columns: int) -> Array:
        sums = channels.sums()
        loop(laid[part], wide, columns, channels.inner, sums)
        return channels.folded(sums)

    first, second = np.sum(channels.share_out(work), axis=0)
    with np.errstate(all="ignore"):
        offset = first / channels.count
        return shift + offset, np.maximum(second / channels.count - offset * offset, 0.0)


def affine(
    dtype: np.dtype, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float
) -> Array | None:
    """Return high, scale and constant, (3, C); None if `dtype` cannot hold them."""
    if not _in_range(dtype, var + eps):
        return None
    with np.errstate(all="ignore"):
        scale = 1 / np.sqrt(var + eps)
        if weight is not None:
            scale = scale * weight.ravel()
        high = mean.astype(dtype)
        low = mean - high
        constant = -low * scale if bias is None else bias.ravel() - low * scale
        return _narrowed(dtype, high, scale, constant)


def apply(channels: Channels, laid: Array, vectors: Array, relu: bool, out: Array) -> None:
    """Write (x - high) · scale + constant into `out`."""
    loop, wide = normalize.of(laid.dtype), channels.spread(vectors)

    def work(part: slice, columns: int) -> None:
        loop(laid[part], wide, columns, channels.inner, relu, out[part])

    channels.share_out(work)


def _vjp_of_group(
    channels: Channels,
    laid_g: Array,
    laid: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    relu: bool,
    gx: Array | None,
) -> tuple[Array, Array] | None:
    """Return Σ g x̂ and Σ g of each channel, after writing gx, if it is wanted; None to decline."""
    vectors = affine(laid.dtype, mean, var, weight, bias, eps)
    if vectors is None:
        return None
    high = vectors[0].astype(np.float64)
    add, wide = add_products.of(laid.dtype), channels.spread(vectors)

    def add_up(part: slice, columns: int) -> Array:
        sums = channels.sums()
        add(laid_g[part], laid[part], wide, columns, channels.inner, relu, sums)
        return channels.folded(sums)

    # Σ g x̂ = s (Σ g (x - high) - low Σ g)
    sum_g, sum_gd = np.sum(channels.share_out(add_up), axis=0)
    with np.errstate(all="ignore"):
        s, low = 1 / np.sqrt(var + eps), mean - high
        sum_gx = s * (sum_gd - low * sum_g)
        if not (np.isfinite(sum_g).all() and np.isfinite(sum_gx).all()):
            return None
        # γ s (g - mean(g) - x̂ mean(g x̂)), collected by powers of x - high
        scale = s if weight is None else s * weight.ravel()
        slope = -scale * s * sum_gx / channels.count
        level = -scale * sum_g / channels.count - slope * low
    more = _narrowed(laid.dtype, slope, level)
    if more is None:
        return None
    if gx is not None:
        write, wider = combine.of(laid.dtype), channels.spread(np.concatenate([vectors, more]))

        def write_gx(part: slice, columns: int) -> None:
            write(laid_g[part], laid[part], wider, columns, channels.inner, relu, gx[part])

        channels.share_out(write_gx)
    return sum_gx, sum_g


def _in_range(dtype: np.dtype, var: Array) -> bool:
    low, high = RANGE[dtype]
    return bool(((var >= low) & (var <= high)).all())


def _narrowed(dtype: np.dtype, *vectors: Array) -> Array | None:
    """Return vectors in `dtype`, (k, C), or None if it does not hold one of the numbers."""
    wide = np.stack(vectors)
    info = np.finfo(dtype)
    size = np.abs(wide)
    if not (size <= info.max).all() or ((size < info.tiny) & (size > 0)).any():
        return None
    return wide.astype(dtype)
