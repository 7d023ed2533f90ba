"""Batch norm layers: `F.batch_norm` with its parameters and its running statistics."""

from __future__ import annotations

import operator
from typing import Any, TypeVar

from tinygrad_bn import functional as F
from tinygrad_bn.backend import float64, placed
from tinygrad_bn.nn.conventions import (
    BY_CONVENTION,
    Default,
    convention_named,
    convert_running_var,
)
from tinygrad_bn.nn.per_channel import Axis, PerChannel
from tinygrad_bn.normalization import (
    BatchStatistics,
    Finish,
    batch_norm_and_statistics,
    plain,
    write_within_range,
)

Self = TypeVar("Self", bound="BatchNorm")


class BatchNorm(PerChannel):
    """Normalization of each channel over the batch, for any rank and any channel axes.

    num_features: the number of channels; with several axes, a tuple of their sizes in x's order.
        None: read off the first x, or off a state dict.
    eps: added to the variance, in units of x².
    momentum: weight of the *new* value in the running statistics (of the old value in the other
        conventions); None averages all batches equally.
    affine: whether to scale by `weight` (starting at 1) and shift by `bias` (at 0).
    track_running_stats: whether to keep running statistics; without them the statistics of the
        batch serve in evaluation too.
    axis: the channel axis or axes; -1 is channels-last.
    scale, center: the two halves of `affine` by themselves; None is as `affine`.
    groups: into how many ghost batches, each normalized by itself, a batch is split in training.
    correction: of the *running* variance: 1 unbiased (PyTorch), 0 biased (Keras, Flax).
    convention: "torch", "keras", "flax" or "chainer": what momentum weights, and the defaults of
        `eps`, `momentum`, `correction` and `axis` where these are not given. Those above are
        PyTorch's, 1e-5, 0.1, 1 and 1; `nn.CONVENTIONS` has them all.
    dtype: of parameters and running statistics: float32 unless given, and never narrower.
    device: of parameters and running statistics.

    In training, x is normalized by the mean and the biased variance of the batch, and the buffers
    move: r ← (1 - momentum) · r + momentum · (statistic of the batch), `num_batches_tracked` by 1.
    In evaluation, x is normalized by `running_mean` (starting at 0) and `running_var` (at 1), which
    stay as they are. The result has the dtype of x. A batch that is empty, or of which a mask
    leaves fewer than two values, moves neither statistics nor counter.

    Raises ValueError for a wrong rank or number of channels, and in training for one value per
    channel; TypeError for integers.

    >>> import tinygrad_bn as tg
    >>> bn = tg.nn.BatchNorm(3, axis=-1)
    >>> y = bn(tg.randn(100, 7, 3))
    >>> bool((y.mean(axis=(0, 1)).abs() < 1e-6).min()), bn.num_batches_tracked.item()
    (True, 1)
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...] | None,
        eps: float | Default = BY_CONVENTION,
        momentum: float | Default | None = BY_CONVENTION,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: Axis | Default = BY_CONVENTION,
        scale: bool | None = None,
        center: bool | None = None,
        groups: int = 1,
        correction: float | Default = BY_CONVENTION,
        convention: str = "torch",
        dtype: Any = None,
        device: str | None = None,
    ):
        chosen = convention_named(self._name, convention)
        self.convention = convention
        self.eps = chosen.eps if isinstance(eps, Default) else float(eps)
        if isinstance(momentum, Default):
            momentum = chosen.momentum
        self.momentum = None if momentum is None else float(momentum)
        self.correction = chosen.correction if isinstance(correction, Default) else correction
        self.scale = affine if scale is None else scale
        self.center = affine if center is None else center
        self.affine = self.scale and self.center
        self.track_running_stats = track_running_stats
        self.groups = operator.index(groups) if hasattr(groups, "__index__") else 0
        self.frozen = False
        self._frozen_parameters: tuple[str, ...] = ()
        if not self.eps >= 0:
            raise ValueError(f"{self._name}: eps is {eps}, expected a number >= 0")
        self._check_momentum()
        if self.groups < 1:
            raise ValueError(f"{self._name}: groups is {groups}, expected an integer, at least 1")
        if not self.correction >= 0:
            raise ValueError(
                f"{self._name}: correction is {correction}, expected a number >= 0: the running "
                f"variance divides by m - correction (1 unbiased, 0 biased)"
            )
        super().__init__(
            num_features,
            chosen.axis if isinstance(axis, Default) else axis,
            scale=self.scale,
            center=self.center,
            tracked=track_running_stats,
            dtype=dtype,
            device=device,
        )

    # --- calling ---------------------------------------------------------------------------------

    def forward(self, x: Any, mask: Any = None) -> Any:
        """Return x normalized; in training, after moving the running statistics.

        mask: how often each value counts, as in `F.batch_norm`; it acts on statistics of the batch,
            so where running statistics are used it changes nothing.
        """
        return self._finished(x, mask, plain)

    def followed_by_relu(self, x: Any) -> Any:
        """Return max(y, 0), y what calling this layer returns: in one where a kernel serves it."""
        return self._finished(x, None, Finish(relu=True))

    def _finished(self, x: Any, mask: Any, finish: Finish) -> Any:
        self._check(x)
        if not self.takes_statistics:
            return finish(
                F.batch_norm(
                    x,
                    self.running_mean,
                    self.running_var,
                    self.weight,
                    self.bias,
                    eps=self.eps,
                    axis=self.axis,
                )
            )
        out, found = self._by_the_batch(x, mask, finish)
        # After the call, so that one which raised leaves no trace.
        self.take(found)
        return out

    @property
    def takes_statistics(self) -> bool:
        """Whether x is normalized by statistics of the batch, as in training."""
        return self.running_mean is None or (self.training and not self.frozen)

    def take(self, found: BatchStatistics) -> None:
        """Move the running statistics by those of a batch, where that is to be done."""
        if self.training:
            (self._sink or self._move)(found)

    def _by_the_batch(self, x: Any, mask: Any, finish: Finish) -> tuple[Any, BatchStatistics]:
        return batch_norm_and_statistics(
            x, self.weight, self.bias, self.eps,
            axis=self.axis, mask=mask, groups=self.groups, finish=finish,
        )  # fmt: skip

    def _move(self, found: BatchStatistics) -> None:
        """Move the running statistics and the counter."""
        counter = self.num_batches_tracked
        if counter is None:
            return
        counted = found.move(
            self.running_mean, self.running_var, self._weight_of_new(counter), self.correction
        )
        # Only a mask makes `counted` data; it is added as such, so that nothing waits for a device.
        counter += counted if counted is not True else 1

    def _weight_of_new(self, counter: Any) -> Any:
        if self.momentum is None:
            # Cumulative: the k-th batch enters with weight 1/k, which makes the mean of all k.
            return 1.0 / (counter.data + 1)
        self._check_momentum()
        return convention_named(self._name, self.convention).weight_of_new(self.momentum)

    def _check_momentum(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            chosen = convention_named(self._name, self.convention)
            raise ValueError(
                f"{self._name}: momentum is {self.momentum}, expected the weight of the "
                f"{chosen.weighted} value, in [0, 1], or None for the average of all batches "
                f"(convention={self.convention!r}: {chosen.explain()})"
            )

    # --- freezing --------------------------------------------------------------------------------

    def freeze(self: Self, parameters: bool = False) -> Self:
        """Return this layer after fixing its statistics: it evaluates, in training mode too.

        parameters: fix weight and bias as well; their gradients are dropped, so that an optimizer
            which has them passes them over.

        For fine-tuning with batches too small to take statistics of. `train()` does not undo it,
        `unfreeze()` does.

        >>> import tinygrad_bn as tg
        >>> bn = tg.nn.BatchNorm1d(3).freeze(parameters=True)
        >>> y = bn.train()(tg.randn(8, 3))
        >>> bn.num_batches_tracked.item(), bn.weight.requires_grad
        (0, False)
        """
        if self.running_mean is None:
            raise ValueError(
                f"{self._name}.freeze: it keeps no running statistics to be fixed "
                f"(track_running_stats=False)"
            )
        self.frozen = True
        if parameters:
            for name, parameter in self._own_parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                    self._frozen_parameters += (name,)
        return self

    def unfreeze(self: Self) -> Self:
        """Return this layer after undoing `freeze`, for the parameters that it fixed too."""
        self.frozen = False
        for name in self._frozen_parameters:
            getattr(self, name).requires_grad_()
        self._frozen_parameters = ()
        return self

    # --- conventions -----------------------------------------------------------------------------

    def convert(
        self: Self, convention: str, *, count: float | None = None, correction: float | None = None
    ) -> Self:
        """Return this layer after changing over to the meaning of another convention.

        convention: "torch", "keras", "flax" or "chainer".
        count: m, how many values per channel a batch had; needed where the correction of the
            running variance changes and batches have been seen. No checkpoint holds it.
        correction: of the running variance from now on; None is the convention's.

        `momentum` is restated so that the weight of the new value stays, and `running_var` is
        converted as by `nn.convert_running_var`. All else, `eps` and `axis` with it, belongs to the
        model and stays. To take over a checkpoint: make the layer in the convention of the library
        that wrote it, load, convert.

        Raises ValueError where `count` is needed and missing.

        >>> bn = BatchNorm1d(3, convention="keras").convert("torch")
        >>> bn.momentum, bn.correction, bn.eps
        (0.01, 1, 0.001)
        """
        target = convention_named(f"{self._name}.convert", convention)
        source = convention_named(self._name, self.convention)
        after = target.correction if correction is None else correction
        counter = self.num_batches_tracked
        if after != self.correction and counter is not None and int(counter) > 0:
            if count is None:
                raise ValueError(
                    f"{self._name}.convert: running_var is kept with correction {self.correction} "
                    f"and convention={convention!r} has {after}; the two differ by a factor that "
                    f"depends on how many values per channel a batch had. Give count=, or "
                    f"correction={self.correction} to keep running_var as it is"
                )
            var: Any = self.running_var
            with placed(f"{self._name}.convert", (var.data,)):
                wide = var.data.astype(float64)
                write_within_range(var, convert_running_var(wide, count, self.correction, after))
        if self.momentum is not None and source.weights_new != target.weights_new:
            # 1 - 0.99 is 0.010000000000000009: rounded, or each change would add such digits.
            self.momentum = round(1 - self.momentum, 15)
        self.convention, self.correction = convention, after
        return self

    # --- text ------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Return the sizes and settings; what momentum and correction mean is said in words."""
        chosen = convention_named(self._name, self.convention)
        momentum = (
            "None (average of all batches)"
            if self.momentum is None
            else f"{self.momentum} (weight of the {chosen.weighted} value)"
        )
        text = f"{self.num_features}, eps={self.eps}, momentum={momentum}, "
        if self.scale == self.center:
            text += f"affine={self.affine}"
        else:
            text += f"scale={self.scale}, center={self.center}"
        text += f", track_running_stats={self.track_running_stats}"
        divisor = "divided by m - correction" if self.correction else "biased"
        for name, value, usual, words in (
            ("axis", self.axis, 1, ""),
            ("groups", self.groups, 1, ""),
            ("correction", self.correction, 1, f" (running_var is {divisor})"),
            ("convention", self.convention, "torch", ""),
            ("frozen", self.frozen, False, ""),
        ):
            if value != usual:
                text += f", {name}={value!r}{words}"
        return text


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
