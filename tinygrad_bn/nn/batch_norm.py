"""Batch norm layers: `F.batch_norm` with its parameters and its running statistics."""

from __future__ import annotations

import operator
from typing import Any

from tinygrad_bn import backend, creation
from tinygrad_bn import functional as F
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.tensor import Tensor

Axis = int | tuple[int, ...]


class BatchNorm(Module):
    """Normalization of each channel over the batch, for any rank and any channel axes.

    num_features: the number of channels; with several axes, a tuple of their sizes in x's order.
    eps: added to the variance, in units of x².
    momentum: weight of the *new* value in the running statistics; None averages all batches
        equally.
    affine: whether to scale by `weight` (starting at 1) and shift by `bias` (at 0).
    track_running_stats: whether to keep running statistics; without them the statistics of the
        batch serve in evaluation too.
    axis: the channel axis or axes; -1 is channels-last.
    correction: of the *running* variance: 1 unbiased (PyTorch), 0 biased (Keras, Flax).
    dtype: of parameters and running statistics: float32 unless given, and never narrower.
    device: of parameters and running statistics.

    In training, x is normalized by the mean and the biased variance of the batch, and the buffers
    move: r ← (1 - momentum) · r + momentum · (statistic of the batch), `num_batches_tracked` by 1.
    In evaluation, x is normalized by `running_mean` (starting at 0) and `running_var` (at 1), which
    stay as they are. The result has the dtype of x.

    Raises ValueError for a wrong rank or number of channels, and in training for one value per
    channel; TypeError for integers.

    >>> import tinygrad_bn as tg
    >>> bn = tg.nn.BatchNorm(3, axis=-1)
    >>> y = bn(tg.randn(100, 7, 3))
    >>> bool((y.mean(axis=(0, 1)).abs() < 1e-6).min()), bn.num_batches_tracked.item()
    (True, 1)
    """

    #: The ranks of x that are accepted; None accepts any that has a channel and another axis.
    ranks: tuple[int, ...] | None = None

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: Axis = 1,
        correction: float = 1,
        dtype: Any = None,
        device: str | None = None,
    ):
        name = type(self).__name__
        self.num_features = num_features
        self.eps = float(eps)
        self.momentum = None if momentum is None else float(momentum)
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.correction = correction
        if not self.eps >= 0:
            raise ValueError(f"{name}: eps is {eps}, expected a number >= 0")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(
                f"{name}: momentum is {momentum}, expected the weight of the new value, in [0, 1], "
                f"or None for the average of all batches"
            )
        if len(self._channels()) != (len(axis) if isinstance(axis, tuple) else 1):
            raise ValueError(
                f"{name}: num_features is {num_features} and axis {axis}, expected a size for each "
                f"axis"
            )
        dtype = self._dtype_for(backend.as_dtype(dtype or "float32"))
        shape = self._channels()

        def filled(value: float) -> Tensor:
            return creation.full(shape, value, dtype=dtype, device=device)

        self.weight = Parameter(filled(1.0)) if affine else None
        self.bias = Parameter(filled(0.0)) if affine else None
        tracked = track_running_stats
        self.register_buffer("running_mean", filled(0.0) if tracked else None)
        self.register_buffer("running_var", filled(1.0) if tracked else None)
        count = creation.zeros((), dtype=backend.int64, device=device) if tracked else None
        self.register_buffer("num_batches_tracked", count)

    def forward(self, x: Any) -> Any:
        """Return x normalized; in training, after moving the running statistics."""
        self._check(x)
        counter = self.num_batches_tracked if self.training else None
        out = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            0.0 if counter is None else self._weight_of_new(counter),
            self.eps,
            axis=self.axis,
            correction=self.correction,
        )
        # Counted after the call, so that one which raised leaves no trace; an empty batch says
        # nothing about the statistics.
        if counter is not None and x.size:
            counter += 1
        return out

    def reset_running_stats(self) -> None:
        """Set the running statistics back to their start: mean 0, variance 1, no batches."""
        for buffer, value in (
            (self.running_mean, 0),
            (self.running_var, 1),
            (self.num_batches_tracked, 0),
        ):
            if buffer is not None:
                buffer[...] = value

    def extra_repr(self) -> str:
        """Return the sizes and settings; what momentum means is said in words."""
        momentum = (
            "None (average of all batches)"
            if self.momentum is None
            else f"{self.momentum} (weight of the new value)"
        )
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
        if self.axis != 1:
            text += f", axis={self.axis}"
        return text if self.correction == 1 else f"{text}, correction={self.correction}"

    def _weight_of_new(self, counter: Tensor) -> float:
        # Cumulative: the k-th batch enters with weight 1/k, which makes the mean of all k.
        return 1.0 / (int(counter) + 1) if self.momentum is None else self.momentum

    def _channels(self) -> tuple[int, ...]:
        sizes = self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)
        return tuple(operator.index(size) for size in sizes)

    def _dtype_for(self, dtype: Any) -> Any:
        """Return `dtype`, or float32 where that is wider: statistics are not kept in half."""
        return dtype if dtype.itemsize >= 4 else backend.float32

    def _check(self, x: Any) -> None:
        name = type(self).__name__
        if self.ranks is not None and x.ndim not in self.ranks:
            expected = " or ".join(map(str, self.ranks))
            raise ValueError(
                f"{name}: x has shape {tuple(x.shape)}, expected {expected} dimensions; for other "
                f"ranks use nn.BatchNorm"
            )
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        # An axis that x does not have is F.batch_norm's to complain about.
        if all(-x.ndim <= a < x.ndim for a in axes):
            found = tuple(x.shape[a] for a in sorted(a % x.ndim for a in axes))
            if found != self._channels():
                sizes = found if len(found) > 1 else found[0]
                raise ValueError(
                    f"{name}: x has shape {tuple(x.shape)}, so {sizes} channels on axis "
                    f"{self.axis}; expected num_features={self.num_features}. Set axis= if the "
                    f"channels are elsewhere (-1 is channels-last)"
                )


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) or (N, C, L).

    >>> import tinygrad_bn as tg
    >>> tg.nn.BatchNorm1d(3)(tg.randn(8, 3)).shape
    (8, 3)
    """

    ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for images: (N, C, H, W), or (N, H, W, C) with `axis=-1`.

    >>> import tinygrad_bn as tg
    >>> tg.nn.BatchNorm2d(20, axis=-1)(tg.randn(2, 24, 24, 20)).shape
    (2, 24, 24, 20)
    """

    ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for volumes: (N, C, D, H, W), or channels-last with `axis=-1`.

    >>> import tinygrad_bn as tg
    >>> tg.nn.BatchNorm3d(2)(tg.randn(2, 2, 3, 3, 3)).shape
    (2, 2, 3, 3, 3)
    """

    ranks = (5,)
