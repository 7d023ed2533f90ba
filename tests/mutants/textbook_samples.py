"""The textbook batch norm with masks and ghost batches: a sheet of formulas more.

Axis 0 is cut into (groups, samples), so the formulas see x with an axis more and one mean for each
group and channel; a mask makes shares of unequal size out of 1/m.
"""

import math

import numpy as np

from tests.mutants.textbook import GIVEN, Sheet, given_op, made, raw, write
from tinygrad_bn.ops.elementwise import sqrt, where

# --- the formulas ------------------------------------------------------------------------------


def frequency(p):
    """Return how often each value counts, cut as x is, in float64; None without a mask."""
    if p.mask is None:
        return None
    often = np.asarray(p.mask, "float64")
    if often.shape[0] == 1:
        often = np.repeat(often, p.x.shape[0], axis=0)
    often = p.split(often)
    along_x = tuple(1 if i in p.channels else n for i, n in enumerate(p.split_shape))
    return np.broadcast_to(often, along_x)


def first_that_counts(p):
    """Return a value of each group and channel: what is averaged are distances from it."""
    x = np.where(p.counting, raw(p.cut), -np.inf) if p.mask is not None else raw(p.cut)
    largest = x.max(axis=p.reduced, keepdims=True)
    return np.where(np.isfinite(largest), largest, 0.0)


SAMPLED = {
    "split_shape": lambda p: (p.groups, p.x.shape[0] // p.groups, *p.x.shape[1:]),
    "split": lambda p: lambda a: a.reshape((p.groups, a.shape[0] // p.groups, *a.shape[1:])),
    "channels": lambda p: tuple(a + 1 for a in p.axis),
    "reduced": lambda p: tuple(i for i in range(1, p.x.ndim + 1) if i not in p.channels),
    "along": lambda p: (
        lambda v: v.reshape(tuple(n if i in p.channels else 1 for i, n in enumerate(p.split_shape)))
    ),
    # What counts, and how much.
    "frequency": frequency,
    "m": lambda p: math.prod(p.split_shape[i] for i in p.reduced),
    "counted": lambda p: p.frequency > 0,
    "enough": lambda p: p.counted.sum(axis=p.reduced, keepdims=True) >= 2,
    "counting": lambda p: p.counted & p.enough,
    "often": lambda p: np.where(p.counting, p.frequency, 0.0),
    "count": lambda p: (
        np.full((p.groups,), p.m)
        if p.mask is None
        else p.often.sum(axis=p.reduced).reshape(p.groups, -1)[:, 0]
    ),
    "share": lambda p: (
        1 / max(p.m, 1)
        if p.mask is None
        else p.often / np.maximum(p.often.sum(axis=p.reduced, keepdims=True), 1e-300)
    ),
    "live": lambda p: lambda a: a if p.mask is None else where(p.counting, a, 0.0),
    "average": lambda p: lambda a: (a * p.share).sum(axis=p.reduced, keepdims=True),
    "total": lambda p: lambda a: a.sum(axis=p.reduced, keepdims=True),
    "per_channel": lambda p: (
        lambda a: a.sum(axis=tuple(i for i in range(p.x.ndim + 1) if i not in p.channels))
    ),
    # The formula.
    "cut": lambda p: p.split(p.x.astype("float64")),
    "wide": lambda p: p.live(p.cut),
    "shift": first_that_counts,
    "mean": lambda p: p.shift + p.average(p.live(p.wide - p.shift)),
    "var": lambda p: p.average(p.live(p.wide - p.mean) ** 2),
    "gamma": lambda p: 1.0 if p.weight is None else p.along(p.weight),
    "beta": lambda p: 0.0 if p.bias is None else p.along(p.bias),
    "s": lambda p: 1 / sqrt(p.var + p.eps),
    "x_hat": lambda p: p.live((p.wide - p.mean) * p.s),
    "y": lambda p: p.x_hat * p.gamma + p.beta,
    # Its gradient.
    "g": lambda p: p.split(p.cotangent.astype("float64")),
    "g_live": lambda p: p.live(p.g),
    "gx": lambda p: (
        p.gamma
        * p.s
        * (p.g_live - p.share * (p.total(p.g_live) + p.x_hat * p.total(p.g_live * p.x_hat)))
    ),
    "gweight": lambda p: None if p.weight is None else p.per_channel(p.g * p.x_hat),
    "gbias": lambda p: None if p.bias is None else p.per_channel(p.g),
    # The running statistics: one step, to the average over the groups that have enough values.
    "by_the_batch": lambda p: p.training or p.running_mean is None,
    "moves": lambda p: p.count > 0,
    "averaged": lambda p: lambda rows: rows[p.moves].mean(axis=0),
    "corrected": lambda p: (
        p.var.reshape(p.groups, -1)
        * np.where(
            p.count > p.correction, p.count / np.maximum(p.count - p.correction, 1e-300), 1.0
        )[:, None]
    ),
    "new_mean": lambda p: p.averaged(p.mean.reshape(p.groups, -1)),
    "new_var": lambda p: p.averaged(p.corrected),
    "updates": lambda p: (
        p.training and p.running_mean is not None and p.x.size > 0 and p.moves.any()
    ),
    "steps": lambda p: [(p.new_mean, p.new_var)],
}


# --- the batch norm ----------------------------------------------------------------------------


def textbook_of_samples(*, forward=(), rule=(), state=(), both=()):
    """Return a batch norm with all of `F.batch_norm`'s arguments and some formulas replaced.

    forward, rule: of training; both: of the two. state: of the running statistics.
    """
    formulas = SAMPLED | dict(both) | dict(forward)
    by_batch = _op(formulas, SAMPLED | dict(both) | dict(rule))
    state = formulas | dict(state)
    by_given = given_op(GIVEN, GIVEN)

    def batch_norm(
        x,
        running_mean=None,
        running_var=None,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
        *,
        axis=1,
        mask=None,
        groups=1,
        correction=1,
    ):
        axes = tuple(sorted(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))))
        options = {"axis": axes, "eps": eps, "mask": raw(mask), "groups": groups}
        call = Sheet(
            state,
            x=raw(x),
            running_mean=running_mean,
            training=training,
            correction=correction,
            **options,
        )
        if not call.by_the_batch:
            return by_given(x, running_mean, running_var, weight, bias, axis=axes, eps=eps)
        if mask is None and call.x.size and call.m == 1:
            raise ValueError("one value per channel has no variance")
        if call.updates:
            # Worked out before x can change.
            steps = [tuple(v.reshape(raw(running_mean).shape) for v in s) for s in call.steps]
        y = by_batch(x, weight, bias, **options)
        if call.updates:
            for mean, var in steps:
                for running, new in ((running_mean, mean), (running_var, var)):
                    write(running, (1 - momentum) * raw(running) + momentum * new)
        return y

    return batch_norm


def _op(formulas, rule_formulas):
    def batch_norm(x, weight=None, bias=None, *, axis, eps, mask, groups):
        given = {"axis": axis, "eps": eps, "mask": mask, "groups": groups}
        if not x.size:
            return x.copy()
        y = Sheet(formulas, x=x, weight=weight, bias=bias, **given).y
        return y.reshape(x.shape).astype(x.dtype)

    def rule(g, x, weight, bias, axis, eps, mask, groups):
        given = {"axis": axis, "eps": eps, "mask": mask, "groups": groups}
        if not x.size:
            return (g, *(None if v is None else v * 0.0 for v in (weight, bias)))
        p = Sheet(rule_formulas, cotangent=g, x=x, weight=weight, bias=bias, **given)
        return p.gx.reshape(x.shape), p.gweight, p.gbias

    return made(batch_norm, rule)
