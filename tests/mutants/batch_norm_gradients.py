"""Batch norms whose forward is right and whose backward is not.

dx = γ s (g - mean(g) - x̂ mean(g x̂)),  dγ = Σ g x̂,  dβ = Σ g,  s = 1 / √(v + ε)
"""

import numpy as np

from tests.mutants.mutant import batch_norm_mutant as mutant
from tests.mutants.textbook import BATCH, detached
from tinygrad_bn.ops.elementwise import sqrt
from tinygrad_bn.tape import TensorBase


def dx(inner, scale=lambda p: p.gamma * p.s):
    """Return the formula of dx with another bracket, or another factor in front of it."""
    return {"gx": lambda p: scale(p) * inner(p)}


def mean_term(p):
    return p.average(p.g)


def x_hat_term(p):
    return p.x_hat * p.average(p.g * p.x_hat)


def bracket(p):
    return p.g - mean_term(p) - x_hat_term(p)


def frozen(*names):
    """Return the formulas with some of the values as constants to the next derivative."""
    return {name: lambda p, name=name: detached(BATCH[name](p)) for name in names}


def narrowed(*names, dtype):
    """Return the formulas with some of the values rounded to a narrow dtype."""
    return {name: lambda p, name=name: BATCH[name](p).astype(dtype) for name in names}


# --- in place ----------------------------------------------------------------------------------


def scaling_the_cotangent(p):
    if not isinstance(p.cotangent, TensorBase) and p.cotangent.flags.writeable:
        p.cotangent[...] = p.cotangent * p.s
        return p.gamma * (p.cotangent - p.average(p.cotangent) - x_hat_term(p))
    return BATCH["gx"](p)


def into_the_cotangent(p):
    gx = BATCH["gx"](p)
    if not isinstance(p.cotangent, TensorBase) and p.cotangent.flags.writeable:
        p.cotangent[...] = gx
        return p.cotangent
    return gx


def into_x(p):
    gx = BATCH["gx"](p)
    if not isinstance(p.x, TensorBase) and p.x.flags.writeable:
        p.x[...] = p.x_hat  # a scratch array less
    return gx


_BUFFERS = {}


def into_a_kept_buffer(p):
    gx = BATCH["gx"](p)
    if isinstance(gx, TensorBase):
        return gx
    buffer = _BUFFERS.setdefault((gx.shape, p.x.dtype), np.empty(gx.shape, p.x.dtype))
    buffer[...] = gx
    return buffer


GRADIENTS = [
    mutant("dx: mean term missing", rule=dx(lambda p: p.g - x_hat_term(p))),
    mutant("dx: x̂ term missing", rule=dx(lambda p: p.g - mean_term(p))),
    mutant("dx: both terms missing (statistics constant)", rule=dx(lambda p: p.g)),
    mutant("dx: mean term added", rule=dx(lambda p: p.g + mean_term(p) - x_hat_term(p))),
    mutant("dx: x̂ term added", rule=dx(lambda p: p.g - mean_term(p) + x_hat_term(p))),
    mutant("dx: wrong sign", rule=dx(lambda p: -bracket(p))),
    mutant("dx: x̂ term twice", rule=dx(lambda p: bracket(p) - x_hat_term(p))),
    mutant("dx: x̂ term halved (∂v/∂x without its 2)", rule=dx(
        lambda p: p.g - mean_term(p) - 0.5 * x_hat_term(p))),
    mutant("dx: m - 1 for m in both terms", rule=dx(
        lambda p: p.g - (mean_term(p) + x_hat_term(p)) * (p.m / (p.m - 1)))),
    mutant("dx: m - 1 for m in the x̂ term", rule=dx(
        lambda p: p.g - mean_term(p) - x_hat_term(p) * (p.m / (p.m - 1)))),
    mutant("dx: sums not divided by m", rule=dx(
        lambda p: p.g - (mean_term(p) + x_hat_term(p)) * p.m)),
    mutant("dx: x̂ term from x - mean", rule=dx(
        lambda p: p.g - mean_term(p) - (p.x - p.mean) * p.average(p.g * p.x_hat))),
    mutant("dx: x̂ term from y", rule=dx(
        lambda p: p.g - mean_term(p) - p.x_hat * p.average(p.g * (p.x_hat * p.gamma + p.beta)))),
    mutant("dx: mean over the batch axis alone", rule=dx(
        lambda p: p.g - p.g.sum(axis=p.reduced[:1], keepdims=True) / p.x.shape[p.reduced[0]]
        - x_hat_term(p))),
    mutant("dx: γ forgotten", rule=dx(bracket, lambda p: p.s)),
    mutant("dx: γ squared", rule=dx(bracket, lambda p: p.gamma * p.gamma * p.s)),
    mutant("dx: |γ| for γ", rule=dx(bracket, lambda p: abs(p.gamma) * p.s)),
    mutant("dx: x̂ as (y - β) / γ, NaN where γ = 0", rule={
        "x_hat": lambda p: ((p.wide - p.mean) * p.s * p.gamma) / p.gamma}),
    mutant("dx: s forgotten", rule=dx(bracket, lambda p: p.gamma)),
    mutant("dx: s squared", rule=dx(bracket, lambda p: p.gamma * p.s * p.s)),
    mutant("dx: 1 / s for s", rule=dx(bracket, lambda p: p.gamma / p.s)),
    mutant("backward: ε forgotten", rule={"s": lambda p: 1 / sqrt(p.var)}),
    mutant("backward: ε doubled", rule={"s": lambda p: 1 / sqrt(p.var + 2 * p.eps)}),
    mutant("backward: ε outside the root", rule={"s": lambda p: 1 / (sqrt(p.var) + p.eps)}),
    mutant("backward: ε always 1e-5", rule={"s": lambda p: 1 / sqrt(p.var + 1e-5)}),
    mutant("backward: unbiased variance", rule={
        "var": lambda p: BATCH["var"](p) * (p.m / (p.m - 1))}),
    mutant("backward: mean frozen (second order)", rule=frozen("mean")),
    mutant("backward: s frozen (second order)", rule=frozen("s")),
    mutant("backward: mean and variance frozen (second order)", rule=frozen("mean", "var")),
    mutant("backward: x̂ frozen (second order)", rule=frozen("x_hat")),
    mutant("backward: γ frozen (second order)", rule={
        "gx": lambda p: detached(p.gamma) * p.s * bracket(p)}),
    mutant("backward: cotangent frozen (second order)", rule={
        "g": lambda p: detached(p.cotangent).astype("float64")}),
    mutant("backward: mean kept in float32", rule=narrowed("mean", dtype="float32")),
    mutant("backward: s kept in float16", rule=narrowed("s", dtype="float16")),
    mutant("backward: x̂ kept in float16", rule=narrowed("x_hat", dtype="float16")),
    mutant("dγ: from x", rule={"gweight": lambda p: p.per_channel(p.g * p.wide)}),
    mutant("dγ: from x - mean", rule={
        "gweight": lambda p: p.per_channel(p.g * (p.wide - p.mean))}),
    mutant("dγ: from y", rule={
        "gweight": lambda p: p.per_channel(p.g * (p.x_hat * p.gamma + p.beta))}),
    mutant("dγ: mean for sum", rule={"gweight": lambda p: p.per_channel(p.g * p.x_hat) / p.m}),
    mutant("dγ: missing", rule={"gweight": lambda p: None}),
    mutant("dγ: wrong sign", rule={"gweight": lambda p: -p.per_channel(p.g * p.x_hat)}),
    mutant("dγ: channels reversed", rule={
        "gweight": lambda p: p.per_channel(p.g * p.x_hat)[::-1]}),
    mutant("dβ: mean for sum", rule={"gbias": lambda p: p.per_channel(p.g) / p.m}),
    mutant("dβ: times γ", rule={"gbias": lambda p: p.per_channel(p.g * p.gamma)}),
    mutant("dβ: missing", rule={"gbias": lambda p: None}),
    mutant("the cotangent is scaled in place", rule={"gx": scaling_the_cotangent}),
    mutant("dx is written into the cotangent", rule={"gx": into_the_cotangent}),
    mutant("x serves as scratch in the backward", rule={"gx": into_x}),
    mutant("dx is handed out in a buffer that is kept", rule={"gx": into_a_kept_buffer}),
    mutant("evaluation: backward as in training", given_rule={"gx": BATCH["gx"]}),
    mutant("evaluation: γ forgotten in dx", given_rule={"gx": lambda p: p.s * p.g}),
    mutant("evaluation: dγ from x", given_rule={"gweight": lambda p: p.per_channel(p.g * p.wide)}),
    mutant("evaluation: ε forgotten in the backward", given_rule={
        "s": lambda p: 1 / sqrt(p.var)}),
    mutant("evaluation: no gradient to x", given_rule={"gx": lambda p: p.g * 0.0}),
]  # fmt: skip
