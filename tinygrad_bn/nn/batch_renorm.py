"""The Batch Renorm layer, and how its limits open up in the course of training."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import placed
from tinygrad_bn.batch_renormalization import batch_renorm_and_statistics
from tinygrad_bn.nn.batch_norm import BatchNorm
from tinygrad_bn.nn.conventions import BY_CONVENTION, Default
from tinygrad_bn.nn.per_channel import Axis, ignore
from tinygrad_bn.normalization import BatchStatistics, Finish
from tinygrad_bn.ops.elementwise import clip

Warmup = tuple[int, int, int]


class BatchRenorm(BatchNorm):
    """Batch norm whose training output is corrected towards what evaluation will give.

    r_max, d_max: the limits of the correction, see `F.batch_renorm`; attributes, which may be set
        at any time.
    warmup: (start, r_end, d_end), in batches. Up to `start` it is batch norm (limits 1 and 0); then
        the limits open linearly, to r_max at batch r_end and to d_max at d_end. The default is the
        paper's. None: no warm-up.

    The rest as in `BatchNorm`. It needs running statistics, and takes no mask and no groups. For
    small batches, and batches whose samples depend on each other. The paper advises a higher
    momentum than is usual (0.01 of the new value), since training depends on the averages.

    In `recomputing`, the correction is that of the latest forward that moved the statistics, so
    that the same is computed.

    Source: Ioffe, "Batch Renormalization", 2017 (arXiv:1702.03275), Algorithm 1 and section 4.

    >>> import tinygrad_bn as tg
    >>> bn = tg.nn.BatchRenorm(3, warmup=(0, 10, 20))
    >>> for _ in range(10):
    ...     y = bn(tg.randn(8, 3))
    >>> bn.limits()
    (3.0, 2.5)
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...] | None,
        eps: float | Default = BY_CONVENTION,
        momentum: float | Default | None = BY_CONVENTION,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: Warmup | None = (5000, 40000, 25000),
        axis: Axis | Default = BY_CONVENTION,
        scale: bool | None = None,
        center: bool | None = None,
        correction: float | Default = BY_CONVENTION,
        convention: str = "torch",
        dtype: Any = None,
        device: str | None = None,
    ):
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(
                f"{self._name}: r_max is {r_max} and d_max {d_max}, expected r_max >= 1 and "
                f"d_max >= 0"
            )
        if warmup is not None and not 0 <= warmup[0] <= min(warmup[1:]):
            raise ValueError(
                f"{self._name}: warmup is {warmup}, expected numbers of batches (start, r_end, "
                f"d_end) with 0 <= start <= r_end and start <= d_end"
            )
        self.r_max, self.d_max, self.warmup = float(r_max), float(d_max), warmup
        #: Running mean and variance and the limits, as the latest forward that moved them met them.
        self._met: tuple[Any, Any, tuple[Any, Any]] | None = None
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            axis=axis,
            scale=scale,
            center=center,
            correction=correction,
            convention=convention,
            dtype=dtype,
            device=device,
        )

    def limits(self) -> tuple[float, float]:
        """Return r_max and d_max as the next batch will meet them."""
        r_max, d_max = self._limits()
        return float(r_max), float(d_max)

    def _limits(self) -> tuple[Any, Any]:
        """Return the limits as numbers, or as arrays computed where the counter is: it may be on a
        GPU, for which no step should have to wait."""
        if self.warmup is None:
            return self.r_max, self.d_max
        counter: Any = self.num_batches_tracked
        start, *ends = self.warmup
        with placed(self._name, (counter.data,)):
            r, d = (
                (counter.data >= end).astype("float64")
                if end == start
                else clip((counter.data - start) / (end - start), min=0.0, max=1.0)
                for end in ends
            )
            return 1 + r * (self.r_max - 1), d * self.d_max

    def _by_the_batch(self, x: Any, mask: Any, finish: Finish) -> tuple[Any, BatchStatistics]:
        if mask is not None:
            raise ValueError(f"{self._name}: it takes no mask; use nn.BatchNorm")
        mean: Any = self.running_mean
        var: Any = self.running_var
        met = mean.data, var.data, self._limits()
        if self._sink is ignore:
            met = self._met or met
        elif x.size and self._sink is None:
            self._met = met[0].copy(), met[1].copy(), met[2]
        r_max, d_max = met[2]
        out, found = batch_renorm_and_statistics(
            x,
            met[0],
            met[1],
            self.weight,
            self.bias,
            self.eps,
            r_max=r_max,
            d_max=d_max,
            axis=self.axis,
        )
        return finish(out), found

    def extra_repr(self) -> str:
        """Return the sizes and settings, the final limits among them."""
        text = super().extra_repr()
        return f"{text}, r_max={self.r_max}, d_max={self.d_max}, warmup={self.warmup}"
