"""Batch norms that lose digits where x is bfloat16, whose own are few: seven bits.

What is computed must be computed wider, from x as it is, and rounded once. A float32 γ and the
running statistics keep what bfloat16 has not.
"""

import numpy as np
from ml_dtypes import bfloat16

from tests.mutants.mutant import Mutant
from tests.mutants.textbook import BATCH, GIVEN, STATE, textbook
from tests.mutants.verifiers import as_lawful
from tinygrad_bn import Tensor, grad
from tinygrad_bn import functional as F
from tinygrad_bn.testing import GradCheckError
from tinygrad_bn.testing.batch_norm_reference import WIDE, expected
from tinygrad_bn.testing.strategies import batch_norm_inputs

#: Half a unit of bfloat16 at most, a hair wider: what is rounded has float32's digits only.
_HALF = 2.0**-8 * (1 + 2.0**-10)
#: Of float32 results, and of what is rounded: sums of some hundred terms.
_NARROW = 64 * 2.0**-24


def narrow_inputs():
    return batch_norm_inputs(dtype="float32", max_ratio=10.0, max_spread=10.0, max_eps=1.0)


def _require(name, got, right, scale, dtype):
    if got.dtype != dtype or got.shape != right.shape:
        raise GradCheckError(
            f"{name} is {got.dtype}{list(got.shape)}, expected {dtype}{list(right.shape)}"
        )
    allowed = _NARROW * scale + (_HALF * np.abs(right) if dtype == bfloat16 else 0)
    error = np.abs(got.astype(WIDE) - right)
    if not (error <= allowed).all():
        worst = float((error / allowed).max())
        raise GradCheckError(f"{name} in {got.dtype} is {worst:.3g} times as far off as it may be")


class _Call:
    """A batch norm of bfloat16 x, all else in float32, and what is right for it."""

    def __init__(self, batch_norm, d, training):
        x, g = d.x.astype(bfloat16), d.cotangent.astype(bfloat16)
        self.given = None if training else (d.running_mean, d.running_var)
        wide = x.astype(WIDE), d.weight, d.bias, g.astype(WIDE)
        self.right = expected(*wide, eps=d.eps, axis=d.axis, given=self.given)
        self.running = [Tensor(s.copy()) for s in (d.running_mean, d.running_var)]
        inputs = {"gx": x, "gweight": d.weight, "gbias": d.bias}
        given = {name: a.copy() for name, a in inputs.items() if a is not None}
        self.inputs = {name: Tensor(a, requires_grad=True) for name, a in given.items()}
        named = [self.inputs.get(name) for name in ("gweight", "gbias")]
        options = {"eps": d.eps, "axis": d.axis, "momentum": d.momentum}
        self.y = batch_norm(self.inputs["gx"], *self.running, *named, training, **options)
        self.cotangent = g

    def require(self):
        right = self.right
        _require("y", self.y.numpy(), right.y, right.scales["y"], bfloat16)
        found = grad(self.y, list(self.inputs.values()), Tensor(self.cotangent))
        for (name, given), gradient in zip(self.inputs.items(), found, strict=True):
            want, scale = getattr(right, name), right.scales[name]
            _require(name, gradient.numpy(), want, scale, given.dtype)


def training(batch_norm, d):
    """y and the gradient of x are rounded once, those of float32 vectors are as good as float32."""
    _Call(batch_norm, d, True).require()


def evaluation(batch_norm, d):
    """The same with fixed statistics."""
    _Call(batch_norm, d, False).require()


def running_statistics(batch_norm, d):
    """Running statistics in float32 take the step with float32's digits."""
    call = _Call(batch_norm, d, True)
    new = call.right.mean, call.right.var * WIDE(d.count) / (d.count - 1)
    before = d.running_mean, d.running_var
    for name, got, old, value in zip(("mean", "var"), call.running, before, new, strict=True):
        right = (1 - WIDE(d.momentum)) * old + WIDE(d.momentum) * value
        scale = np.abs(old) + np.abs(value) + call.right.scales[name]
        _require(f"running_{name}", got.numpy(), right, scale, np.float32)


as_narrow = as_lawful((training, evaluation, running_statistics), narrow_inputs)


def mutant(fault, **formulas):
    return Mutant(f"bfloat16: {fault}", textbook(**formulas), as_narrow)


def narrowed(formula):
    """Return a formula of which the result is rounded to x's dtype on the way."""

    def rounded(p):
        value = formula(p)
        return value.astype(p.x.dtype).astype("float64") if hasattr(value, "astype") else value

    return rounded


def truncated(p):
    """Cut off what bfloat16 has no room for."""
    wide = (p.x_hat * p.gamma + p.beta).astype("float32")
    if p.x.dtype != bfloat16:
        return wide.astype(p.x.dtype)
    return (wide.view("uint32") >> 16).astype("uint16").view(bfloat16)


def folded(p):
    """Return x · scale + offset, both rounded to x's dtype."""
    scale = (p.s * p.gamma).astype(p.x.dtype)
    return p.x * scale + (p.beta - p.mean * p.s * p.gamma).astype(p.x.dtype)


def into_the_sum(p):
    return p.per_channel((p.g * p.x_hat).astype(p.x.dtype).astype("float64"))


BFLOAT16 = [
    mutant("mean rounded to it", forward={"mean": narrowed(BATCH["mean"])}),
    mutant("variance rounded to it", forward={"var": narrowed(BATCH["var"])}),
    mutant("1/σ rounded to it", forward={"s": narrowed(BATCH["s"])}),
    mutant("x̂ rounded to it", forward={"x_hat": narrowed(BATCH["x_hat"])}),
    mutant("γ rounded to it", both={"gamma": narrowed(BATCH["gamma"])}),
    mutant("β rounded to it", both={"beta": narrowed(BATCH["beta"])}),
    mutant("deviations rounded to it", forward={"x_hat": lambda p: (
        (p.wide - p.mean).astype(p.x.dtype).astype("float64") * p.s)}),
    mutant("truncated, not rounded", forward={"y": truncated}),
    mutant("x · scale + offset in it", forward={"y": folded}),
    mutant("y in float32", forward={"y": lambda p: (
        p.x_hat * p.gamma + p.beta).astype("float32")}),
    mutant("gradient of x: x̂ rounded to it", rule={"x_hat": narrowed(BATCH["x_hat"])}),
    mutant("gradient of x: Σ g rounded to it", rule={"average": lambda p: (
        lambda a: BATCH["average"](p)(a).astype(p.x.dtype).astype("float64"))}),
    mutant("gradient of γ: terms rounded to it", rule={"gweight": lambda p: (
        None if p.weight is None else into_the_sum(p))}),
    mutant("gradient of γ rounded to it", rule={"gweight": narrowed(BATCH["gweight"])}),
    mutant("gradient of β rounded to it", rule={"gbias": narrowed(BATCH["gbias"])}),
    mutant("running mean takes a rounded one", state={"new_mean": narrowed(STATE["new_mean"])}),
    mutant("running variance takes a rounded one", state={"new_var": narrowed(STATE["new_var"])}),
    mutant("running statistics rounded to it", state={"moved": lambda p: lambda old, new: (
        STATE["moved"](p)(old, new).astype(bfloat16).astype("float64"))}),
    mutant("evaluation: running variance rounded to it", given={"var": narrowed(GIVEN["var"])}),
    mutant("evaluation: running mean rounded to it", given={"mean": narrowed(GIVEN["mean"])}),
    mutant("evaluation: y in float32", given={"y": lambda p: (
        p.x_hat * p.gamma + p.beta).astype("float32")}),
    mutant("evaluation: x · scale + offset in it", given={"y": folded}),
]  # fmt: skip

RIGHT = (
    Mutant("F.batch_norm of bfloat16", F.batch_norm, as_narrow),
    Mutant("the textbook of bfloat16", textbook(), as_narrow),
)
