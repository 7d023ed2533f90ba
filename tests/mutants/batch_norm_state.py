"""Batch norms that confuse training with evaluation or mistreat their running statistics.

Right is, in training only and in place: r ← (1 - momentum) r + momentum · statistic, with the
variance times m / (m - correction).
"""

from tests.mutants.mutant import batch_norm_mutant as mutant
from tests.mutants.textbook import raw, write
from tinygrad_bn.tape import TensorBase


def corrected(p, times=1):
    return p.var * (p.m / (p.m - p.correction)) ** times


def replacing(running, value):
    """A Tensor gets new memory, which nobody who shares the old one will see."""
    if isinstance(running, TensorBase):
        running.data = value.astype(running.dtype)
        running.note_write()


def silently(running, value):
    raw(running)[...] = value  # and no word to the version counter


def through_float16(running, value):
    write(running, value.astype("float16"))


def each_by_itself(momentum):
    """Return a formula that moves statistics with another weight for the new value."""
    return {"moved": lambda p: lambda old, new: (1 - momentum(p)) * old + momentum(p) * new}


STATES = [
    mutant("running: momentum weights the old value", state=each_by_itself(
        lambda p: 1 - p.momentum)),
    mutant("running: momentum always 0.1", state=each_by_itself(lambda p: 0.1)),
    mutant("running: overwritten by the batch's", state=each_by_itself(lambda p: 1.0)),
    mutant("running: new value added, old one not reduced", state={
        "moved": lambda p: lambda old, new: old + p.momentum * new}),
    mutant("running: wrong sign of the step", state={
        "moved": lambda p: lambda old, new: old - p.momentum * (new - old)}),
    mutant("running variance: uncorrected", state={"new_var": lambda p: p.var}),
    mutant("running variance: corrected twice", state={"new_var": lambda p: corrected(p, 2)}),
    mutant("running variance: correction inverted", state={"new_var": lambda p: corrected(p, -1)}),
    mutant("running variance: always unbiased, whatever is asked", state={
        "new_var": lambda p: p.var * (p.m / (p.m - 1))}),
    mutant("running variance: m of the batch axis alone", state={
        "new_var": lambda p: p.var * (p.x.shape[0] / max(p.x.shape[0] - p.correction, 0.5))}),
    mutant("running variance: a deviation", state={"new_var": lambda p: corrected(p) ** 0.5}),
    mutant("running variance: with ε", state={"new_var": lambda p: corrected(p) + 1e-5}),
    mutant("running variance: old value corrected too", state={
        "moved": lambda p: lambda old, new: (
            (1 - p.momentum) * old + p.momentum * new
            if new is p.new_mean
            else ((1 - p.momentum) * old + p.momentum * p.var) * (p.m / (p.m - p.correction)))}),
    mutant("running mean: of another channel", state={"new_mean": lambda p: p.mean[::-1]}),
    mutant("running mean: never moved", state={"new_mean": lambda p: raw(p.running_mean)}),
    mutant("running variance: never moved", state={"new_var": lambda p: raw(p.running_var)}),
    mutant("running: mean and variance swapped", state={
        "new_mean": lambda p: corrected(p), "new_var": lambda p: p.mean}),
    mutant("running: updated in evaluation too", state={
        "updates": lambda p: p.running_mean is not None}),
    mutant("running: updated in evaluation alone", state={
        "updates": lambda p: not p.training and p.running_mean is not None}),
    mutant("running: never updated", state={"updates": lambda p: False}),
    mutant("running: updated twice a step", state={"steps": lambda p: 2}),
    mutant("running: replaced, not written in place", state={"write": lambda p: replacing}),
    mutant("running: rounded to float16", state={"write": lambda p: through_float16}),
    mutant("running: written behind the version counter's back", state={
        "write": lambda p: silently}),
    mutant("evaluation uses the statistics of the batch", state={
        "by_the_batch": lambda p: True}),
    mutant("training uses the running statistics", state={
        "by_the_batch": lambda p: p.running_mean is None}),
    mutant("training and evaluation swapped", state={
        "by_the_batch": lambda p: not p.training or p.running_mean is None}),
    mutant("evaluation: mean not subtracted", given={"x_hat": lambda p: p.wide * p.s}),
]  # fmt: skip
