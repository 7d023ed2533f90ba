"""Layers that normalize each sample by itself: layer, group, instance and RMS norm."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from tinygrad_bn import backend, creation
from tinygrad_bn import functional as F
from tinygrad_bn.layer_normalization import instance_norm_and_statistics
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.nn.per_channel import PerChannel
from tinygrad_bn.normalization import BatchStatistics


class _OverLastAxes(Module):
    """A weight, starting at 1, and a bias, at 0, of the shape of the last axes of x."""

    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        scale: bool,
        center: bool,
        dtype: Any,
        device: str | None,
    ):
        sizes = normalized_shape if isinstance(normalized_shape, Sequence) else [normalized_shape]
        self.normalized_shape = tuple(operator.index(size) for size in sizes)
        if not self.normalized_shape:
            raise ValueError(
                f"{type(self).__name__}: normalized_shape is (), expected the sizes of the last "
                f"axes of x"
            )
        kept = self._dtype_for(backend.as_dtype(dtype or "float32"))

        def filled(value: float) -> Parameter:
            shape = self.normalized_shape
            return Parameter(creation.full(shape, value, dtype=kept, device=device))

        self.weight = filled(1.0) if scale else None
        self.bias = filled(0.0) if center else None

    def _dtype_for(self, dtype: Any) -> Any:
        """Return `dtype`, or float32 where that is wider, as batch norm does."""
        return dtype if dtype.itemsize >= 4 else backend.float32


class LayerNorm(_OverLastAxes):
    """Normalization of each sample over its last axes; see `F.layer_norm`.

    normalized_shape: the sizes of these axes; an integer is one axis.
    eps: added to the variance, in units of x².
    elementwise_affine: whether to scale by `weight` (starting at 1) and shift by `bias` (at 0).
    bias: False leaves out the shift alone.
    dtype, device: of the parameters: float32 unless given, and never narrower.

    >>> import tinygrad_bn as tg
    >>> y = tg.nn.LayerNorm(8)(tg.randn(2, 3, 8))
    >>> bool((y.mean(axis=-1).abs() < 1e-6).min())
    True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = None,
        device: str | None = None,
    ):
        self.eps = _checked_eps(self, eps)
        self.elementwise_affine = elementwise_affine
        center = elementwise_affine and bias
        super().__init__(normalized_shape, elementwise_affine, center, dtype, device)

    def forward(self, x: Any) -> Any:
        """Return x normalized over its last axes."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Return the sizes and settings."""
        text = f"{self.normalized_shape}, eps={self.eps}"
        text += f", elementwise_affine={self.elementwise_affine}"
        return text + ", bias=False" * (self.elementwise_affine and self.bias is None)


class RMSNorm(_OverLastAxes):
    """Division of each sample by its root mean square over the last axes; see `F.rms_norm`.

    normalized_shape: the sizes of these axes; an integer is one axis.
    eps: added to the mean square; None is the machine epsilon of x's dtype.
    elementwise_affine: whether to scale by `weight`, starting at 1.
    dtype, device: of the parameter: float32 unless given, and never narrower.

    >>> import tinygrad_bn as tg
    >>> tg.nn.RMSNorm(2)(tg.tensor([[1.0, 7.0]]))  # mean(x²) = 25
    Tensor([[0.2, 1.4]], dtype=float32, op='rms_norm')
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: Any = None,
        device: str | None = None,
    ):
        self.eps = None if eps is None else _checked_eps(self, eps)
        self.elementwise_affine = elementwise_affine
        super().__init__(normalized_shape, elementwise_affine, False, dtype, device)

    def forward(self, x: Any) -> Any:
        """Return x divided by its root mean square."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Return the sizes and settings."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )


class GroupNorm(PerChannel):
    """Normalization of each sample over groups of its channels; see `F.group_norm`.

    num_groups: how many groups, a divisor of num_channels.
    num_channels: the size of x along `axis`.
    eps: added to the variance, in units of x².
    affine: whether to scale by `weight` (starting at 1) and shift by `bias` (at 0), per channel.
    axis: the channel axis; -1 is channels-last.
    dtype, device: of the parameters: float32 unless given, and never narrower.

    >>> import tinygrad_bn as tg
    >>> tg.nn.GroupNorm(2, 6)(tg.randn(4, 6, 5, 5)).shape
    (4, 6, 5, 5)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        axis: int = 1,
        dtype: Any = None,
        device: str | None = None,
    ):
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"{self._name}: num_groups={num_groups} does not split {num_channels} channels "
                f"into equal parts; choose a divisor"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = _checked_eps(self, eps)
        self.affine = affine
        super().__init__(
            num_channels,
            axis,
            scale=affine,
            center=affine,
            tracked=False,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Any) -> Any:
        """Return x normalized over groups of channels."""
        self._check(x)
        axis: Any = self.axis
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, axis=axis)

    def extra_repr(self) -> str:
        """Return the sizes and settings."""
        text = f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"
        return text if self.axis == 1 else f"{text}, axis={self.axis}"


class InstanceNorm(PerChannel):
    """Normalization of each channel of each sample, for any rank; see `F.instance_norm`.

    num_features: the number of channels; None: read off the first x, or off a state dict.
    eps: added to the variance, in units of x².
    momentum: weight of the *new* value in the running statistics.
    affine: whether to scale by `weight` (starting at 1) and shift by `bias` (at 0), per channel.
    track_running_stats: whether to keep averages over the samples of mean and unbiased variance, by
        which evaluation normalizes; otherwise each sample is normalized by itself there too.
    axis: the channel axis; -1 is channels-last.
    dtype, device: of parameters and statistics: float32 unless given, and never narrower.

    >>> import tinygrad_bn as tg
    >>> tg.nn.InstanceNorm(3, axis=-1)(tg.randn(2, 8, 8, 3)).shape
    (2, 8, 8, 3)
    """

    any_rank = "nn.InstanceNorm"

    def __init__(
        self,
        num_features: int | None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        axis: int = 1,
        dtype: Any = None,
        device: str | None = None,
    ):
        self.eps = _checked_eps(self, eps)
        self.momentum = float(momentum)
        if not 0 <= self.momentum <= 1:
            raise ValueError(
                f"{self._name}: momentum is {momentum}, expected the weight of the new value, in "
                f"[0, 1]"
            )
        self.affine = affine
        self.track_running_stats = track_running_stats
        super().__init__(
            num_features,
            axis,
            scale=affine,
            center=affine,
            tracked=track_running_stats,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Any) -> Any:
        """Return x normalized; in training, after moving running statistics if there are any."""
        self._check(x)
        axis: Any = self.axis
        vectors = self.weight, self.bias
        if self.running_mean is not None and not self.training:
            running = self.running_mean, self.running_var
            return F.batch_norm(x, *running, *vectors, eps=self.eps, axis=axis)
        out, found = instance_norm_and_statistics(x, *vectors, self.eps, axis=axis)
        if self.training and self.num_batches_tracked is not None:
            (self._sink or self._move)(found)
        return out

    def _move(self, found: BatchStatistics) -> None:
        counter: Any = self.num_batches_tracked
        counter += found.move(self.running_mean, self.running_var, self.momentum, 1)

    def extra_repr(self) -> str:
        """Return the sizes and settings; what momentum means is said in words."""
        text = f"{self.num_features}, eps={self.eps}"
        if self.track_running_stats:
            text += f", momentum={self.momentum} (weight of the new value)"
        text += f", affine={self.affine}, track_running_stats={self.track_running_stats}"
        return text if self.axis == 1 else f"{text}, axis={self.axis}"


class InstanceNorm1d(InstanceNorm):
    """`InstanceNorm` for (N, C, L), or (N, L, C) with `axis=-1`.

    >>> import tinygrad_bn as tg
    >>> tg.nn.InstanceNorm1d(3)(tg.randn(2, 3, 8)).shape
    (2, 3, 8)
    """

    ranks = (3,)


class InstanceNorm2d(InstanceNorm):
    """`InstanceNorm` for images: (N, C, H, W), or (N, H, W, C) with `axis=-1`.

    >>> import tinygrad_bn as tg
    >>> tg.nn.InstanceNorm2d(3)(tg.randn(2, 3, 8, 8)).shape
    (2, 3, 8, 8)
    """

    ranks = (4,)


class InstanceNorm3d(InstanceNorm):
    """`InstanceNorm` for volumes: (N, C, D, H, W), or channels-last.

    >>> import tinygrad_bn as tg
    >>> tg.nn.InstanceNorm3d(3)(tg.randn(2, 3, 4, 4, 4)).shape
    (2, 3, 4, 4, 4)
    """

    ranks = (5,)


def _checked_eps(layer: Module, eps: float) -> float:
    if not float(eps) >= 0:
        raise ValueError(f"{type(layer).__name__}: eps is {eps}, expected a number >= 0")
    return float(eps)
