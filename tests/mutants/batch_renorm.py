"""Batch Renorm with a fault in its correction, its gradient, its statistics or its warm-up."""

import contextlib

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.textbook import raw
from tests.mutants.verifiers import as_lawful
from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.nn.per_channel import PerChannel
from tinygrad_bn.ops.elementwise import clip
from tinygrad_bn.testing.batch_renorm_laws import RENORM_LAWS, RENORM_LAYER_LAWS
from tinygrad_bn.testing.strategies import batch_norm_inputs

as_batch_renorm = as_lawful(RENORM_LAWS, lambda: batch_norm_inputs(max_ratio=10.0))
as_layer = as_lawful(RENORM_LAYER_LAWS, lambda: batch_norm_inputs(max_ratio=10.0))


# --- the function --------------------------------------------------------------------------------


def textbook_renorm(
    *,
    r=lambda sigma, before, r_max: np.clip(sigma / before, 1 / r_max, r_max),
    d=lambda mean, running, before, d_max, sigma: np.clip((mean - running) / before, -d_max, d_max),
    root=lambda var, eps: np.sqrt(var + eps),
    detach=raw,
    y=lambda x_hat, r, d, weight, bias: (x_hat * r + d) * weight + bias,
    new_var=lambda var, m, correction: var * (m / (m - correction)),
    moved=lambda old, new, momentum: (1 - momentum) * old + momentum * new,
    evaluation=F.batch_norm,
    first_move=False,
):
    """Return Batch Renorm as Algorithm 1 has it, on the tape, with some of its formulas replaced.

    detach: how the batch's statistics enter r and d. first_move: move the statistics first.
    """

    def batch_renorm(
        x,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
        *,
        r_max=3.0,
        d_max=5.0,
        axis=1,
        correction=1,
    ):
        if not training:
            return evaluation(x, running_mean, running_var, weight, bias, eps=eps, axis=axis)
        axis %= x.ndim
        others = tuple(i for i in range(x.ndim) if i != axis)
        wide = x.astype("float64")

        def along(v, default):
            if v is None:
                return default
            return v.astype("float64").reshape(
                tuple(n if i == axis else 1 for i, n in enumerate(x.shape))
            )

        shift = raw(wide).mean(axis=others, keepdims=True)
        mean = (wide - shift).mean(axis=others, keepdims=True) + shift
        var = ((wide - mean) ** 2).mean(axis=others, keepdims=True)

        def move():
            m = x.size // x.shape[axis]
            new = raw(mean), new_var(raw(var), m, correction)
            for running, value in zip((running_mean, running_var), new, strict=True):
                old = raw(running)
                old[...] = moved(old.astype("float64"), value.reshape(old.shape), momentum)

        if first_move:
            move()
        before = root(raw(along(running_var, None)), eps)
        sigma = root(detach(var), eps)
        ratio = r(sigma, before, r_max)
        distance = d(detach(mean), raw(along(running_mean, None)), before, d_max, sigma)
        x_hat = (wide - mean) / (var + eps) ** 0.5
        out = y(x_hat, ratio, distance, along(weight, 1.0), along(bias, 0.0)).astype(x.dtype)
        if not first_move:
            move()
        return out

    return batch_renorm


def mutant(fault, candidate=None, **formulas):
    wrong = textbook_renorm(**formulas) if candidate is None else candidate
    return Mutant(f"Batch Renorm: {fault}", wrong, as_batch_renorm)


def given_limits(change):
    def candidate(*args, r_max=3.0, d_max=5.0, **options):
        r_max, d_max = change(r_max, d_max)
        return F.batch_renorm(*args, r_max=r_max, d_max=d_max, **options)

    return _signed(candidate)


def _signed(candidate):
    """Return a function of any arguments with the signature of the right one."""

    def batch_renorm(
        x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
        eps=1e-5, **options,
    ):  # fmt: skip
        return candidate(
            x, running_mean, running_var, weight, bias, training, momentum, eps, **options
        )

    return batch_renorm


def corrected_in_evaluation(x, mean, var, weight, bias, *, eps, axis):
    return F.batch_norm(x, mean, var, weight, bias, eps=eps, axis=axis) * 1.5


FUNCTION = [
    mutant("r not limited below", r=lambda sigma, before, r_max: np.minimum(
        sigma / before, r_max)),
    mutant("r not limited above", r=lambda sigma, before, r_max: np.maximum(
        sigma / before, 1 / r_max)),
    mutant("r limited to [0, r_max]", r=lambda sigma, before, r_max: np.clip(
        sigma / before, 0, r_max)),
    mutant("r inverted", r=lambda sigma, before, r_max: np.clip(
        before / sigma, 1 / r_max, r_max)),
    mutant("r of variances", r=lambda sigma, before, r_max: np.clip(
        (sigma / before) ** 2, 1 / r_max, r_max)),
    mutant("r missing", r=lambda sigma, before, r_max: 1.0),
    mutant("d missing", d=lambda mean, running, before, d_max, sigma: 0.0),
    mutant("d: wrong sign", d=lambda mean, running, before, d_max, sigma: np.clip(
        (running - mean) / before, -d_max, d_max)),
    mutant("d in units of the batch's deviation", d=(
        lambda mean, running, before, d_max, sigma: np.clip(
            (mean - running) / sigma, -d_max, d_max))),
    mutant("d not divided", d=lambda mean, running, before, d_max, sigma: np.clip(
        mean - running, -d_max, d_max)),
    mutant("d not limited below", d=lambda mean, running, before, d_max, sigma: np.minimum(
        (mean - running) / before, d_max)),
    mutant("ε outside the roots of r and d", root=lambda var, eps: np.sqrt(var) + eps),
    mutant("ε forgotten in r and d", root=lambda var, eps: np.sqrt(var)),
    mutant("d times r", y=lambda x_hat, r, d, weight, bias: (x_hat + d) * r * weight + bias),
    mutant("d added after γ", y=lambda x_hat, r, d, weight, bias: x_hat * r * weight + d + bias),
    mutant("β scaled by r", y=lambda x_hat, r, d, weight, bias: (
        (x_hat * weight + bias) * r + d * weight)),
    mutant("gradient flows through r and d", detach=lambda v: v,
           r=lambda sigma, before, r_max: _clipped(sigma / before, 1 / r_max, r_max),
           d=lambda mean, running, before, d_max, sigma: _clipped(
               (mean - running) / before, -d_max, d_max),
           root=lambda var, eps: (var + eps) ** 0.5),
    mutant("correction by statistics that have moved already", first_move=True),
    mutant("running variance biased", new_var=lambda var, m, correction: var),
    mutant("momentum weights the old value", moved=lambda old, new, momentum: (
        momentum * old + (1 - momentum) * new)),
    mutant("running statistics never moved", moved=lambda old, new, momentum: old),
    mutant("correction in evaluation", evaluation=corrected_in_evaluation),
    mutant("limits swapped", given_limits(lambda r_max, d_max: (max(d_max, 1.0), r_max))),
    mutant("limits of the paper whatever is asked", given_limits(lambda r_max, d_max: (3.0, 5.0))),
]  # fmt: skip


def _clipped(value, low, high):
    """Return a Tensor clipped, through which gradient flows where it is not."""
    return clip(value, min=low, max=high)


# --- the layer -----------------------------------------------------------------------------------


def layer(fault, **methods):
    return Mutant(
        f"nn.BatchRenorm: {fault}", type("BatchRenorm", (nn.BatchRenorm,), methods), as_layer
    )


def opening(change):
    """Return a `_limits`: `change(seen, start, r_end, d_end, r_max, d_max)` gives them."""

    def _limits(self):
        if self.warmup is None:
            return self.r_max, self.d_max
        seen = int(self.num_batches_tracked.item())
        return change(seen, *self.warmup, self.r_max, self.d_max)

    return _limits


def share(seen, start, end):
    return float(seen >= end) if end == start else min(max((seen - start) / (end - start), 0), 1)


def by_the_moved_statistics(self, x, mask, finish):
    self._met = None
    out = nn.BatchRenorm._by_the_batch(self, x, mask, finish)
    self._met = None
    return out


@contextlib.contextmanager
def for_one_more(self):
    counter = self.num_batches_tracked
    with PerChannel.recomputing(self):
        yield
    counter[...] = counter + 1


def evaluated_by_the_batch(self, x, mask=None):
    if self.training:
        return nn.BatchRenorm.forward(self, x, mask)
    return F.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps, axis=self.axis)


LAYER = [
    layer("limits open from the first batch", _limits=lambda self: (self.r_max, self.d_max)),
    layer("limits never open", _limits=lambda self: (1.0, 0.0)),
    layer("limits open at once at their ends", _limits=opening(lambda seen, start, r, d, R, D: (
        R if seen >= r else 1.0, D if seen >= d else 0.0))),
    layer("r_max opens from 0", _limits=opening(lambda seen, start, r, d, R, D: (
        max(1.0, share(seen, start, r) * R), share(seen, start, d) * D))),
    layer("warm-up a batch late", _limits=opening(lambda seen, start, r, d, R, D: (
        1 + share(seen - 1, start, r) * (R - 1), share(seen - 1, start, d) * D))),
    layer("warm-up counted from 0, not from its start", _limits=opening(
        lambda seen, start, r, d, R, D: (
            1 + share(seen, 0, r) * (R - 1), share(seen, 0, d) * D))),
    layer("ends of r and d swapped", _limits=opening(lambda seen, start, r, d, R, D: (
        1 + share(seen, start, d) * (R - 1), share(seen, start, r) * D))),
    layer("limits open beyond their ends", _limits=opening(lambda seen, start, r, d, R, D: (
        1 + max(0.0, seen - start) / max(r - start, 1) * (R - 1), share(seen, start, d) * D))),
    layer("recomputing by the statistics that have moved", _by_the_batch=by_the_moved_statistics),
    layer("recomputing counts", recomputing=for_one_more),
    layer("recomputing moves the statistics", recomputing=lambda self: contextlib.nullcontext()),
    layer("evaluation by the batch", forward=evaluated_by_the_batch),
]  # fmt: skip

RENORM = [*FUNCTION, *LAYER]

RIGHT = (
    Mutant("F.batch_renorm", F.batch_renorm, as_batch_renorm),
    Mutant("the textbook Batch Renorm", textbook_renorm(), as_batch_renorm),
    Mutant("nn.BatchRenorm", nn.BatchRenorm, as_layer),
)
