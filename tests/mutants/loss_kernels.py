"""Faults in the NumPy kernel of cross-entropy, served a few rows at a time."""

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.verifiers import as_op
from tinygrad_bn.kernels.cpu import numpy_cross_entropy as kernel
from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.op import REGISTRY

_SMALL = ((kernel, "SMALLEST", 1), (kernel, "PIECE", 4), (threads, "num_threads", lambda: 2))


def small_pieces():
    """Return the context in which the kernel, right as it is, serves logits of any size."""
    return replaced(*_SMALL)


def mutant(fault, attribute, change):
    """Return a mutant: `change` takes the right function and returns the wrong one."""
    planted = (*_SMALL, (kernel, attribute, change(getattr(kernel, attribute))))
    name = f"cross_entropy, kernel: {fault}"
    return Mutant(name, REGISTRY["cross_entropy"], as_op("cross_entropy"),
                  lambda: replaced(*planted))  # fmt: skip


def without_last_rows(for_rows):
    def call(work, logits):
        for_rows(lambda rows: work(rows) if rows.stop < len(logits) else None, logits)

    return call


def first_rows_for_all(for_rows):
    def call(work, logits):
        step = max(1, kernel.PIECE // logits.shape[1])
        for_rows(lambda rows: work(slice(0, step)), logits)

    return call


def summed(reduced):
    return lambda losses, reduction: reduced(losses, "sum" if reduction == "mean" else reduction)


def mean_of_all(reduced):
    return lambda losses, reduction: reduced(losses, "mean" if reduction == "sum" else reduction)


def reducing(right, wrong):
    """Return a change that takes one reduction for another in the backward."""

    def change(gradients):
        return lambda g, target, logs, reduction, needs: gradients(
            g, target, logs, wrong if reduction == right else reduction, needs
        )

    return change


def probabilities(gradients):
    return lambda g, target, logs, *rest: gradients(g, target, np.exp(logs), *rest)


def target_without_gradient(gradients):
    def call(*args):
        glogits, gtarget = gradients(*args)
        return glogits, None if gtarget is None else np.zeros_like(gtarget)

    return call


KERNEL = [
    mutant("last rows left out", "_for_rows", without_last_rows),
    mutant("first rows for all", "_for_rows", first_rows_for_all),
    mutant("sum for mean", "_reduced", summed),
    mutant("mean for sum", "_reduced", mean_of_all),
    mutant("gradient not averaged", "_gradients", reducing("mean", "sum")),
    mutant("gradient averaged though summed", "_gradients", reducing("sum", "mean")),
    mutant("probabilities for their logarithms", "_gradients", probabilities),
    mutant("target takes no gradient", "_gradients", target_without_gradient),
]  # fmt: skip

RIGHT = (
    Mutant("the kernel of cross_entropy in small pieces", REGISTRY["cross_entropy"],
           as_op("cross_entropy"), small_pieces),
)  # fmt: skip
