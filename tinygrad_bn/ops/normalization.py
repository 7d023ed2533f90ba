"""Layer norm, its relatives, and RMS norm: each sample normalized by itself.

Layer norm (Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 3), group norm (Wu and He 2018,
arXiv:1803.08494, equations 1 to 7) and instance norm (Ulyanov, Vedaldi and Lempitsky 2016,
arXiv:1607.08022, equation 4) are batch norm with other axes. What differs is that γ and β no longer
go with the axes that are kept: layer norm has one mean for each sample and one γ for each place
within it. So γ moves inside the sums. With p = 1/m, s = 1/√(v + ε), x̂ = (x - μ) s, h = γ g,

    ∂L/∂x_j = s (h_j - p (Σ h_i + x̂_j Σ h_i x̂_i))      ∂L/∂γ = Σ g x̂      ∂L/∂β = Σ g

the first two sums over what shares a mean, the last two over what shares a γ. The derivation is
that of `batch_norm.py`, whose statistics these are; where γ is constant over a mean it is the same.

RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4) leaves out the mean and so the
first sum: x̂ = x r with r = 1/√(p Σ x² + ε), and from ∂r/∂x_j = -r³ p x_j,

    ∂L/∂x_j = r (h_j - x̂_j p Σ h_i x̂_i)
"""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import accumulation_dtype, saving
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.batch_norm import (
    Axes,
    Sample,
    along,
    batch_statistics,
    normalize,
    per_channel,
    sample_of,
)
from tinygrad_bn.ops.elementwise import sqrt


@op(
    domain=Domain(
        inputs=(Real(), Real(), Real()),
        cases=(
            case((3, 6), (6,), (6,), axis=(0,), channels=(1,), eps=1e-5),
            case((2, 3, 4), (3, 4), None, axis=(0,), channels=(1, 2), eps=1e-3),
            case((2, 3, 5), None, (5,), axis=(0, 1), channels=(2,), eps=1e-5),
            case((2, 2, 3, 2), (2, 3), (2, 3), axis=(0, 1), channels=(1, 2), eps=1e-5),
            case((2, 3, 2, 3), (3,), (3,), axis=(0, 3), channels=(3,), eps=1e-2),
            case((3, 4), None, None, axis=(0,), channels=(1,), eps=1.0),
        ),
    )
)
def layer_norm(
    x: Any, weight: Any = None, bias: Any = None, *, axis: Axes, channels: Axes, eps: float
) -> Any:
    """Return x with each sample normalized by its own mean and variance, in the dtype of x.

    axis: the kept axes: one mean for each combination of their indices.
    channels: the axes along which weight (γ) and bias (β) lie, whose sizes they have.

    Layer norm over the last axis of (N, T, D): axis (0, 1), channels (2,). Instance norm of (N, C,
    L): axis (0, 1), channels (1,). Group norm is taken of (N, G, C / G, L): axis (0, 1), channels
    (1, 2).

    Residuals: `mean` and the biased `var`, in float64, with reduced axes of size 1.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    sample = sample_of(wide, None, axis, axis)
    if wide.size == 0:
        mean = var = sample.mean(wide)
    else:
        mean, var = batch_statistics(wide, sample)
    out = normalize(wide, mean, var, weight, bias, channels, eps)
    return saving(out.astype(x.dtype), mean=mean, var=var)


@layer_norm.def_vjp
def _(
    g: Any,
    x: Any,
    weight: Any,
    mean: Any,
    var: Any,
    axis: Axes,
    channels: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    # gx = s (h - p (Σ h + x̂ Σ h x̂)) with h = γ g,  gγ = Σ g x̂,  gβ = Σ g
    x = x.astype(accumulation_dtype(x.dtype))
    g = g.astype(x.dtype)
    sample = sample_of(x, None, axis, axis)
    if mean is None:
        mean, var = batch_statistics(x, sample)  # anew, since they too depend on x
    s = 1 / sqrt(var + eps)
    x_hat = (x - mean) * s
    gx = None
    if needs[0]:
        h = g if weight is None else g * along(weight, x.shape, channels)
        gx = s * (h - sample.mean(h) - x_hat * sample.mean(h * x_hat))
    return (
        gx,
        per_channel(g * x_hat, channels) if needs[1] else None,
        per_channel(g, channels) if needs[2] else None,
    )


layer_norm.use_kernels(numpy="tinygrad_bn.kernels.cpu.numpy_layer_norm")


@op(
    domain=Domain(
        inputs=(Real(), Real()),
        cases=(
            case((3, 6), (6,), axis=(0,), channels=(1,), eps=1e-5),
            case((2, 3, 4), (3, 4), axis=(0,), channels=(1, 2), eps=1e-3),
            case((2, 3, 5), None, axis=(0, 1), channels=(2,), eps=1e-5),
        ),
    )
)
def rms_norm(x: Any, weight: Any = None, *, axis: Axes, channels: Axes, eps: float) -> Any:
    """Return x with each sample divided by the root of its mean square, in the dtype of x.

    Arguments as in `layer_norm`. Residual: `square`, the mean square, in float64.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    square = _mean_square(wide, sample_of(wide, None, axis, axis))
    out = wide * (1 / sqrt(square + eps))
    if weight is not None:
        out = out * along(weight, x.shape, channels)
    return saving(out.astype(x.dtype), square=square)


@rms_norm.def_vjp
def _(
    g: Any,
    x: Any,
    weight: Any,
    square: Any,
    axis: Axes,
    channels: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    # gx = r (h - x̂ p Σ h x̂) with h = γ g,  gγ = Σ g x̂
    x = x.astype(accumulation_dtype(x.dtype))
    g = g.astype(x.dtype)
    sample = sample_of(x, None, axis, axis)
    if square is None:
        square = _mean_square(x, sample)  # anew, since it too depends on x
    r = 1 / sqrt(square + eps)
    x_hat = x * r
    gx = None
    if needs[0]:
        h = g if weight is None else g * along(weight, x.shape, channels)
        gx = r * (h - x_hat * sample.mean(h * x_hat))
    return gx, per_channel(g * x_hat, channels) if needs[1] else None


rms_norm.use_kernels(numpy="tinygrad_bn.kernels.cpu.numpy_rms_norm")


def _mean_square(x: Any, sample: Sample) -> Any:
    return sample.mean(x * x)
