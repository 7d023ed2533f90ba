"""Population statistics: running statistics taken over a whole data set in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tinygrad_bn.backend import placed
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.nn.batch_norm import BatchNorm
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.per_channel import PerChannel, recomputing
from tinygrad_bn.normalization import BatchStatistics, write_within_range
from tinygrad_bn.ops.elementwise import where


class Population:
    """Mean and sum of squared deviations of each channel over all batches added so far, float64.

    Two sets of n and k values with means a, b and squared deviations A, B have together, with
    δ = b - a,

        mean a + δ k / (n + k),   squared deviations A + B + δ² n k / (n + k)

    which loses nothing where means are large against deviations, unlike Σx² - (Σx)² / n. Source:
    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equations (2.1).
    """

    def __init__(self) -> None:
        self.batches: Any = 0
        self.count: Any = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, found: BatchStatistics) -> None:
        """Merge one batch, or each of its groups; what has too few values adds nothing."""
        if isinstance(found.count, int) and found.count == 0:
            return
        means = found.mean.reshape((found.groups, -1))
        variances = found.var.reshape((found.groups, -1))
        counts = found.count
        if not isinstance(counts, int):
            counts = counts.reshape(-1)
        for i in range(found.groups):
            k = counts if isinstance(counts, int) else counts[i]
            self._merge(k, means[i], variances[i])
        some = 1 if isinstance(counts, int) else (counts > 0).any()
        self.batches = self.batches + some

    def _merge(self, k: Any, mean: Any, var: Any) -> None:
        total = self.count + k
        # A masked group may be empty, and both sides with it: 0 / 0.
        share = k / total if isinstance(total, int) else k / where(total > 0, total, 1.0)
        delta = mean - self.mean
        self.mean = self.mean + delta * share
        self.squares = self.squares + var * k + delta * delta * (self.count * share)
        self.count = total

    def total(self) -> float:
        """Return how many values there were, which may have to be fetched from a device."""
        return float(self.count if isinstance(self.count, int) else self.count.item())

    def var(self, correction: float) -> Any:
        """Return the variance of all values: their squared deviations / (total - correction)."""
        count = self.total()
        return self.squares / (count - correction if count > correction else count)


def update_batch_norm(model: Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of every batch norm in `model` to those of a whole data set.

    model: a Module with batch norm layers inside.
    batches: inputs of the model, one batch each: arrays or Tensors, or tuples or lists that begin
        with one, as a loader of images and labels gives them. Read once; a generator will do.

    One pass, without gradients, in training mode: each layer sees what it sees in training, and
    passes on what it passes on in training, normalized by the batch (dropout drops). Mean and
    variance are those of all values that came by, as if of one array: batches are merged, by Chan's
    formula in float64, so that they may have different sizes, and the variance contains how
    their means differ; averaged variances would lack that. It gets the layer's `correction`, and
    beyond its dtype it is the largest number of it.

    `momentum` plays no part and stays. The counter becomes the number of batches, so that training
    can go on from here, cumulative averages included. Frozen layers keep their statistics, as do
    layers that no batch reached. Modes are put back as they were. If anything raises on the way,
    nothing was changed.

    Raises ValueError if there is no batch norm whose statistics could be set, and if `batches` is
    empty.

    >>> import tinygrad_bn as tg
    >>> bn = tg.nn.BatchNorm1d(1, correction=0)
    >>> x = tg.tensor([[0.0], [2.0], [4.0], [6.0], [8.0]])
    >>> tg.nn.update_batch_norm(bn, (x[i : i + 2] for i in (0, 3)))  # 0 and 2, 6 and 8
    >>> bn.running_mean.tolist(), bn.running_var.tolist()
    ([4.0], [10.0])
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.track_running_stats and not module.frozen
    ]
    if not layers:
        raise ValueError(
            "update_batch_norm: the model has no batch norm with running statistics that are not "
            "frozen; nothing could be updated"
        )
    populations = [Population() for _ in layers]
    unsized = [m for m in model.modules() if isinstance(m, PerChannel) and m.num_features is None]
    before = [(module, module.training) for module in model.modules()]
    given = 0
    try:
        with recomputing(model), no_grad():
            for layer, population in zip(layers, populations, strict=True):
                layer._sink = population.add  # recomputing puts back what was there
            model.train()
            for batch in batches:
                given += 1
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        counts = [population.total() for population in populations]
        if not any(counts):
            raise ValueError(
                f"update_batch_norm: got {given} batches and no values in them"
                + ("; an iterator that was used before is empty, give a fresh one" * (not given))
            )
    except BaseException:
        for module in unsized:
            module._forget_sizes()
        raise
    finally:
        for module, training in before:
            module.training = training
    for layer, population, count in zip(layers, populations, counts, strict=True):
        if count:
            counter: Any = layer.num_batches_tracked
            with placed("update_batch_norm", (population.mean,)):
                write_within_range(layer.running_mean, population.mean)
                write_within_range(layer.running_var, population.var(layer.correction))
                counter[...] = population.batches
