"""Population statistics taken wrongly: `nn.update_batch_norm` with a fault."""

import contextlib

import numpy as np

from tests.mutants.model_laws import POPULATION_LAWS
from tests.mutants.models import normalized_models
from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.verifiers import as_lawful
from tinygrad_bn import nn
from tinygrad_bn.nn import population
from tinygrad_bn.nn.population import Population

as_population = as_lawful(POPULATION_LAWS, normalized_models)


def merging(fault, **methods):
    """Return a mutant that merges batches with other methods of `Population`."""
    wrong = type("Wrong", (Population,), methods)
    return Mutant(f"population: {fault}", nn.update_batch_norm, as_population, lambda: replaced(
        (population, "Population", wrong)))  # fmt: skip


def function(fault, candidate):
    return Mutant(f"population: {fault}", candidate, as_population)


def planted(fault, *replacements):
    return Mutant(f"population: {fault}", nn.update_batch_norm, as_population, lambda: replaced(
        *replacements))  # fmt: skip


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm) and not m.frozen]


# --- merging -------------------------------------------------------------------------------------


def merge(mean=None, squares=None, total=None):
    """Return a `_merge` by the textbook, with some of its formulas replaced.

    Each takes the state, and k, mean and var of the batch that joins it.
    """

    def _merge(self, k, batch_mean, var):
        share = k / (self.count + k)
        delta = batch_mean - self.mean
        new_mean = self.mean + delta * share
        new_squares = self.squares + var * k + delta * delta * (self.count * share)
        new_total = self.count + k
        if mean is not None:
            new_mean = mean(self, k, batch_mean)
        if squares is not None:
            new_squares = squares(self, k, delta, var)
        if total is not None:
            new_total = total(self, k)
        self.mean, self.squares, self.count = new_mean, new_squares, new_total

    return _merge


def batch_after_batch(self, k, mean):
    """Give all batches the same weight."""
    self.merged = getattr(self, "merged", 0) + 1
    return self.mean + (mean - self.mean) / self.merged


def by_sums_of_squares(self, k, mean, var):
    """Sum x and x² in the dtype of the layer, about 0."""
    one, two = getattr(self, "sums", (0, 0))
    one, two = one + k * mean, two + k * (var + mean * mean).astype(np.float32)
    self.sums, self.count = (one, two), self.count + k
    self.mean, self.squares = one / self.count, two - one * one / self.count


def each_batch_unbiased(self, k, mean, var):
    Population._merge(self, k, mean, var * (k / (k - 1)))


def rounded_to_float32(self, k, mean, var):
    Population._merge(self, k, mean, var)
    self.mean = self.mean.astype(np.float32).astype(np.float64)


def in_one_step(self, found):
    """Take every batch for the first."""
    batches = self.batches
    Population.__init__(self)
    Population.add(self, found)
    self.batches = self.batches + batches


def first_alone(self, found):
    if not self.batches:
        Population.add(self, found)


def counted_also_if_empty(self, found):
    Population.add(self, found)
    self.batches = self.batches + (isinstance(found.count, int) and found.count == 0)


def values_for_batches(self, found):
    Population.add(self, found)
    self.batches = self.count


MERGING = [
    merging("variances averaged, how the means differ left out", _merge=merge(
        squares=lambda self, k, delta, var: self.squares + var * k)),
    merging("batches of any size weighted alike", _merge=merge(mean=batch_after_batch)),
    merging("mean weighted by what was there", _merge=merge(
        mean=lambda self, k, mean: (self.mean * k + mean * self.count) / (self.count + k) if (
            self.count) else mean)),
    merging("mean of the last batch", _merge=merge(mean=lambda self, k, mean: mean)),
    merging("mean: halfway to each batch", _merge=merge(mean=lambda self, k, mean: (
        (self.mean + mean) / 2 if self.count else mean))),
    merging("variance of the last batch", _merge=merge(
        squares=lambda self, k, delta, var: var * (self.count + k))),
    merging("largest variance", _merge=merge(
        squares=lambda self, k, delta, var: np.maximum(
            self.squares / max(self.count, 1), var) * (self.count + k))),
    merging("δ² counted for each value", _merge=merge(
        squares=lambda self, k, delta, var: (
            self.squares + var * k + delta * delta * k * (self.count > 0)))),
    merging("δ for δ²", _merge=merge(
        squares=lambda self, k, delta, var: (
            self.squares + var * k + abs(delta) * (self.count * k / (self.count + k))))),
    merging("n k forgotten to be divided by n + k", _merge=merge(
        squares=lambda self, k, delta, var: (
            self.squares + var * k + delta * delta * (self.count * k)))),
    merging("each batch's variance unbiased", _merge=each_batch_unbiased),
    merging("sums about 0 in float32", _merge=by_sums_of_squares),
    merging("mean kept in float32", _merge=rounded_to_float32),
    merging("one value too many", _merge=merge(total=lambda self, k: (
        self.count + k + (self.count == 0)))),
    merging("the last batch for all", add=in_one_step),
    merging("the first batch for all", add=first_alone),
    merging("biased whatever is asked", var=lambda self, correction: Population.var(self, 0)),
    merging("unbiased whatever is asked", var=lambda self, correction: Population.var(self, 1)),
    merging("correction for each batch", var=lambda self, correction: (
        self.squares / (self.total() - correction * self.batches))),
    merging("deviation for the variance", var=lambda self, correction: (
        Population.var(self, correction) ** 0.5)),
    merging("counter: empty batches too", add=counted_also_if_empty),
    merging("counter: of values", add=values_for_batches),
]  # fmt: skip


# --- what the model goes through -----------------------------------------------------------------


def evaluating_the_layers_before(self, x, mask, finish):
    """Pass on what evaluation does, though by statistics that are to be replaced."""
    _, found = _BY_THE_BATCH(self, x, mask, finish)
    was, self.frozen = self.frozen, True
    try:
        return nn.BatchNorm._finished(self, x, mask, finish), found
    finally:
        self.frozen = was


_BY_THE_BATCH = nn.BatchNorm._by_the_batch


def by_momentum(model, batches):
    """Train on the batches, as they come."""
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    for norm in norms(model):
        norm.reset_running_stats()
    for batch in batches:
        model(batch)
    for module, training in modes:
        module.training = training


def by_cumulative_average(model, batches):
    kept = [(norm, norm.momentum) for norm in norms(model)]
    for norm, _ in kept:
        norm.momentum = None
    by_momentum(model, batches)
    for norm, momentum in kept:
        norm.momentum = momentum


def momentum_not_put_back(model, batches):
    nn.update_batch_norm(model, batches)
    for norm in norms(model):
        norm.momentum = None


def added_to_what_was_there(model, batches):
    """Take what the layers hold for one more value."""
    before = [
        (n, n.running_mean.numpy().copy(), n.running_var.numpy().copy()) for n in norms(model)
    ]
    nn.update_batch_norm(model, batches)
    for norm, mean, var in before:
        norm.running_mean[...] = norm.running_mean.numpy() * 0.99 + mean * 0.01
        norm.running_var[...] = norm.running_var.numpy() * 0.99 + var * 0.01


def read_twice(model, batches):
    """Take the means in a first pass and the rest in a second one, also of a generator."""
    batches = iter(batches)
    first = next(batches, None)
    if first is not None:
        nn.update_batch_norm(model, [first])
    with contextlib.suppress(ValueError):
        nn.update_batch_norm(model, batches)


def counter_as_it_was(model, batches):
    before = [(norm, norm.num_batches_tracked.item()) for norm in norms(model)]
    nn.update_batch_norm(model, batches)
    for norm, count in before:
        norm.num_batches_tracked[...] = count


def counter_goes_on(model, batches):
    before = [(norm, norm.num_batches_tracked.item()) for norm in norms(model)]
    nn.update_batch_norm(model, batches)
    for norm, count in before:
        norm.num_batches_tracked += count


def reset_first(model, batches):
    for norm in norms(model):
        norm.reset_running_stats()
    nn.update_batch_norm(model, batches)


def batch_by_batch(model, batches):
    """Write what has been seen so far after each batch."""
    seen = []
    for batch in batches:
        seen.append(batch)
        nn.update_batch_norm(model, seen)
    if not seen:
        raise ValueError("no batches")


def thawing(model, batches):
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm) and m.frozen]
    for norm in frozen:
        norm.frozen = False
    nn.update_batch_norm(model, batches)
    for norm in frozen:
        norm.frozen = True


def not_with_frozen_ones(model, batches):
    if not any(isinstance(m, nn.BatchNorm) and m.frozen for m in model.modules()):
        nn.update_batch_norm(model, batches)


def last_layer_alone(model, batches):
    others = norms(model)[:-1]
    for norm in others:
        norm.frozen = True
    nn.update_batch_norm(model, batches)
    for norm in others:
        norm.frozen = False


def never_complaining(model, batches):
    with contextlib.suppress(ValueError):
        nn.update_batch_norm(model, batches)


def then(act):
    def update(model, batches):
        nn.update_batch_norm(model, batches)
        act(model)

    return update


def with_gradients(model, batches):
    batches = list(batches)
    nn.update_batch_norm(model, batches)
    with nn.recomputing(model):
        model(batches[0]).sum().backward()


def last_batch_twice(model, batches):
    batches = list(batches)
    nn.update_batch_norm(model, [*batches, *batches[-1:]])
    for norm in norms(model):
        norm.num_batches_tracked[...] = len(batches)


PASSES = [
    planted("layers before evaluate", (nn.BatchNorm, "_by_the_batch",
                                       evaluating_the_layers_before)),
    function("momentum, as in training", by_momentum),
    function("cumulative average of batches", by_cumulative_average),
    function("momentum None afterwards", momentum_not_put_back),
    function("mixed with what was there", added_to_what_was_there),
    function("batches read twice", read_twice),
    function("last batch counted twice", last_batch_twice),
    function("counter as it was", counter_as_it_was),
    function("counter goes on from what it was", counter_goes_on),
    function("statistics reset before a batch raises", reset_first),
    function("statistics written batch by batch", batch_by_batch),
    function("nothing raised", never_complaining),
    function("frozen layers too", thawing),
    function("none where a layer is frozen", not_with_frozen_ones),
    function("last batch norm alone", last_layer_alone),
    function("all in training afterwards", then(lambda model: model.train())),
    function("all in evaluation afterwards", then(lambda model: model.eval())),
    function("batch norms frozen afterwards", then(lambda model: [
        norm.freeze() for norm in norms(model)])),
    function("gradients left behind", with_gradients),
]  # fmt: skip

POPULATION = [*MERGING, *PASSES]

RIGHT = (
    Mutant("nn.update_batch_norm", nn.update_batch_norm, as_population),
    Mutant("population statistics by the textbook", nn.update_batch_norm, as_population, lambda: (
        replaced((population, "Population", type("Right", (Population,), {"_merge": merge()}))))),
)  # fmt: skip
