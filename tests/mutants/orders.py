"""Batch norms with right derivatives up to some order, and wrong ones from the third or the fourth.

That is how PyTorch's is wrong: values that depend on the inputs become constants on the way. The
kit's own checks end at the second order; these are found out by the laws below, which hold any
batch norm to the formula in complex numbers, along random directions.
"""

import math

import numpy as np
from hypothesis import strategies as st

from tests.mutants.mutant import Mutant
from tests.mutants.textbook import BATCH, GIVEN, detached, made, textbook
from tests.mutants.textbook_samples import SAMPLED, textbook_of_samples
from tests.mutants.verifiers import as_lawful
from tests.ops.test_batch_norm_orders import EPS, ORDERS, RADIUS, SHAPE, by_cauchy, by_grad, formula
from tinygrad_bn import functional as F
from tinygrad_bn.testing import GradCheckError


def points():
    """Return a strategy for generators of random numbers, all that is drawn being a seed."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def _require(batch_norm, rng, given=(), **options):
    """Raise GradCheckError unless the derivatives up to the fourth are those of the formula."""
    gamma = rng.standard_normal(3) * (rng.random(3) < 0.7)
    inputs = [rng.standard_normal(SHAPE) + 0.5, gamma, rng.standard_normal(3), *given]
    directions = [rng.standard_normal(a.shape) for a in inputs]
    g = rng.standard_normal(SHAPE)
    want = by_cauchy(lambda *a: formula(*a, **options), inputs, directions, g)
    if "frequency" in options:
        options["mask"] = options.pop("frequency")

    def candidate(x, weight, bias, *running):
        running = running or (None, None)
        return batch_norm(x, *running, weight, bias, not given, eps=EPS, **options)

    found = by_grad(candidate, inputs, directions, g)
    for k, a, b in zip(ORDERS, found, want, strict=True):
        # What the integral is good to, and sums of large terms that cancel.
        if not abs(a - b) < math.factorial(k) / RADIUS**k * 1e-12 + 1e-9 * abs(b):
            raise GradCheckError(f"the derivative of order {k} is {a:.9g}, expected {b:.9g}")


def training(batch_norm, rng):
    """Derivatives in training are right up to the fourth, with zeros in γ."""
    _require(batch_norm, rng)


def evaluation(batch_norm, rng):
    """And with fixed statistics, by which is differentiated too."""
    _require(batch_norm, rng, (rng.standard_normal(3), rng.uniform(0.5, 2, 3)))


def samples(batch_norm, rng):
    """And with frequencies and ghost batches."""
    often = rng.integers(0, 4, (6, 1, 4)).astype(float)
    often[:, :, :2] = 1  # enough to normalize by
    _require(batch_norm, rng, frequency=often, groups=2)


def constant_from(order, value):
    """Return the value, which derivatives from that order on take for a constant.

    In a rule, which is of the first order, a value that is detached is one for the second.
    """
    if order == 2:
        return detached(value)
    return made(lambda a: a.copy(), lambda g: (constant_from(order - 1, g),))(value)


def frozen(formulas, order, name):
    return {name: lambda p: constant_from(order, formulas[name](p))}


_TRAINING = as_lawful((training, evaluation), points)
_SAMPLES = as_lawful((samples,), points)

#: Order, and what is frozen. (From the fourth order on, what is linear in an input may be: the
#: derivatives that are lost are 0.)
_IN_TRAINING = (3, "mean"), (3, "var"), (3, "s"), (3, "x_hat"), (4, "var"), (4, "s"), (4, "x_hat")
_IN_EVALUATION = (3, "mean"), (3, "var"), (3, "s"), (4, "s")
_OF_SAMPLES = (3, "mean"), (3, "var"), (4, "var")
_WORDS = {"mean": "mean", "var": "variance", "s": "s", "x_hat": "x̂"}


def mutants(where, choices, verify, candidate):
    return [
        Mutant(f"{where}{_WORDS[name]} constant from order {order}", candidate(order, name), verify)
        for order, name in choices
    ]


ORDERED = [
    *mutants("", _IN_TRAINING, _TRAINING, lambda *a: textbook(rule=frozen(BATCH, *a))),
    *mutants(
        "evaluation: ",
        _IN_EVALUATION,
        _TRAINING,
        lambda *a: textbook(given_rule=frozen(GIVEN, *a)),
    ),
    *mutants(
        "frequencies and groups: ",
        _OF_SAMPLES,
        _SAMPLES,
        lambda *a: textbook_of_samples(rule=frozen(SAMPLED, *a)),
    ),
]

RIGHT = (
    Mutant("F.batch_norm up to the fourth order", F.batch_norm, _TRAINING),
    Mutant("F.batch_norm of samples up to the fourth order", F.batch_norm, _SAMPLES),
    Mutant("the textbook up to the fourth order", textbook(), _TRAINING),
    Mutant("the textbook of samples up to the fourth order", textbook_of_samples(), _SAMPLES),
)
