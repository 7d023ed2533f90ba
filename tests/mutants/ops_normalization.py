"""Layer and RMS norm, batch norm with ReLU and residual, or given statistics, with a fault.

Each is a sheet of formulas, as in `textbook`, and stands against the library's op of its name.
"""

import math

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.textbook import BATCH, GIVEN, Sheet, detached, given_op, made, raw
from tests.mutants.verifiers import as_op
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.ops.elementwise import maximum, sqrt, where


def as_mutant(name, fault, wrong):
    """Return a mutant of the library's op `name`: `wrong`, an op that is not registered."""
    wrong.name, wrong.domain = name, REGISTRY[name].domain
    return Mutant(f"{name}: {fault}" if fault else name, wrong, as_op(name))


# --- layer norm and RMS norm ---------------------------------------------------------------------

#: γ goes with `channels`, the mean with `axis`; h = γ g.
LAYER = {
    "reduced": lambda p: tuple(i for i in range(p.x.ndim) if i not in p.axis),
    "m": lambda p: max(1, math.prod(p.x.shape[i] for i in p.reduced)),
    "along": lambda p: (
        lambda v: v.reshape(tuple(n if i in p.channels else 1 for i, n in enumerate(p.x.shape)))
    ),
    "average": lambda p: lambda a: a.sum(axis=p.reduced, keepdims=True) / p.m,
    "per_channel": lambda p: (
        lambda a: a.sum(axis=tuple(i for i in range(p.x.ndim) if i not in p.channels))
    ),
    "wide": lambda p: p.x.astype("float64"),
    "gamma": lambda p: 1.0 if p.weight is None else p.along(p.weight),
    "beta": lambda p: 0.0 if p.bias is None else p.along(p.bias),
    "mean": lambda p: p.average(p.wide),
    "var": lambda p: p.average((p.wide - p.mean) ** 2),
    "s": lambda p: 1 / sqrt(p.var + p.eps),
    "x_hat": lambda p: (p.wide - p.mean) * p.s,
    "y": lambda p: (p.x_hat * p.gamma + p.beta).astype(p.x.dtype),
    "g": lambda p: p.cotangent.astype("float64"),
    "h": lambda p: p.g * p.gamma,
    "gx": lambda p: p.s * (p.h - p.average(p.h) - p.x_hat * p.average(p.h * p.x_hat)),
    "gweight": lambda p: None if p.weight is None else p.per_channel(p.g * p.x_hat),
    "gbias": lambda p: None if p.bias is None else p.per_channel(p.g),
}
RMS = {
    **LAYER,
    "bias": lambda p: None,
    "mean": lambda p: 0.0,
    "gx": lambda p: p.s * (p.h - p.x_hat * p.average(p.h * p.x_hat)),
}


def textbook_layer_norm(*, forward=(), rule=(), both=()):
    """Return a layer norm with some of its formulas replaced: forward's, the rule's or both's."""
    formulas, rules = LAYER | dict(both) | dict(forward), LAYER | dict(both) | dict(rule)

    def layer_norm(x, weight=None, bias=None, *, axis, channels, eps):
        given = {"axis": axis, "channels": channels, "eps": eps}
        return Sheet(formulas, x=x, weight=weight, bias=bias, **given).y

    def vjp(g, x, weight, bias, axis, channels, eps):
        given = {"axis": axis, "channels": channels, "eps": eps}
        p = Sheet(rules, cotangent=g, x=x, weight=weight, bias=bias, **given)
        return p.gx, p.gweight, p.gbias

    return made(layer_norm, vjp)


def textbook_rms_norm(*, forward=(), rule=(), both=()):
    formulas, rules = RMS | dict(both) | dict(forward), RMS | dict(both) | dict(rule)

    def rms_norm(x, weight=None, *, axis, channels, eps):
        given = {"axis": axis, "channels": channels, "eps": eps}
        return Sheet(formulas, x=x, weight=weight, **given).y

    def vjp(g, x, weight, axis, channels, eps):
        given = {"axis": axis, "channels": channels, "eps": eps}
        p = Sheet(rules, cotangent=g, x=x, weight=weight, **given)
        return p.gx, p.gweight

    return made(rms_norm, vjp)


def layer(fault, **formulas):
    return as_mutant("layer_norm", fault, textbook_layer_norm(**formulas))


def rms(fault, **formulas):
    return as_mutant("rms_norm", fault, textbook_rms_norm(**formulas))


def frozen(sheet, *names):
    """Return the formulas with some of the values as constants to the next derivative."""
    return {name: lambda p, name=name: detached(sheet[name](p)) for name in names}


def over_the_last_axis_alone(p):
    return (p.x.ndim - 1,)


LAYER_NORM = [
    layer("over the batch as well", both={"reduced": lambda p: tuple(
        i for i in range(p.x.ndim) if i == 0 or i not in p.axis)}),
    layer("over the last axis alone", both={"reduced": over_the_last_axis_alone}),
    layer("variance by m - 1", both={"var": lambda p: (
        p.average((p.wide - p.mean) ** 2) * (p.m / (p.m - 1)))}),
    layer("ε outside the root", both={"s": lambda p: 1 / (sqrt(p.var) + p.eps)}),
    layer("ε forgotten", both={"s": lambda p: 1 / sqrt(p.var)}),
    layer("statistics in float32", both={"wide": lambda p: p.x.astype("float32").astype(
        "float64")}),
    layer("γ forgotten in dx", rule={"h": lambda p: p.g}),
    layer("γ outside the sums, as in batch norm", rule={"gx": lambda p: p.gamma * p.s * (
        p.g - p.average(p.g) - p.x_hat * p.average(p.g * p.x_hat))}),
    layer("γ inside the mean alone", rule={"gx": lambda p: p.s * (
        p.h - p.average(p.h) - p.x_hat * p.average(p.g * p.x_hat))}),
    layer("mean term missing in dx", rule={"gx": lambda p: p.s * (
        p.h - p.x_hat * p.average(p.h * p.x_hat))}),
    layer("x̂ term missing in dx", rule={"gx": lambda p: p.s * (p.h - p.average(p.h))}),
    layer("dγ averaged over samples", rule={"gweight": lambda p: (
        None if p.weight is None else p.per_channel(p.g * p.x_hat) / p.x.shape[0])}),
    layer("dγ from γ g", rule={"gweight": lambda p: (
        None if p.weight is None else p.per_channel(p.h * p.x_hat))}),
    layer("dβ from γ g", rule={"gbias": lambda p: (
        None if p.bias is None else p.per_channel(p.h))}),
    layer("statistics frozen (second order)", rule=frozen(LAYER, "mean", "var")),
    layer("γ frozen (second order)", rule=frozen(LAYER, "gamma")),
]  # fmt: skip

RMS_NORM = [
    rms("mean subtracted", both={"wide": lambda p: LAYER["wide"](p) - p.average(
        LAYER["wide"](p))}),
    rms("mean square by m - 1", both={"var": lambda p: p.average(p.wide**2) * (
        p.m / (p.m - 1))}),
    rms("root of the sum of squares", both={"average": lambda p: lambda a: a.sum(
        axis=p.reduced, keepdims=True)}),
    rms("ε outside the root", both={"s": lambda p: 1 / (sqrt(p.var) + p.eps)}),
    rms("mean absolute value for the root", forward={"s": lambda p: 1 / sqrt(
        p.average(sqrt(p.wide**2)) ** 2 + p.eps)}),
    rms("mean term in dx, as in layer norm", rule={"gx": LAYER["gx"]}),
    rms("x̂ term missing in dx", rule={"gx": lambda p: p.s * p.h}),
    rms("γ outside the sums", rule={"gx": lambda p: p.gamma * p.s * (
        p.g - p.x_hat * p.average(p.g * p.x_hat))}),
    rms("dγ from x", rule={"gweight": lambda p: (
        None if p.weight is None else p.per_channel(p.g * p.wide))}),
    rms("root frozen (second order)", rule=frozen(LAYER, "s")),
]  # fmt: skip


# --- given statistics ----------------------------------------------------------------------------


def given(fault, rule):
    """Return a mutant of batch norm by given statistics with other formulas of its rule."""
    return as_mutant("batch_norm_given", fault, given_op(GIVEN, GIVEN | rule))


def sum_with_distance(p, power):
    """Return Σ γ g (x - μ) sᵏ per channel: -2 times the gradient of the variance for k = 3."""
    return p.per_channel(p.gamma * p.g * (p.wide - p.mean) * p.s**power)


GIVEN_STATISTICS = [
    given("gradient of the mean missing", {"gmean": lambda p: None}),
    given("gradient of the mean: wrong sign", {"gmean": lambda p: p.per_channel(p.gx)}),
    given("gradient of the mean: s forgotten", {"gmean": lambda p: p.per_channel(
        -p.gamma * p.g)}),
    given("gradient of the mean: γ forgotten", {"gmean": lambda p: p.per_channel(-p.s * p.g)}),
    given("gradient of the mean: averaged", {"gmean": lambda p: GIVEN["gmean"](p) / p.m}),
    given("gradient of the mean: by the batch's rule", {"gmean": lambda p: p.per_channel(
        -BATCH["gx"](p))}),
    given("gradient of the variance missing", {"gvar": lambda p: None}),
    given("gradient of the variance: of the deviation", {"gvar": lambda p: (
        -sum_with_distance(p, 2))}),
    given("gradient of the variance: half forgotten", {"gvar": lambda p: (
        -sum_with_distance(p, 3))}),
    given("gradient of the variance: wrong sign", {"gvar": lambda p: (
        sum_with_distance(p, 3) * 0.5)}),
    given("gradient of the variance: s² for s³", {"gvar": lambda p: (
        sum_with_distance(p, 2) * -0.5)}),
    given("gradient of the variance: γ forgotten", {"gvar": lambda p: p.per_channel(
        p.g * (p.wide - p.mean) * p.s**3) * -0.5}),
    given("gradient of the variance: mean not subtracted", {"gvar": lambda p: p.per_channel(
        p.gamma * p.g * p.wide * p.s**3) * -0.5}),
    given("gradient of the variance: averaged", {"gvar": lambda p: GIVEN["gvar"](p) / p.m}),
    given("given variance frozen (second order)", frozen(GIVEN, "var")),
    given("given mean frozen (second order)", frozen(GIVEN, "mean")),
]  # fmt: skip


# --- batch norm, residual, ReLU ------------------------------------------------------------------


def passed(p, gate):
    return where(raw(gate) > 0, p.cotangent.astype("float64"), 0.0)


NORM_RELU = {
    **BATCH,
    "added": lambda p: 0.0 if p.residual is None else p.residual,
    "normed": lambda p: p.x_hat * p.gamma + p.beta,
    "z": lambda p: p.normed + p.added,
    "y": lambda p: maximum(p.z, 0.0).astype(p.x.dtype),
    "g": lambda p: passed(p, p.z),
    "gresidual": lambda p: None if p.residual is None else p.g,
}


def textbook_norm_relu(*, forward=(), rule=(), both=()):
    """Return max(batch_norm(x) + residual, 0) with some of its formulas replaced."""
    formulas, rules = NORM_RELU | dict(both) | dict(forward), NORM_RELU | dict(both) | dict(rule)

    def batch_norm_relu(x, weight=None, bias=None, residual=None, *, axis, eps):
        vectors = {"weight": weight, "bias": bias, "residual": residual}
        return Sheet(formulas, x=x, axis=axis, eps=eps, **vectors).y

    def vjp(g, x, weight, bias, residual, axis, eps):
        vectors = {"weight": weight, "bias": bias, "residual": residual}
        p = Sheet(rules, cotangent=g, x=x, axis=axis, eps=eps, **vectors)
        return p.gx, p.gweight, p.gbias, p.gresidual

    return made(batch_norm_relu, vjp)


def relu(fault, **formulas):
    return as_mutant("batch_norm_relu", fault, textbook_norm_relu(**formulas))


def ungated(p):
    return p.cotangent.astype("float64")


RELU = [
    relu("residual added after the ReLU", both={
        "z": lambda p: p.normed,
        "y": lambda p: (maximum(p.z, 0.0) + p.added).astype(p.x.dtype),
        "gresidual": lambda p: None if p.residual is None else ungated(p)}),
    relu("residual ignored", both={"added": lambda p: 0.0,
        "gresidual": lambda p: None if p.residual is None else p.g * 0.0}),
    relu("residual subtracted", both={"z": lambda p: p.normed - p.added,
        "gresidual": lambda p: None if p.residual is None else -p.g}),
    relu("residual scaled by γ", forward={"z": lambda p: (
        (p.x_hat + p.added) * p.gamma + p.beta)}),
    relu("residual normalized too", forward={"wide": lambda p: (
        BATCH["wide"](p) + p.added), "z": lambda p: p.normed}),
    relu("leaky", forward={"y": lambda p: maximum(p.z, 0.01 * p.z).astype(p.x.dtype)}),
    relu("NaN cut off", forward={"y": lambda p: np.fmax(p.z, 0.0).astype(p.x.dtype)}),
    relu("cotangent passes everywhere", rule={"g": ungated}),
    relu("cotangent passes where x > 0", rule={"g": lambda p: passed(p, p.x)}),
    relu("cotangent passes where x̂ > 0", rule={"g": lambda p: passed(p, p.x_hat)}),
    relu("cotangent passes where batch norm > 0, the residual apart", rule={
        "g": lambda p: passed(p, p.normed)}),
    relu("cotangent passes where the residual > 0", rule={"g": lambda p: passed(
        p, p.z if p.residual is None else p.residual)}),
    relu("cotangent of the residual passes everywhere", rule={
        "gresidual": lambda p: None if p.residual is None else ungated(p)}),
    relu("cotangent of the residual missing", rule={"gresidual": lambda p: None}),
    relu("cotangent of the residual through batch norm", rule={
        "gresidual": lambda p: None if p.residual is None else p.gx}),
    relu("means of all cotangents in dx", rule={"gx": lambda p: p.gamma * p.s * (
        p.g - p.average(ungated(p)) - p.x_hat * p.average(ungated(p) * p.x_hat))}),
    relu("dx cut off, not the cotangent", rule={
        "g": ungated, "gx": lambda p: where(raw(p.z) > 0, BATCH["gx"](p), 0.0),
        "gresidual": lambda p: None if p.residual is None else passed(p, p.z)}),
    relu("dβ of all cotangents", rule={"gbias": lambda p: (
        None if p.bias is None else p.per_channel(ungated(p)))}),
    relu("statistics frozen (second order)", rule=frozen(BATCH, "mean", "var")),
]  # fmt: skip


NORMALIZATION = [*LAYER_NORM, *RMS_NORM, *GIVEN_STATISTICS, *RELU]

RIGHT = tuple(
    as_mutant(wrong.name, "", wrong)
    for wrong in (textbook_layer_norm(), textbook_rms_norm(), textbook_norm_relu())
)
