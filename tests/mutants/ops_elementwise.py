"""Entry-by-entry ops with a fault in forward or rule."""

import numpy as np

from tests.mutants.mutant import op_mutant as mutant
from tests.mutants.textbook import detached
from tinygrad_bn.ops.elementwise import cos, log, sign, sin, where
from tinygrad_bn.tape import TensorBase


def scaling_in_place(g, y):
    if not isinstance(g, TensorBase) and g.flags.writeable:
        g *= y
        return g
    return g * y


def forgetful(x):
    """Write the result into x."""
    return np.exp(x, out=x) if x.flags.writeable and x.ndim else np.exp(x)


_CALLS = []


def drifting(x):
    """Add a little more at every call, as an op with a state of its own would."""
    _CALLS.append(0)
    return np.sin(x) + 1e-3 * len(_CALLS)


_BUFFERS = {}


def into_a_kept_buffer(g, x):
    if isinstance(g, TensorBase):
        return g * (x * 2)
    buffer = _BUFFERS.setdefault((x.shape, x.dtype), np.empty_like(x))
    buffer[...] = g * (x * 2)
    return buffer


ELEMENTWISE = [
    mutant("add", "gradient of y with the wrong sign", y=lambda g: -g),
    mutant("add", "adds its first input twice", forward=lambda x, y: x + y + 0 * y + x),
    mutant("subtract", "gradient of y without its sign", y=lambda g: g),
    mutant("multiply", "gradients swapped", x=lambda g, x: g * x, y=lambda g, y: g * y),
    mutant("multiply", "gradient of y from y", y=lambda g, y: g * y),
    mutant("multiply", "cotangent scaled in place", x=scaling_in_place),
    mutant("multiply", "factor frozen (second order)", x=lambda g, y: g * detached(y)),
    mutant("multiply", "cotangent frozen (second order)", x=lambda g, y: detached(g) * y),
    mutant("divide", "gradient of y without its sign", y=lambda g, x, y: g * x / (y * y)),
    mutant("divide", "gradient of y divided once", y=lambda g, x, y: -g * x / y),
    mutant("divide", "gradient of x multiplied", x=lambda g, y: g * y),
    mutant("negative", "sign forgotten in the rule", x=lambda g: g),
    mutant("power", "exponent not reduced", x=lambda g, x, y: g * (y * x**y)),
    mutant("power", "factor y missing", x=lambda g, x, y: g * x ** (y - 1)),
    mutant("power", "logarithm of the exponent", y=lambda g, out, x, y: g * (
        out * log(where(y > 0, y, 1)))),
    mutant("power", "logarithm missing", y=lambda g, out: g * out),
    mutant("exp", "output frozen (second order)", x=lambda g, out: g * detached(out)),
    mutant("exp", "result written into x", forward=forgetful),
    mutant("expm1", "rule of the output, not of output + 1", x=lambda g, out: g * out),
    mutant("expm1", "cancels near 0", forward=lambda x: np.exp(x) - 1),
    mutant("log", "gradient multiplied", x=lambda g, x: g * x),
    mutant("log1p", "1 + x taken for x", x=lambda g, x: g / x),
    mutant("log1p", "cancels near 0", forward=lambda x: np.log(1 + x)),
    mutant("sqrt", "half missing", x=lambda g, out: g / out),
    mutant("sqrt", "divided by x", x=lambda g, x: g * 0.5 / x),
    mutant("square", "2 missing", x=lambda g, x: g * x),
    mutant("square", "gradient in a buffer that is kept", x=into_a_kept_buffer),
    mutant("sin", "derivative -cos", x=lambda g, x: -g * cos(x)),
    mutant("sin", "depends on how often it was called", forward=drifting),
    mutant("cos", "derivative without its sign", x=lambda g, x: g * sin(x)),
    mutant("cos", "derivative constant (second order)", x=lambda g, x: -g * detached(sin(x))),
    mutant("tanh", "1 - out for 1 - out²", x=lambda g, out: g * (1 - out)),
    mutant("tanh", "1 - x² for 1 - out²", x=lambda g, x: g * (1 - x * x)),
    mutant("tanh", "output frozen (second order)", x=lambda g, out: g * (
        1 - detached(out) * detached(out))),
    mutant("tanh", "one factor frozen (second order)", x=lambda g, out: g * (
        1 - detached(out) * out)),
    mutant("sigmoid", "out for out (1 - out)", x=lambda g, out: g * out),
    mutant("sigmoid", "factor 1 - out frozen (second order)", x=lambda g, out: g * (
        out * (1 - detached(out)))),
    mutant("sigmoid", "rule from x for out", x=lambda g, x: g * (x * (1 - x))),
    mutant("abs", "derivative 1", x=lambda g: g),
    mutant("abs", "derivative from the output", x=lambda g, out: g * sign(out)),
    mutant("sign", "derivative 1, as straight-through estimators have it", x=lambda g: g),
    mutant("relu", "cotangent passed everywhere", x=lambda g: g),
    mutant("relu", "cotangent passed where x < 0", x=lambda g, x: where(x < 0, g, 0)),
    mutant("relu", "cotangent masked by its own sign", x=lambda g: where(g > 0, g, 0)),
    mutant("relu", "leaks where x < 0", x=lambda g, out: where(out > 0, g, 0.01 * g)),
    mutant("relu", "NaN becomes 0", forward=lambda x: np.where(x > 0, x, 0).astype(x.dtype)),
    mutant("relu", "result is float64", forward=lambda x: np.maximum(x, np.zeros(x.shape))),
    mutant("clip", "derivative 1 outside too", rule=lambda g: (g,)),
    mutant("clip", "derivative 0 above max alone", rule=lambda g, x, min, max: (
        (g if max is None else where(x <= max, g, 0)),)),
    mutant("clip", "limits open to one side", rule=lambda g, x, min, max: (
        where(x >= (max if min is None else min), g, 0),)),
    mutant("maximum", "cotangent to both", x=lambda g: g, y=lambda g: g),
    mutant("maximum", "rule of minimum", x=lambda g, x, y: where(x < y, g, 0),
           y=lambda g, x, y: where(y < x, g, 0)),
    mutant("maximum", "cotangent always shared evenly", x=lambda g: g * 0.5, y=lambda g: g * 0.5),
    mutant("minimum", "cotangent to x alone", y=lambda g: g * 0),
    mutant("where", "branches swapped in the rule", x=lambda g, condition: where(condition, 0, g),
           y=lambda g, condition: where(condition, g, 0)),
    mutant("where", "cotangent to both branches", x=lambda g: g, y=lambda g: g),
    mutant("where", "mask forgotten for y", y=lambda g: g),
]  # fmt: skip
