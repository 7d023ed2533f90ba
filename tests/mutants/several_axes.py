"""Batch norms that are right for one channel axis and wrong for two.

γ, β and the running statistics then have an axis for each, in the order of x's, whatever the order
in which the axes are named.
"""

import math

import numpy as np

from tests.mutants.mutant import batch_norm_mutant, wrapped
from tests.mutants.textbook import BATCH, GIVEN, STATE, raw, textbook, write


def mutant(fault, candidate=None, **formulas):
    return batch_norm_mutant(f"two axes: {fault}", candidate, **formulas)


def swapped(vectors):
    """Return values for two axes in the order of the other one first, in the same shape."""
    if getattr(vectors, "ndim", 0) < 2:
        return vectors
    return vectors.transpose((1, 0)).reshape(vectors.shape)


def with_swapped(name, formulas):
    """Return the formula of `name`, of which the weight (bias, statistic) comes swapped."""

    def formula(p):
        kept = getattr(p, name)
        setattr(p, name, swapped(kept) if kept is not None else None)
        try:
            return formulas(p)
        finally:
            setattr(p, name, kept)

    return formula


def result_swapped(formula):
    return lambda p: swapped(formula(p))


def spread(formula, axis):
    """Sum what a formula gives over one of the two axes, and give the mean to all of it."""

    def formula_of(p):
        found = formula(p)
        if getattr(found, "ndim", 0) < 2:
            return found
        return found * 0 + found.mean(axis=axis, keepdims=True)

    return formula_of


def over_one_more(which):
    """Return formulas that take mean and variance over one of the two channel axes too."""

    def over(p):
        return (*p.reduced, p.axis[which]) if len(p.axis) > 1 else p.reduced

    def averaged(p, values):
        m = max(1, math.prod(p.x.shape[i] for i in over(p)))
        # As large as the right ones are.
        return values.sum(axis=over(p), keepdims=True) / m + 0 * p.total(values)

    return {
        "mean": lambda p: p.shift + averaged(p, p.wide - p.shift),
        "var": lambda p: averaged(p, (p.wide - p.mean) ** 2),
    }


def each_sample_by_itself(p):
    """Keep axis 0 where there are two others, and more values to take statistics of."""
    several = len(p.axis) > 1 and p.x.ndim > 3
    return tuple(i for i in range(several, p.x.ndim) if i not in p.axis)


def into_a_copy(running, value):
    """Write into what is laid out anew if it has two axes."""
    write(raw(running).reshape(-1).copy() if np.ndim(value) > 1 else running, (
        np.reshape(value, -1) if np.ndim(value) > 1 else value))  # fmt: skip


@wrapped(textbook())
def in_the_order_named(batch_norm, x, *args, axis=1, **options):
    """Take γ, β and statistics to have their axes in the order in which these are named."""
    vectors, rest = list(args[:4]), args[4:]
    if isinstance(axis, tuple) and axis[0] % x.ndim > axis[-1] % x.ndim:
        vectors[2:4] = [v if v is None else swapped(v) for v in vectors[2:4]]
    return batch_norm(x, *vectors, *rest, axis=axis, **options)


@wrapped(textbook())
def the_first_alone(batch_norm, x, *args, axis=1, **options):
    """Normalize along the first axis named, with the vectors of the second one's first channel."""
    if not isinstance(axis, tuple):
        return batch_norm(x, *args, axis=axis, **options)
    first = sorted(a % x.ndim for a in axis)[0]
    vectors = [v if v is None else v[:, 0] for v in args[2:4]]
    return batch_norm(x, None, None, *vectors, *args[4:], axis=first, **options)


@wrapped(textbook())
def evaluating_by_the_batch(batch_norm, x, mean, var, weight, bias, training, *args, **options):
    if isinstance(options.get("axis"), tuple) and not training:
        mean = var = None
    return batch_norm(x, mean, var, weight, bias, training, *args, **options)


SEVERAL_AXES = [
    mutant("γ transposed", both={"gamma": with_swapped("weight", BATCH["gamma"])}),
    mutant("β transposed", both={"beta": with_swapped("bias", BATCH["beta"])}),
    mutant("γ transposed in dx", rule={"gamma": with_swapped("weight", BATCH["gamma"])}),
    mutant("γ's gradient transposed", rule={"gweight": result_swapped(BATCH["gweight"])}),
    mutant("β's gradient transposed", rule={"gbias": result_swapped(BATCH["gbias"])}),
    mutant("γ of the first channels of the second axis for all", both={
        "gamma": lambda p: BATCH["gamma"](p) if getattr(p.weight, "ndim", 0) < 2 else (
            p.along(p.weight * 0 + p.weight[:, :1]))}),
    mutant("β averaged over the first axis", both={
        "beta": lambda p: BATCH["beta"](p) if getattr(p.bias, "ndim", 0) < 2 else (
            p.along(p.bias * 0 + p.bias.mean(axis=0, keepdims=True)))}),
    mutant("γ's gradient averaged over the first axis", rule={
        "gweight": spread(BATCH["gweight"], 0)}),
    mutant("γ's gradient averaged over the second axis", rule={
        "gweight": spread(BATCH["gweight"], 1)}),
    mutant("β's gradient averaged over the second axis", rule={
        "gbias": spread(BATCH["gbias"], 1)}),
    mutant("statistics over the first axis too", forward=over_one_more(0), rule=over_one_more(0)),
    mutant("statistics over the second axis too", forward=over_one_more(1), rule=over_one_more(1)),
    mutant("statistics of each sample", both={"total": lambda p: lambda a: (
        a.sum(axis=each_sample_by_itself(p), keepdims=True) * (
            p.x.shape[0] if each_sample_by_itself(p) != p.reduced else 1) + (
                a.sum(axis=p.reduced, keepdims=True) * 0))}, rule={"per_channel": (
                    lambda p: lambda a: a.sum(axis=p.reduced))}),
    mutant("running mean transposed", state={"new_mean": result_swapped(STATE["new_mean"])}),
    mutant("running variance transposed", state={"new_var": result_swapped(STATE["new_var"])}),
    mutant("correction by the count of one axis", state={
        "new_var": lambda p: p.var * (p.m * p.x.shape[p.axis[-1]] / (
            p.m * p.x.shape[p.axis[-1]] - p.correction)) if len(p.axis) > 1 else (
                STATE["new_var"](p))}),
    mutant("running statistics written into a copy", state={"write": lambda p: into_a_copy}),
    mutant("evaluation: running mean transposed", given={
        "mean": with_swapped("given_mean", GIVEN["mean"])}),
    mutant("evaluation: running variance transposed", given={
        "var": with_swapped("given_var", GIVEN["var"])}),
    mutant("evaluation: γ transposed", given={"gamma": with_swapped("weight", GIVEN["gamma"])}),
    mutant("evaluation: by the batch", evaluating_by_the_batch),
    mutant("vectors in the order in which the axes are named", in_the_order_named),
    mutant("the first axis alone", the_first_alone),
]  # fmt: skip
