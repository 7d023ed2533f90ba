"""Batch normalization: its definition, and the gradient that is worth deriving by hand.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", ICML 2015 (arXiv:1502.03167), Algorithm 1.

For each channel, over its values x_i (all axes of x but the kept ones), each with its share p_i of
the mean: 1/m for m values, w_i / Σ w where a mask gives the values frequencies w_i.

    mean  μ = Σ p_i x_i              x̂_i = (x_i - μ) s
    var   v = Σ p_i (x_i - μ)²       y_i = γ x̂_i + β          with s = 1 / √(v + ε)

**The gradient.** Let g_i = ∂L/∂y_i. Two sums come at once: ∂L/∂β = Σ g_i and ∂L/∂γ = Σ g_i x̂_i.
For x, note first how x̂ moves with x. Since ∂μ/∂x_j = p_j and ∂v/∂x_j = 2 p_j (x_j - μ), hence
∂s/∂x_j = -s³ p_j (x_j - μ) = -s² p_j x̂_j,

    ∂x̂_i/∂x_j = s (δ_ij - p_j) + (x_i - μ) ∂s/∂x_j = s (δ_ij - p_j - p_j x̂_i x̂_j)

and so, with ∂L/∂x̂_i = γ g_i,

    ∂L/∂x_j = γ s (g_j - p_j (Σ g_i + x̂_j Σ g_i x̂_i))

The cotangent loses its mean and its component along x̂: the two directions in which y cannot move.
Nothing is divided by γ, so γ = 0 is no special case. The tape on the composite below arrives at the
same numbers, and keeps seven times the memory of a float32 x for it; the rule needs x alone.

Running averages are state and live elsewhere (`normalization.py`, `nn.BatchNorm`); this op hands
out the statistics of the batch as residuals.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tinygrad_bn.backend import accumulation_dtype, saving
from tinygrad_bn.domain import Boolean, Domain, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.elementwise import sqrt, where
from tinygrad_bn.ops.shape import broadcast_to

Axes = tuple[int, ...]


# --- the definition --------------------------------------------------------------------------


class Sample(NamedTuple):
    """What is averaged together, and with which weights.

    axis: the kept axes, one mean for each combination of their indices.
    share: p, a number, or an array of x's shape but for the channel axes, which have size 1.
    counts: where a value counts (boolean, shaped as `share`); None for everywhere.
    total: how many values there are: m or Σ w, 0 where they are too few.
    """

    axis: Axes
    share: Any
    counts: Any
    total: Any

    def reduced(self, x: Any) -> Axes:
        """Return the axes of x that are averaged over."""
        return tuple(i for i in range(x.ndim) if i not in self.axis)

    def mean(self, x: Any) -> Any:
        """Return Σ p x, with the reduced axes of size 1."""
        if self.counts is None:
            return x.sum(axis=self.reduced(x), keepdims=True) * self.share
        return (x * self.share).sum(axis=self.reduced(x), keepdims=True)

    def only(self, x: Any, otherwise: float = 0.0) -> Any:
        """Return x where it counts, `otherwise` elsewhere, NaN or not."""
        return x if self.counts is None else where(self.counts, x, otherwise)


def sample_of(x: Any, mask: Any, axis: Axes, channels: Axes) -> Sample:
    """Return how x is averaged: evenly, or by the frequencies in `mask`, the same in all channels.

    A sample of fewer than two values that count has no variance: then none of it counts.
    """
    if mask is None:
        m = values_per_channel(x.shape, axis)
        return Sample(axis, 1 / max(m, 1), None, m)
    reduced = tuple(i for i in range(x.ndim) if i not in axis)
    shape = tuple(1 if i in channels else size for i, size in enumerate(x.shape))
    frequency = broadcast_to(mask.astype(x.dtype), shape=shape)
    counts = frequency > 0
    enough = counts.sum(axis=reduced, keepdims=True) >= 2
    frequency = where(counts & enough, frequency, 0.0)
    total = frequency.sum(axis=reduced, keepdims=True)
    return Sample(axis, frequency / where(enough, total, 1.0), counts & enough, total)


def batch_statistics(x: Any, sample: Sample) -> tuple[Any, Any]:
    """Return the mean and the biased variance of each channel, with reduced axes of size 1.

    x: array or Tensor, at least float64 wide; a NaN that does not count is not seen. Where x is
    empty or too few values count, the mean is 0 and the variance 1, to divide by even if ε is 0.

    Two passes, not E[x²] - E[x]², which cancels; and both relative to a value of the channel, so
    that a mean far larger than the spread costs no digits and a constant channel has mean exactly
    its constant and variance exactly 0. The statistics do not depend on the shift: it takes no
    part in the derivative.
    """
    if x.size == 0:
        mean = sample.mean(x)
        return mean, mean + 1
    shift = _a_value_of(constant(x), sample)
    centred = sample.only(x - shift)
    mean = sample.mean(centred)
    centred = sample.only(centred - mean)
    var = sample.mean(centred * centred)
    if sample.counts is not None:
        var = where(sample.total > 0, var, 1.0)
    return shift + mean, var


def _a_value_of(x: Any, sample: Sample) -> Any:
    """Return some value of each channel: the first, or the largest of those that count."""
    reduced = sample.reduced(x)
    if sample.counts is None:
        return x[tuple(slice(1) if i in reduced else slice(None) for i in range(x.ndim))]
    largest = sample.only(x, -math.inf).max(axis=reduced, keepdims=True)
    return where(largest == -math.inf, 0.0, largest)


def normalize(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, axis: Axes, eps: float, sample: Any = None
) -> Any:
    """Return (x - mean) / √(var + eps), times weight, plus bias: x̂, or y where they are given.

    Where a value of `sample` does not count, x̂ is 0 and y is bias.
    """
    x_hat = (x - mean) * (1 / sqrt(var + eps))
    if weight is not None:
        x_hat = x_hat * along(weight, x.shape, axis)
    if sample is not None:
        x_hat = sample.only(x_hat)  # after the weight, whose infinity would make NaN of 0
    return x_hat if bias is None else x_hat + along(bias, x.shape, axis)


def batch_norm_composite(
    x: Any, weight: Any, bias: Any, mask: Any = None, *, axis: Axes, eps: float, groups: int = 1
) -> Any:
    """Return y by the formula, in ordinary ops: on Tensors, the tape differentiates it.

    Everything is computed in float64 (or wider) and rounded once, to the dtype of x.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    wide, mask, kept, channels = in_groups(wide, mask, axis, groups)
    sample = sample_of(wide, mask, kept, channels)
    wide = sample.only(wide)
    mean, var = batch_statistics(wide, sample)
    y = normalize(wide, mean, var, weight, bias, channels, eps, sample)
    return y.reshape(x.shape).astype(x.dtype)


def in_groups(x: Any, mask: Any, axis: Axes, groups: int) -> tuple[Any, Any, Axes, Axes]:
    """Return x and mask with axis 0 split into (groups, samples), the axes that are then kept, and
    the channel axes among them: each group, a ghost batch, has statistics of its own."""
    if groups == 1:
        return x, mask, axis, axis
    x = x.reshape((groups, x.shape[0] // groups, *x.shape[1:]))
    if mask is not None:
        mask = broadcast_to(mask, shape=(x.shape[0] * x.shape[1], *mask.shape[1:]))
        mask = mask.reshape((*x.shape[:2], *mask.shape[1:]))
    channels = tuple(a + 1 for a in axis)
    return x, mask, (0, *channels), channels


def along(vector: Any, shape: tuple[int, ...], axis: Axes) -> Any:
    """Return a value per channel reshaped to broadcast against x of `shape`."""
    return vector.reshape(tuple(size if i in axis else 1 for i, size in enumerate(shape)))


def per_channel(x: Any, axis: Axes) -> Any:
    """Return x summed to one value per channel, in the shape of weight and bias."""
    return x.sum(axis=tuple(i for i in range(x.ndim) if i not in axis))


def values_per_channel(shape: tuple[int, ...], axis: Axes) -> int:
    """Return m: how many values of x share one mean."""
    return math.prod(size for i, size in enumerate(shape) if i not in axis)


def constant(x: Any) -> Any:
    """Return x as a value that gradients do not flow through."""
    return x.detach() if hasattr(x, "detach") else x


# --- the op ----------------------------------------------------------------------------------

_CASES = (
    case((6, 3), (3,), (3,), None, axis=(1,), eps=1e-5),
    case((4, 3, 2), (3,), None, None, axis=(1,), eps=1e-2),
    case((3, 2, 3, 2), (2,), (2,), None, axis=(1,), eps=1e-5),
    case((3, 2, 2, 3), (3,), (3,), None, axis=(3,), eps=1e-3),
    case((2, 2, 2, 2, 2), None, (2,), None, axis=(1,), eps=1e-5),
    case((5, 2, 3), (2, 3), (2, 3), None, axis=(1, 2), eps=1e-5),
    case((4, 3), None, None, None, axis=(1,), eps=1.0),
    case((8, 3), (3,), (3,), None, axis=(1,), eps=1e-5, groups=2),
    case((8, 2, 2), (2,), (2,), (8, 1, 2), axis=(1,), eps=1e-3),
    case((8, 3, 2), (2,), (2,), (8, 1, 1), axis=(2,), eps=1e-3, groups=2),
)


@op(domain=Domain(inputs=(Real(), Real(), Real(), Boolean()), cases=_CASES))
def batch_norm(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    mask: Any = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
) -> Any:
    """Return x normalized by the statistics of the batch, in the dtype of x.

    x: (N, C, *spatial), or any shape whose channel axes are `axis` (sorted, non-negative).
    weight (γ), bias (β): one value per channel, or None for 1 and 0.
    mask: how often each value counts: x's rank, size 1 along the channel axes, broadcastable.
    groups: into how many ghost batches axis 0 is split.

    Residuals: `mean` and the biased `var`, in float64, with reduced axes of size 1 (with groups:
    of x split as by `in_groups`), and `count`, how many values they are of. Rounding the mean to
    float32 would cost 3e-2 in the gradient when it is 10⁶ times the spread.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    wide, mask, kept, channels = in_groups(wide, mask, axis, groups)
    sample = sample_of(wide, mask, kept, channels)
    wide = sample.only(wide)
    mean, var = batch_statistics(wide, sample)
    out = normalize(wide, mean, var, weight, bias, channels, eps, sample)
    out = out.reshape(x.shape).astype(x.dtype)
    return saving(out, mean=mean, var=var, count=sample.total)


@batch_norm.def_vjp
def _(
    g: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    mean: Any,
    var: Any,
    axis: Axes,
    eps: float,
    groups: int,
    needs: tuple[bool, ...],
) -> Any:
    # gx = γ s (g - p (Σ g + x̂ Σ g x̂)),  gγ = Σ g x̂,  gβ = Σ g
    shape = x.shape
    x = x.astype(accumulation_dtype(x.dtype))
    x, mask, kept, channels = in_groups(x, mask, axis, groups)
    g = g.astype(x.dtype).reshape(x.shape)
    sample = sample_of(x, mask, kept, channels)
    if mean is None:
        mean, var = batch_statistics(x, sample)  # anew, since they too depend on x
    s = 1 / sqrt(var + eps)
    centred = sample.only(x - mean)
    gbias = per_channel(g, channels)  # masked slots too: they hold β
    g = sample.only(g)
    # What is one number per channel is collected first: x̂ itself, centred · s, is never formed.
    reduced = sample.reduced(x)
    sum_gx = (g * centred).sum(axis=reduced, keepdims=True) * s
    gx = None
    if needs[0]:
        scale = s if weight is None else s * along(weight, x.shape, channels)
        slope = scale * s * sum_gx
        level = scale * g.sum(axis=reduced, keepdims=True)
        if sample.counts is None:
            gx = g * scale - (centred * (slope * sample.share) + level * sample.share)
        else:
            gx = sample.only(g * scale - (centred * slope + level) * sample.share)
        gx = gx.reshape(shape)
    gweight = per_channel(sum_gx, channels) if needs[1] else None
    return (gx, gweight, gbias if needs[2] else None, None)[: len(needs)]


# On the CPU these serve masks, and hand a call without one to numba_batch_norm, numpy_batch_norm.
batch_norm.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_masked_batch_norm",
    numpy="tinygrad_bn.kernels.cpu.numpy_masked_batch_norm",
    cuda="tinygrad_bn.kernels.cuda.batch_norm",
)


# --- with given statistics -------------------------------------------------------------------


@op(
    domain=Domain(
        inputs=(Real(), Real(), Real(0.2, 3.0), Real(), Real()),
        cases=(
            case((6, 3), (3,), (3,), (3,), (3,), axis=(1,), eps=1e-5),
            case((3, 2, 3, 2), (2,), (2,), None, (2,), axis=(1,), eps=1e-3),
            case((1, 2, 2, 3), (3,), (3,), (3,), None, axis=(3,), eps=1e-5),
        ),
    )
)
def batch_norm_given(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *, axis: Axes, eps: float
) -> Any:
    """Return x normalized by statistics that are given, as in evaluation: affine in x.

    mean, var: one value per channel, for example running averages. The rest as in `batch_norm`.
    """
    wide = accumulation_dtype(x.dtype)
    mean, var = (along(v.astype(wide), x.shape, axis) for v in (mean, var))
    return normalize(x.astype(wide), mean, var, weight, bias, axis, eps).astype(x.dtype)


@batch_norm_given.def_vjp
def _(
    g: Any,
    x: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    axis: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    # gx = γ s g,  gμ = -Σ gx,  gv = -½ s² Σ gx (x - μ),  gγ = Σ g x̂,  gβ = Σ g
    x = x.astype(accumulation_dtype(x.dtype))
    g = g.astype(x.dtype)
    s = 1 / sqrt(along(var.astype(x.dtype), x.shape, axis) + eps)
    centred = x - along(mean, x.shape, axis)
    gx = g * s if weight is None else g * (s * along(weight, x.shape, axis))
    return (
        gx,
        -per_channel(gx, axis) if needs[1] else None,
        per_channel(gx * centred * (s * s), axis) * -0.5 if needs[2] else None,
        per_channel(g * (centred * s), axis) if needs[3] else None,
        per_channel(g, axis) if needs[4] else None,
    )


batch_norm_given.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_batch_norm_given",
    numpy="tinygrad_bn.kernels.cpu.numpy_batch_norm_given",
    cuda="tinygrad_bn.kernels.cuda.batch_norm_given",
)
