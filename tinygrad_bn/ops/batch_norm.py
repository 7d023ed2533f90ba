"""Batch normalization: its definition, and the gradient that is worth deriving by hand.

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", ICML 2015 (arXiv:1502.03167), Algorithm 1.

For each channel, over its m values x_i (all axes of x but the kept ones):

    mean  μ = Σ x_i / m              x̂_i = (x_i - μ) s
    var   v = Σ (x_i - μ)² / m       y_i = γ x̂_i + β          with s = 1 / √(v + ε)

**The gradient.** Let g_i = ∂L/∂y_i. Two sums come at once: ∂L/∂β = Σ g_i and ∂L/∂γ = Σ g_i x̂_i.
For x, note first how x̂ moves with x. Since ∂μ/∂x_j = 1/m and ∂v/∂x_j = 2 (x_j - μ) / m, hence
∂s/∂x_j = -s³ (x_j - μ) / m = -s² x̂_j / m,

    ∂x̂_i/∂x_j = s (δ_ij - 1/m) + (x_i - μ) ∂s/∂x_j = s (δ_ij - 1/m - x̂_i x̂_j / m)

and so, with ∂L/∂x̂_i = γ g_i,

    ∂L/∂x_j = γ s (g_j - (1/m) Σ g_i - x̂_j (1/m) Σ g_i x̂_i)

The cotangent loses its mean and its component along x̂: the two directions in which y cannot move.
Nothing is divided by γ, so γ = 0 is no special case. The tape on the composite below arrives at the
same numbers, with some fifteen arrays of the size of x on the way; the rule needs x alone.

Running averages are state and live elsewhere (`normalization.py`, `nn.BatchNorm`); this op hands
out the statistics of the batch as residuals.
"""

from __future__ import annotations

import math
from typing import Any

from tinygrad_bn.backend import accumulation_dtype, saving
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.elementwise import sqrt

Axes = tuple[int, ...]


# --- the definition --------------------------------------------------------------------------


def batch_statistics(x: Any, axis: Axes) -> tuple[Any, Any]:
    """Return the mean and the biased variance of each channel, with reduced axes of size 1.

    x: array or Tensor, at least float64 wide. axis: the channel axes, which are kept.

    Two passes, not E[x²] - E[x]², which cancels; and both relative to a value of the channel, so
    that a mean far larger than the spread costs no digits and a constant channel has mean exactly
    its constant and variance exactly 0. The statistics do not depend on the shift: it takes no
    part in the derivative.
    """
    reduced = tuple(i for i in range(x.ndim) if i not in axis)
    shift = _constant(x)[tuple(slice(None) if i in axis else slice(1) for i in range(x.ndim))]
    centred = x - shift
    mean = centred.mean(axis=reduced, keepdims=True)
    centred = centred - mean
    var = (centred * centred).mean(axis=reduced, keepdims=True)
    return shift + mean, var


def normalize(x: Any, mean: Any, var: Any, weight: Any, bias: Any, axis: Axes, eps: float) -> Any:
    """Return (x - mean) / √(var + eps), times weight, plus bias: x̂, or y where they are given."""
    x_hat = (x - mean) * (1 / sqrt(var + eps))
    if weight is not None:
        x_hat = x_hat * along(weight, x.shape, axis)
    return x_hat if bias is None else x_hat + along(bias, x.shape, axis)


def batch_norm_composite(x: Any, weight: Any, bias: Any, *, axis: Axes, eps: float) -> Any:
    """Return y by the formula, in ordinary ops: on Tensors, the tape differentiates it.

    Everything is computed in float64 (or wider) and rounded once, to the dtype of x.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    mean, var = batch_statistics(wide, axis)
    return normalize(wide, mean, var, weight, bias, axis, eps).astype(x.dtype)


def along(vector: Any, shape: tuple[int, ...], axis: Axes) -> Any:
    """Return a value per channel reshaped to broadcast against x of `shape`."""
    return vector.reshape(tuple(size if i in axis else 1 for i, size in enumerate(shape)))


def per_channel(x: Any, axis: Axes) -> Any:
    """Return x summed to one value per channel, in the shape of weight and bias."""
    return x.sum(axis=tuple(i for i in range(x.ndim) if i not in axis))


def values_per_channel(shape: tuple[int, ...], axis: Axes) -> int:
    """Return m: how many values of x share one mean."""
    return math.prod(size for i, size in enumerate(shape) if i not in axis)


def _constant(x: Any) -> Any:
    """Return x as a value that gradients do not flow through."""
    return x.detach() if hasattr(x, "detach") else x


# --- the op ----------------------------------------------------------------------------------

_CHANNELS = Domain(
    inputs=(Real(), Real(), Real()),
    cases=(
        case((6, 3), (3,), (3,), axis=(1,), eps=1e-5),
        case((4, 3, 2), (3,), None, axis=(1,), eps=1e-2),
        case((3, 2, 3, 2), (2,), (2,), axis=(1,), eps=1e-5),
        case((3, 2, 2, 3), (3,), (3,), axis=(3,), eps=1e-3),
        case((2, 2, 2, 2, 2), None, (2,), axis=(1,), eps=1e-5),
        case((5, 2, 3), (2, 3), (2, 3), axis=(1, 2), eps=1e-5),
        case((4, 3), None, None, axis=(1,), eps=1.0),
    ),
)


@op(domain=_CHANNELS)
def batch_norm(x: Any, weight: Any = None, bias: Any = None, *, axis: Axes, eps: float) -> Any:
    """Return x normalized by the statistics of the batch, in the dtype of x.

    x: (N, C, *spatial), or any shape whose channel axes are `axis` (sorted, non-negative).
    weight (γ), bias (β): one value per channel, or None for 1 and 0.

    Residuals: `mean` and the biased `var` per channel, with reduced axes of size 1, in float64.
    Rounding the mean to float32 would cost 3e-2 in the gradient when it is 10⁶ times the spread.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    if wide.size == 0:
        mean = var = wide.sum(axis=tuple(i for i in range(x.ndim) if i not in axis), keepdims=True)
    else:
        mean, var = batch_statistics(wide, axis)
    out = normalize(wide, mean, var, weight, bias, axis, eps)
    return saving(out.astype(x.dtype), mean=mean, var=var)


@batch_norm.def_vjp
def _(
    g: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    axis: Axes,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> Any:
    # gx = γ s (g - mean(g) - x̂ mean(g x̂)),  gγ = Σ g x̂,  gβ = Σ g
    x = x.astype(accumulation_dtype(x.dtype))
    g = g.astype(x.dtype)
    if mean is None:
        mean, var = batch_statistics(x, axis)  # anew, since they too depend on x
    s = 1 / sqrt(var + eps)
    x_hat = (x - mean) * s
    gbias = per_channel(g, axis)
    gweight = per_channel(g * x_hat, axis)
    gx = None
    if needs[0]:
        m = max(values_per_channel(x.shape, axis), 1)
        mean_g, mean_gx = along(gbias, x.shape, axis) / m, along(gweight, x.shape, axis) / m
        gx = s * (g - mean_g - x_hat * mean_gx)
        gx = gx if weight is None else along(weight, x.shape, axis) * gx
    return gx, gweight if needs[1] else None, gbias if needs[2] else None


batch_norm.use_kernels(numpy="tinygrad_bn.kernels.cpu.numpy_batch_norm")


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
    wide = x.astype(accumulation_dtype(x.dtype))
    mean, var = along(mean, x.shape, axis), along(var, x.shape, axis)
    return normalize(wide, mean, var, weight, bias, axis, eps).astype(x.dtype)


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
    s = 1 / sqrt(along(var, x.shape, axis) + eps)
    centred = x - along(mean, x.shape, axis)
    gx = g * s if weight is None else g * (s * along(weight, x.shape, axis))
    return (
        gx,
        -per_channel(gx, axis) if needs[1] else None,
        per_channel(gx * centred * (s * s), axis) * -0.5 if needs[2] else None,
        per_channel(g * (centred * s), axis) if needs[3] else None,
        per_channel(g, axis) if needs[4] else None,
    )


batch_norm_given.use_kernels(numpy="tinygrad_bn.kernels.cpu.numpy_batch_norm_given")
