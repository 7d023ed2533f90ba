"""Ops that act entry by entry, on shapes that broadcast together.

Each rule is one line of calculus; the engine sums the cotangent over broadcast axes. A rule selects
with `where` rather than multiplying by a mask, since infinity times zero is NaN.
"""

from __future__ import annotations

import math
from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.domain import Boolean, Real, case, elementwise
from tinygrad_bn.domain import Domain as _Domain
from tinygrad_bn.op import op

_POSITIVE = Real(0.3, 3.0)
_NONZERO = Real(-2.0, 2.0, kinks=(0.0,))

# --- arithmetic ------------------------------------------------------------------------------


@op(domain=elementwise(Real(), Real()))
def add(x: Any, y: Any) -> Any:
    """Return x + y."""
    return x + y


add.def_vjp(x=lambda g: g, y=lambda g: g)


@op(domain=elementwise(Real(), Real()))
def subtract(x: Any, y: Any) -> Any:
    """Return x - y."""
    return x - y


subtract.def_vjp(x=lambda g: g, y=lambda g: -g)


@op(domain=elementwise(Real(), Real()))
def multiply(x: Any, y: Any) -> Any:
    """Return x * y."""
    return x * y


multiply.def_vjp(x=lambda g, y: g * y, y=lambda g, x: g * x)


@op(domain=elementwise(Real(), _NONZERO))
def divide(x: Any, y: Any) -> Any:
    """Return x / y."""
    return x / y


# Not -g x / y², whose square over- or underflows long before the quotient does.
divide.def_vjp(x=lambda g, y: g / y, y=lambda g, x, y: -(g / y) * (x / y))


@op(domain=elementwise(Real()))
def negative(x: Any) -> Any:
    """Return -x."""
    return -x


negative.def_vjp(x=lambda g: -g)


@op(domain=elementwise(_POSITIVE, Real()))
def power(x: Any, y: Any) -> Any:
    """Return x ** y.

    The derivative with respect to x is 0 where y = 0, that with respect to y is 0 where x <= 0.
    """
    return x**y


def _power_vjp_x(g: Any, x: Any, y: Any) -> Any:
    # y x^(y-1); the exponent is replaced at x = y = 0, since 0 · 0⁻¹ is NaN and the answer 0. Not
    # wherever y = 0: being constant there it would hide this rule's own derivative by y, g/x.
    if isinstance(y, (int, float)):
        return g * (y * x ** (y - 1 if y != 0 else 1))
    return g * (y * x ** where(x == 0, where(y == 0, 1, y - 1), y - 1))


def _power_vjp_y(g: Any, out: Any, x: Any) -> Any:
    # x^y log x
    if isinstance(x, (int, float)):
        return g * (out * (math.log(x) if x > 0 else 0.0))
    return g * (out * log(where(x > 0, x, 1)))


power.def_vjp(x=_power_vjp_x, y=_power_vjp_y)

# --- functions of one argument ---------------------------------------------------------------


@op(domain=elementwise(Real()))
def exp(x: Any) -> Any:
    """Return e ** x."""
    return array_module(x).exp(x)


exp.def_vjp(x=lambda g, out: g * out)


@op(domain=elementwise(Real()))
def expm1(x: Any) -> Any:
    """Return e ** x - 1, accurate near 0."""
    return array_module(x).expm1(x)


expm1.def_vjp(x=lambda g, out: g * (out + 1))


@op(domain=elementwise(_POSITIVE))
def log(x: Any) -> Any:
    """Return the natural logarithm of x."""
    return array_module(x).log(x)


log.def_vjp(x=lambda g, x: g / x)


@op(domain=elementwise(Real(-0.8, 2.0)))
def log1p(x: Any) -> Any:
    """Return the natural logarithm of 1 + x, accurate near 0."""
    return array_module(x).log1p(x)


log1p.def_vjp(x=lambda g, x: g / (x + 1))


@op(domain=elementwise(_POSITIVE))
def sqrt(x: Any) -> Any:
    """Return the square root of x."""
    return array_module(x).sqrt(x)


sqrt.def_vjp(x=lambda g, out: g * 0.5 / out)


@op(domain=elementwise(Real()))
def square(x: Any) -> Any:
    """Return x * x."""
    return array_module(x).square(x)


square.def_vjp(x=lambda g, x: g * (x * 2))


@op(domain=elementwise(Real()))
def sin(x: Any) -> Any:
    """Return the sine of x (radians)."""
    return array_module(x).sin(x)


sin.def_vjp(x=lambda g, x: g * cos(x))


@op(domain=elementwise(Real()))
def cos(x: Any) -> Any:
    """Return the cosine of x (radians)."""
    return array_module(x).cos(x)


cos.def_vjp(x=lambda g, x: -g * sin(x))


@op(domain=elementwise(Real()))
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent of x."""
    return array_module(x).tanh(x)


tanh.def_vjp(x=lambda g, out: g * (1 - out * out))


@op(domain=elementwise(Real()))
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e ** -x), without overflow on either side."""
    xp = array_module(x)
    small = xp.exp(-xp.abs(x))  # in (0, 1]
    return xp.where(x >= 0, 1, small) / (1 + small)


sigmoid.def_vjp(x=lambda g, out: g * (out * (1 - out)))


@op(domain=elementwise(_NONZERO))
def abs(x: Any) -> Any:
    """Return the absolute value of x; its derivative at 0 is 0."""
    return array_module(x).abs(x)


abs.def_vjp(x=lambda g, x: g * sign(x))


@op(domain=elementwise(_NONZERO))
def sign(x: Any) -> Any:
    """Return -1, 0 or 1; its derivative is 0 everywhere."""
    return array_module(x).sign(x)


sign.def_vjp(x=lambda g: zeros_like(g))


@op(domain=elementwise(_NONZERO))
def relu(x: Any) -> Any:
    """Return max(x, 0); NaN stays NaN, and the derivative at 0 is 0."""
    return array_module(x).maximum(x, 0)


@relu.def_vjp
def _(g: Any, out: Any) -> Any:
    return (where(out > 0, g, 0),)


relu.use_kernels(
    numpy="tinygrad_bn.kernels.cpu.numpy_relu",
    cuda="tinygrad_bn.kernels.cuda.relu",
)


@op(
    domain=_Domain(
        (Real(-2.0, 2.0, kinks=(-0.5, 0.75)),),
        (case((3, 4), min=-0.5, max=0.75), case((5,), min=-0.5), case((2, 1, 3), max=0.75)),
    )
)
def clip(x: Any, *, min: float | None = None, max: float | None = None) -> Any:
    """Return x limited to [min, max]; its derivative is 1 inside, ends included, and 0 outside."""
    return array_module(x).clip(x, min, max)


@clip.def_vjp
def _(g: Any, x: Any, min: float | None, max: float | None) -> Any:
    if min is not None:
        g = where(x >= min, g, 0)
    if max is not None:
        g = where(x <= max, g, 0)
    return (g,)


# --- choosing between two --------------------------------------------------------------------


@op(domain=elementwise(Real(), Real(), distinct=True))
def maximum(x: Any, y: Any) -> Any:
    """Return the larger of x and y; equal entries share the cotangent, NaN passes on."""
    return array_module(x, y).maximum(x, y)


maximum.def_vjp(
    x=lambda g, x, y: where(x > y, g, where(x == y, g * 0.5, 0)),
    y=lambda g, x, y: where(y > x, g, where(x == y, g * 0.5, 0)),
)


@op(domain=elementwise(Real(), Real(), distinct=True))
def minimum(x: Any, y: Any) -> Any:
    """Return the smaller of x and y; equal entries share the cotangent, NaN passes on."""
    return array_module(x, y).minimum(x, y)


minimum.def_vjp(
    x=lambda g, x, y: where(x < y, g, where(x == y, g * 0.5, 0)),
    y=lambda g, x, y: where(y < x, g, where(x == y, g * 0.5, 0)),
)


@op(domain=elementwise(Boolean(), Real(), Real()))
def where(condition: Any, x: Any, y: Any) -> Any:
    """Return x where the condition holds, y elsewhere."""
    return array_module(condition, x, y).where(condition, x, y)


where.def_vjp(
    x=lambda g, condition: where(condition, g, 0),
    y=lambda g, condition: where(condition, 0, g),
)

# --- comparisons and constants: no derivative ------------------------------------------------


@op(differentiable=False)
def equal(x: Any, y: Any) -> Any:
    """Return x == y, entry by entry."""
    return x == y


@op(differentiable=False)
def not_equal(x: Any, y: Any) -> Any:
    """Return x != y, entry by entry."""
    return x != y


@op(differentiable=False)
def less(x: Any, y: Any) -> Any:
    """Return x < y, entry by entry."""
    return x < y


@op(differentiable=False)
def less_equal(x: Any, y: Any) -> Any:
    """Return x <= y, entry by entry."""
    return x <= y


@op(differentiable=False)
def greater(x: Any, y: Any) -> Any:
    """Return x > y, entry by entry."""
    return x > y


@op(differentiable=False)
def greater_equal(x: Any, y: Any) -> Any:
    """Return x >= y, entry by entry."""
    return x >= y


@op(differentiable=False)
def isnan(x: Any) -> Any:
    """Return whether each entry is NaN."""
    return array_module(x).isnan(x)


@op(differentiable=False, domain=elementwise(Boolean(), Boolean()))
def bitwise_and(x: Any, y: Any) -> Any:
    """Return x & y: on booleans, whether both hold."""
    return x & y


@op(differentiable=False, domain=elementwise(Boolean(), Boolean()))
def bitwise_or(x: Any, y: Any) -> Any:
    """Return x | y: on booleans, whether either holds."""
    return x | y


@op(differentiable=False, domain=elementwise(Boolean()))
def invert(x: Any) -> Any:
    """Return ~x: on booleans, the opposite."""
    return ~x


@op(differentiable=False)
def logical_not(x: Any) -> Any:
    """Return whether each entry is zero or False."""
    return array_module(x).logical_not(x)


@op(differentiable=False)
def zeros_like(x: Any) -> Any:
    """Return zeros with the shape and dtype of x."""
    return array_module(x).zeros_like(x)


@op(differentiable=False)
def ones_like(x: Any) -> Any:
    """Return ones with the shape and dtype of x."""
    return array_module(x).ones_like(x)
