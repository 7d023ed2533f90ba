"""Batch norms that mistake masked values, frequencies or ghost batches."""

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.textbook import detached
from tests.mutants.textbook_samples import SAMPLED, textbook_of_samples
from tinygrad_bn.ops.elementwise import where


def mutant(name, **formulas):
    return Mutant(name, textbook_of_samples(**formulas))


def by_product(p):
    """Leave values out by multiplying with 0, which a NaN survives."""
    return lambda a: a if p.mask is None else a * p.counting.astype("float64")


def as_booleans(p):
    often = SAMPLED["frequency"](p)
    return (often > 0).astype("float64")


def first_of_all(p):
    """Take the first value of each group and channel for the shift, whether it counts or not."""
    index = tuple(slice(1) if i in p.reduced else slice(None) for i in range(p.x.ndim + 1))
    return detached(p.cut)[index]


def of_each_slot(p):
    return 1 / p.m


def at_least(number):
    return lambda p: p.counted.sum(axis=p.reduced, keepdims=True) >= number


def refusing(p):
    if p.mask is not None and not p.enough.all():
        raise ValueError("fewer than two values count")
    return p.counted & p.enough


def dealt_out(p):
    """Give each group every G-th sample."""

    def split(a):
        each = a.shape[0] // p.groups
        order = np.arange(a.shape[0]).reshape(each, p.groups).T.ravel()
        return a[order].reshape((p.groups, each, *a.shape[1:]))

    return split


def mask_dealt_out(p):
    """Cut x as it should be, and the mask into every G-th sample."""
    if p.mask is None or p.mask.shape[0] == 1:
        return SAMPLED["frequency"](p)
    each = p.x.shape[0] // p.groups
    order = np.arange(p.x.shape[0]).reshape(each, p.groups).T.ravel()
    rows = np.asarray(p.mask, "float64")[order]
    along_x = tuple(1 if i in p.channels else n for i, n in enumerate(p.split_shape))
    return np.broadcast_to(rows.reshape((p.groups, each, *rows.shape[1:])), along_x)


def whole_batch(p):
    """Take everything over all groups together."""
    return (0, *SAMPLED["reduced"](p))


def over_groups_too(p):
    return p.g_live.sum(axis=(0, *p.reduced), keepdims=True) / p.groups


def rows(p, name):
    return SAMPLED[name](p).reshape(p.groups, -1)


def of_the_whole_batch(p):
    """Return the corrected variance of all that counts, the distances of group means with it."""
    often = 1.0 if p.mask is None else p.often
    live = np.broadcast_to(often, p.wide.shape)
    others = (0, *p.reduced)
    total = live.sum(axis=others, keepdims=True)
    mean = (live * p.wide).sum(axis=others, keepdims=True) / total
    var = (live * (p.wide - mean) ** 2).sum(axis=others, keepdims=True) / (total - p.correction)
    return var.reshape(-1)


def corrected_by(count):
    """Return the corrected variances with another count of values."""
    return lambda p: (
        p.var.reshape(p.groups, -1) * (count(p) / (count(p) - p.correction)).reshape(-1, 1)
    )


def weighted_by_counts(p):
    return lambda v: (v * p.count[:, None]).sum(axis=0) / p.count.sum()


def one_after_the_other(p):
    return list(zip(rows(p, "mean")[p.moves], p.corrected[p.moves], strict=True))


def slots(p):
    return (
        np.broadcast_to(p.counting, (p.groups, *p.counting.shape[1:]))
        .sum(axis=p.reduced)
        .reshape(p.groups, -1)[:, 0]
    )


MASKS = [
    mutant("mask: ignored", both={"mask": None, "live": lambda p: lambda a: a,
        "share": of_each_slot, "count": lambda p: np.full((p.groups,), p.m)}),
    mutant("mask: frequencies taken for booleans", both={"frequency": lambda p: (
        None if p.mask is None else as_booleans(p))}),
    mutant("mask: frequencies taken for booleans in the backward", rule={
        "frequency": lambda p: None if p.mask is None else as_booleans(p)}),
    mutant("mask: frequencies in the mean, not in the variance", both={"var": lambda p: (
        p.average(p.live(p.wide - p.mean) ** 2) if p.mask is None
        else p.total(p.live(p.wide - p.mean) ** 2)
        / np.maximum(p.counting.sum(axis=p.reduced, keepdims=True) * p.wide.size
                     / p.counting.size / (p.wide.size / p.counting.size), 1.0))}),
    mutant("mask: masked slots counted", both={"share": lambda p: (
        1 / max(p.m, 1) if p.mask is None else p.often / p.m)}),
    mutant("mask: masked slots counted as zeros in the variance", both={"var": lambda p: (
        p.average((p.wide - p.mean) ** 2) if p.mask is None
        else p.total((p.wide - p.mean) ** 2) / p.m)}),
    mutant("mask: left out by a product, so that NaN leaks", both={"live": by_product}),
    mutant("mask: left out by a product in the backward", rule={"live": by_product}),
    mutant("mask: NaN leaks through the shift", both={"shift": first_of_all}),
    mutant("mask: NaN leaks into the second derivative", rule={"wide": lambda p: p.cut}),
    mutant("mask: masked slots are normalized too", forward={"x_hat": lambda p: (
        (p.wide - p.mean) * p.s)}),
    mutant("mask: masked slots give 0, not β", forward={"y": lambda p: p.live(
        p.x_hat * p.gamma + p.beta)}),
    mutant("mask: masked slots pass x through", forward={"y": lambda p: (
        p.x_hat * p.gamma + p.beta if p.mask is None
        else where(p.counting, p.x_hat * p.gamma + p.beta, p.cut))}),
    mutant("mask: masked slots take gradient", rule={"gx": lambda p: p.gamma * p.s * (
        p.g - p.share * (p.total(p.g_live) + p.x_hat * p.total(p.g_live * p.x_hat)))}),
    mutant("mask: cotangent of masked slots in the mean term", rule={"gx": lambda p: (
        p.gamma * p.s * (p.g_live - p.share * (
            p.total(p.g) + p.x_hat * p.total(p.g_live * p.x_hat))))}),
    mutant("mask: cotangent of masked slots missing in gβ", rule={"gbias": lambda p: (
        None if p.bias is None else p.per_channel(p.g_live))}),
    mutant("mask: 1/m for the share in the backward", rule={"gx": lambda p: p.live(
        p.gamma * p.s * (p.g_live - (
            p.total(p.g_live) + p.x_hat * p.total(p.g_live * p.x_hat)) / p.m))}),
    mutant("mask: the same share for every value in the backward", rule={"gx": lambda p: p.live(
        p.gamma * p.s * (p.g_live - (
            p.total(p.g_live) + p.x_hat * p.total(p.g_live * p.x_hat))
            / (p.m if p.mask is None else np.maximum(
                p.counting.sum(axis=p.reduced, keepdims=True), 1))))}),
    mutant("mask: gradient times the frequency", rule={"gx": lambda p: SAMPLED["gx"](p) * (
        1.0 if p.mask is None else p.often)}),
    mutant("mask: averages of the cotangent weighted by frequency", rule={"gx": lambda p: (
        p.gamma * p.s * (p.g_live - p.live(
            p.average(p.g_live) + p.x_hat * p.average(p.g_live * p.x_hat))))}),
    mutant("mask: gγ weighted by frequency", rule={"gweight": lambda p: (
        None if p.weight is None
        else p.per_channel(p.g * p.x_hat * (1.0 if p.mask is None else p.often)))}),
    mutant("mask: statistics frozen (second order)", rule={
        "mean": lambda p: detached(SAMPLED["mean"](p)),
        "var": lambda p: detached(SAMPLED["var"](p))}),
    mutant("mask: a single value moves the statistics", both={"enough": at_least(1)}),
    mutant("mask: three values are needed", both={"enough": at_least(3)}),
    mutant("mask: an error where too few values count", both={"counting": refusing}),
    mutant("mask: without enough values the statistics decay", state={
        "averaged": lambda p: lambda v: v[p.moves].sum(axis=0) / max(p.moves.sum(), 1),
        "updates": lambda p: p.training and p.running_mean is not None and p.x.size > 0}),
    mutant("mask: running variance corrected by the number of slots", state={
        "corrected": corrected_by(lambda p: np.full((p.groups,), float(p.m)))}),
    mutant("mask: running variance corrected by the number of counting slots", state={
        "corrected": lambda p: SAMPLED["corrected"](p) if p.mask is None else (
            p.var.reshape(p.groups, -1) * np.where(
                slots(p) > p.correction, slots(p) / np.maximum(slots(p) - p.correction, 0.5), 1.0
            )[:, None])}),
    mutant("mask: running statistics of all slots", state={
        "mean": lambda p: np.nan_to_num(p.cut).mean(axis=p.reduced, keepdims=True)}),
]  # fmt: skip

GROUPS = [
    mutant("groups: ignored", both={"reduced": whole_batch, "m": lambda p: p.cut.size // max(
        1, int(np.prod([p.split_shape[i] for i in p.channels])))},
        state={"steps": lambda p: [(rows(p, "mean")[0], rows(p, "var")[0])]}),
    mutant("groups: samples dealt out in turn", both={"split": dealt_out}),
    mutant("groups: mask dealt out in turn", both={"frequency": mask_dealt_out}),
    mutant("groups: samples dealt out in turn in the backward", rule={"split": dealt_out}),
    mutant("groups: mean term over all groups", rule={"gx": lambda p: p.gamma * p.s * (
        p.g_live - p.share * (over_groups_too(p) + p.x_hat * p.total(p.g_live * p.x_hat)))}),
    mutant("groups: statistics of the last group in the backward", rule={
        "mean": lambda p: SAMPLED["mean"](p)[-1:], "var": lambda p: SAMPLED["var"](p)[-1:]}),
    mutant("groups: gγ of the first group alone", rule={"gweight": lambda p: (
        None if p.weight is None else p.per_channel((p.g * p.x_hat)[:1]))}),
    mutant("groups: gγ averaged over groups", rule={"gweight": lambda p: (
        None if p.weight is None else p.per_channel(p.g * p.x_hat) / p.groups)}),
    mutant("groups: gβ averaged over groups", rule={"gbias": lambda p: (
        None if p.bias is None else p.per_channel(p.g) / p.groups)}),
    mutant("groups: one running update for each group", state={"steps": one_after_the_other}),
    mutant("groups: running statistics of the first group", state={
        "averaged": lambda p: lambda v: v[p.moves][0]}),
    mutant("groups: running statistics of the last group", state={
        "averaged": lambda p: lambda v: v[p.moves][-1]}),
    mutant("groups: running statistics summed over groups", state={
        "averaged": lambda p: lambda v: v[p.moves].sum(axis=0)}),
    mutant("groups: running variance of the whole batch", state={"new_var": of_the_whole_batch}),
    mutant("groups: running variance corrected by the whole batch's m", state={
        "corrected": corrected_by(lambda p: np.full((p.groups,), float(p.m * p.groups)))}),
    mutant("groups: deviations averaged, not variances", state={
        "new_var": lambda p: p.averaged(np.sqrt(p.corrected)) ** 2}),
    mutant("groups: a group without enough values averaged as 0", state={
        "averaged": lambda p: lambda v: v[p.moves].sum(axis=0) / p.groups}),
    mutant("groups: averages weighted by how much counts", state={
        "averaged": weighted_by_counts}),
    mutant("groups: one group without enough values stops the update", state={
        "updates": lambda p: SAMPLED["updates"](p) and p.moves.all()}),
    mutant("groups: running variance uncorrected", state={
        "corrected": lambda p: p.var.reshape(p.groups, -1)}),
]  # fmt: skip

SAMPLES = [*MASKS, *GROUPS]
