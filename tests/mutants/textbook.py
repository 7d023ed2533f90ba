"""A batch norm as a textbook has it, written as sheets of named formulas: a mutant changes one.

It shares nothing with the library's batch norm but the tape, so that a fault planted here is seen
by the kit as a stranger's would be.
"""

import math

from tinygrad_bn.op import Op
from tinygrad_bn.ops.elementwise import sqrt
from tinygrad_bn.tape import TensorBase


class Sheet:
    """Values by name; what was not given is worked out by its formula when it is first asked for.

    A formula takes the sheet and asks it for the values that it needs.
    """

    def __init__(self, formulas, **given):
        self._formulas = formulas
        vars(self).update(given)

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._formulas:
            raise AttributeError(name)
        value = self._formulas[name](self)
        setattr(self, name, value)
        return value


def detached(value):
    """Return a value as a constant, which is how a rule on Tensors freezes it."""
    return value.detach() if isinstance(value, TensorBase) else value


def raw(value):
    return value.data if isinstance(value, TensorBase) else value


def write(running, value):
    """Write into running statistics, an array or a Tensor."""
    raw(running)[...] = value
    if isinstance(running, TensorBase):
        running.note_write()


def first_of_each_channel(p):
    index = tuple(slice(1) if i in p.reduced else slice(None) for i in range(p.x.ndim))
    return detached(p.wide)[index]


# --- the formulas ------------------------------------------------------------------------------

_BOTH = {
    "reduced": lambda p: tuple(i for i in range(p.x.ndim) if i not in p.axis),
    # At least 1, so that nothing is divided by the 0 values of an empty batch.
    "m": lambda p: max(1, math.prod(p.x.shape[i] for i in p.reduced)),
    "along": lambda p: (
        lambda v: v.reshape(tuple(n if i in p.axis else 1 for i, n in enumerate(p.x.shape)))
    ),
    "total": lambda p: lambda a: a.sum(axis=p.reduced, keepdims=True),
    "average": lambda p: lambda a: p.total(a) / p.m,
    "per_channel": lambda p: lambda a: p.total(a).reshape(tuple(p.x.shape[i] for i in p.axis)),
    "wide": lambda p: p.x.astype("float64"),
    "gamma": lambda p: 1.0 if p.weight is None else p.along(p.weight),
    "beta": lambda p: 0.0 if p.bias is None else p.along(p.bias),
    "s": lambda p: 1 / sqrt(p.var + p.eps),
    "x_hat": lambda p: (p.wide - p.mean) * p.s,
    "y": lambda p: (p.x_hat * p.gamma + p.beta).astype(p.x.dtype),
    "g": lambda p: p.cotangent.astype("float64"),
    "gweight": lambda p: None if p.weight is None else p.per_channel(p.g * p.x_hat),
    "gbias": lambda p: None if p.bias is None else p.per_channel(p.g),
}

#: Normalized by the batch: forward, and the rule, which works out the statistics again.
BATCH = {
    **_BOTH,
    # Relative to a value of the channel: a mean far from 0 then costs no digits.
    "shift": first_of_each_channel,
    "mean": lambda p: p.shift + p.average(p.wide - p.shift),
    "var": lambda p: p.average((p.wide - p.mean) ** 2),
    "gx": lambda p: p.gamma * p.s * (p.g - p.average(p.g) - p.x_hat * p.average(p.g * p.x_hat)),
}

#: Normalized by running statistics, `given_mean` and `given_var`.
GIVEN = {
    **_BOTH,
    "mean": lambda p: p.along(p.given_mean.astype("float64")),
    "var": lambda p: p.along(p.given_var.astype("float64")),
    "gx": lambda p: p.gamma * p.s * p.g,
    "gmean": lambda p: p.per_channel(-p.gx),
    "gvar": lambda p: p.per_channel(p.gamma * p.g * (p.wide - p.mean) * p.s**3) * -0.5,
}

#: What becomes of the running statistics.
STATE = {
    "by_the_batch": lambda p: p.training or p.running_mean is None,
    "updates": lambda p: p.training and p.running_mean is not None and p.x.size > 0,
    "steps": lambda p: 1,
    "new_mean": lambda p: p.mean,
    "new_var": lambda p: p.var * (p.m / (p.m - p.correction)),
    "moved": lambda p: lambda old, new: (1 - p.momentum) * old + p.momentum * new,
    "write": lambda p: write,
}


# --- the batch norm ----------------------------------------------------------------------------


def textbook(*, forward=(), rule=(), given=(), given_rule=(), state=(), both=()):
    """Return a batch norm with `F.batch_norm`'s signature and some of its formulas replaced.

    It has neither masks nor ghost batches, so these are not asked of it.

    forward, rule: of training. given, given_rule: of evaluation. both: of all four.
    """
    batch_formulas = BATCH | dict(both) | dict(forward)
    by_batch = _batch_op(batch_formulas, BATCH | dict(both) | dict(rule))
    by_given = given_op(GIVEN | dict(both) | dict(given), GIVEN | dict(both) | dict(given_rule))
    state = STATE | dict(state)

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
        correction=1,
    ):
        axes = tuple(sorted(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))))
        call = Sheet(
            batch_formulas | state,
            x=raw(x),
            axis=axes,
            running_mean=running_mean,
            running_var=running_var,
            training=training,
            momentum=momentum,
            correction=correction,
        )
        if call.by_the_batch and call.x.size and call.m == 1:
            raise ValueError("one value per channel has no variance")
        if call.updates:
            channels = raw(running_mean).shape
            call.mean, call.var = call.mean.reshape(channels), call.var.reshape(channels)
        if call.by_the_batch:
            y = by_batch(x, weight, bias, axis=axes, eps=eps)
        else:
            y = by_given(x, running_mean, running_var, weight, bias, axis=axes, eps=eps)
        if call.updates:
            for _ in range(call.steps):
                call.write(running_mean, call.moved(raw(running_mean), call.new_mean))
                call.write(running_var, call.moved(raw(running_var), call.new_var))
        return y

    return batch_norm


def _batch_op(formulas, rule_formulas):
    def batch_norm(x, weight=None, bias=None, *, axis, eps):
        return Sheet(formulas, x=x, weight=weight, bias=bias, axis=axis, eps=eps).y

    def rule(g, x, weight, bias, axis, eps):
        p = Sheet(rule_formulas, cotangent=g, x=x, weight=weight, bias=bias, axis=axis, eps=eps)
        return p.gx, p.gweight, p.gbias

    return made(batch_norm, rule)


def given_op(formulas, rule_formulas):
    def batch_norm(x, given_mean, given_var, weight=None, bias=None, *, axis, eps):
        statistics = {"given_mean": given_mean, "given_var": given_var}
        return Sheet(formulas, x=x, weight=weight, bias=bias, axis=axis, eps=eps, **statistics).y

    def rule(g, x, given_mean, given_var, weight, bias, axis, eps):
        p = Sheet(
            rule_formulas,
            cotangent=g,
            x=x,
            given_mean=given_mean,
            given_var=given_var,
            weight=weight,
            bias=bias,
            axis=axis,
            eps=eps,
        )
        return p.gx, p.gmean, p.gvar, p.gweight, p.gbias

    return made(batch_norm, rule)


def made(forward, rule=None, *, domain=None, **rules):
    """Return an op that is not registered: other tests walk the registry."""
    op = Op(forward, forward.__name__, domain)
    op.def_vjp(rule, **rules)
    return op
