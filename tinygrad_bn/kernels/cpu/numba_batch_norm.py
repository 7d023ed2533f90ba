"""Batch norm in compiled loops, on several threads: each pass at the speed of memory.

Forward reads x for its statistics and again for y; backward reads g and x for two sums and again
for gx. What must be exact is in float64: the sums, and all that is one number per channel.

- The statistics are sums of d = x - shift and d², with the channel's first value for shift. They
  cannot cancel by more than the number of values, since the shift is one of them; a constant
  channel has d = 0, and so exactly its constant as mean and exactly 0 as variance.
- The mean is used as a high part in the dtype of x and a low part: x - high is exact where the mean
  is far larger than the spread, and the low part goes into the constant that is added anyway.

Half precision is computed in float32, and rounded once.

Where float32 cannot hold a number per channel, or one is not finite, the call is declined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import threads, vector_loops
from tinygrad_bn.kernels.cpu.channel_loops import add_moments, add_products, combine, normalize
from tinygrad_bn.kernels.cpu.channels import Array, Axes, Channels, channels_of
from tinygrad_bn.kernels.cpu.halves import work_dtype
from tinygrad_bn.kernels.cpu.stored import loops_take
from tinygrad_bn.kernels.cpu.vector_loops import first_values, moments, slopes

# The least and the largest of what is held: of variances, so that products of two such numbers
# still are, and of any number.
VARIANCES = {
    np.dtype(np.float32): np.array([1e-24, 1e24]),
    np.dtype(np.float64): np.array([1e-200, 1e200]),
}
NUMBERS = {
    dtype: np.array([np.finfo(dtype).tiny, np.finfo(dtype).max], np.float64) for dtype in VARIANCES
}


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
    relu: bool = False,
) -> Any:
    """Return what `ops.batch_norm.batch_norm` does without a mask, or NotImplemented.

    relu: return max(y, 0) for y.
    """
    channels = channels_of(x, axis, groups)
    if channels is None or not loops_take(x.dtype):
        return NotImplemented
    laid, out = channels.lay(x), channels.empty(x.dtype)
    parts = channels.laid(out)
    gamma, beta = one_each(weight), one_each(bias)
    found = np.empty((groups, 2, channels.channels))
    served = [False] * groups

    def one(i: int) -> None:
        found[i] = _statistics(channels, laid[i])
        vectors = affine(channels, x.dtype, found[i], gamma, beta, eps)
        if vectors is not None:
            apply(channels, laid[i], vectors, relu, parts[i])
            served[i] = True

    over_groups(one, groups)
    if not all(served):
        return NotImplemented
    mean, var = (found[:, k].reshape(channels.kept_shape) for k in (0, 1))
    return saving(channels.back(out), mean=mean, var=var, count=channels.count)


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
    relu: bool = False,
) -> Any:
    """Return what the rule of `ops.batch_norm.batch_norm` does without a mask, or NotImplemented.

    relu: g is the cotangent of max(y, 0).
    """
    channels = channels_of(x, axis, groups)
    if channels is None or g.dtype != x.dtype or not g.flags.aligned or not loops_take(x.dtype):
        return NotImplemented
    laid, laid_g, gx = channels.lay(x), channels.lay(g), channels.empty(x.dtype)
    found = of_groups(mean, var, groups)
    parts = channels.laid(gx)
    gamma, beta = one_each(weight), one_each(bias)
    sums: list[Any] = [None] * groups

    def one(i: int) -> None:
        vectors = affine(channels, x.dtype, found[i], gamma, beta, eps)
        sums[i] = _vjp_of_group(
            channels, laid_g[i], laid[i], found[i], gamma, eps, vectors, relu,
            parts[i] if needs[0] else None,
        )  # fmt: skip

    over_groups(one, groups)
    if any(each is None for each in sums):
        return NotImplemented
    shape = tuple(x.shape[a] for a in axis)
    gweight, gbias = (total.reshape(shape) for total in np.sum(sums, axis=0))
    gx = channels.back(gx) if needs[0] else None
    return gx, gweight if needs[1] else None, gbias if needs[2] else None, None


def of_groups(mean: Array, var: Array, groups: int) -> Array:
    """Return mean and variance as the loops read them: (groups, 2, C), in C order."""
    found = np.empty((groups, 2, mean.size // groups))
    # Not np.stack, which takes over the order of what it is given: the generic form's may be any.
    found[:, 0], found[:, 1] = mean.reshape(groups, -1), var.reshape(groups, -1)
    return found


def over_groups(one: Any, groups: int) -> None:
    """Run `one(i)` for every group: a single one has all threads to itself, several share them."""
    if groups == 1:
        one(0)
    else:
        threads.parallel(one, groups)


def _statistics(channels: Channels, laid: Array) -> Array:
    """Return mean and biased variance of each channel, float64: (2, C)."""
    dtype, C = laid.dtype, channels.channels
    (shift,) = channels.rows(1)
    first_values.of(dtype)(laid, C, channels.run, *channels.spreading, shift)
    add = add_moments.of(dtype)
    sums = channels.sums(
        lambda part, sums: add(laid[part], shift, channels.columns, channels.inner, sums)
    )
    found = np.empty((2, C))
    moments.of()(sums, shift, C, *channels.spreading, channels.count, found)
    return found


def affine(
    channels: Channels, dtype: np.dtype, found: Array, weight: Array, bias: Array, eps: float
) -> Array | None:
    """Return rows of vectors with high, scale and constant set; None if they cannot hold them.

    dtype: of x. found: mean and variance, (2, C). weight, bias: as `one_each` returns them.
    """
    vectors = channels.rows(5, work_dtype(dtype))
    limits = VARIANCES[vectors.dtype], NUMBERS[vectors.dtype]
    options = *limits, *channels.spreading
    held = vector_loops.affine.of(vectors.dtype)(found, weight, bias, eps, *options, vectors)
    return vectors if held else None


def one_each(vector: Array | None) -> Array:
    """Return one number per channel as float64, or an empty array for none."""
    if vector is None:
        return np.empty(0)
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(vector, np.float64).reshape(-1)


def apply(channels: Channels, laid: Array, vectors: Array, relu: bool, out: Array) -> None:
    """Write (x - high) · scale + constant into `out`."""
    loop, sizes = normalize.of(laid.dtype, vectors.dtype), (channels.columns, channels.inner)
    channels.share_out(lambda part: loop(laid[part], vectors, *sizes, relu, out[part]))


def _vjp_of_group(
    channels: Channels,
    laid_g: Array,
    laid: Array,
    found: Array,
    weight: Array,
    eps: float,
    vectors: Array | None,
    relu: bool,
    gx: Array | None,
) -> Array | None:
    """Return Σ g x̂ and Σ g of each channel, after writing gx, if it is wanted; None to decline."""
    if vectors is None:
        return None
    dtypes, sizes = (laid.dtype, vectors.dtype), (channels.columns, channels.inner)
    add, write = add_products.of(*dtypes), combine.of(*dtypes)
    sums = channels.sums(
        lambda part, sums: add(laid_g[part], laid[part], vectors, *sizes, relu, sums)
    )
    grads = np.empty((2, channels.channels))
    options = channels.count, NUMBERS[vectors.dtype], *channels.spreading
    if not slopes.of(vectors.dtype)(sums, found, weight, eps, *options, vectors, grads):
        return None
    if gx is not None:
        channels.share_out(
            lambda part: write(laid_g[part], laid[part], vectors, *sizes, relu, gx[part])
        )
    return grads
