"""Shows what a wrong derivative looks like to `testing.check_grad`: an op, its message, the fix.

    python examples/check_my_op.py

The op divides every row by its length. Its derivative has two terms, since the length moves with x:

    y = x / |x|        dL/dx = (g - y <y, g>) / |x|
"""

from __future__ import annotations

from typing import Any

import numpy as np

import tinygrad_bn as tg
from tinygrad_bn import testing
from tinygrad_bn.backend import array_module


@tg.op
def unit(x: Any) -> Any:
    """Return x with every row divided by its length."""
    return x / array_module(x).sqrt((x * x).sum(axis=-1, keepdims=True))


def length_taken_for_a_constant(g: Any, x: Any) -> Any:
    """Return the cotangent of x with the second term forgotten: the planted bug."""
    return (g / (x * x).sum(axis=-1, keepdims=True) ** 0.5,)


def right(g: Any, x: Any, out: Any) -> Any:
    """Return the cotangent of x."""
    length = (x * x).sum(axis=-1, keepdims=True) ** 0.5
    return ((g - out * (out * g).sum(axis=-1, keepdims=True)) / length,)


def main() -> None:
    """Check the op with the bug, print what the check says, then check it with the fix."""
    x = np.array([[3.0, 4.0], [1.0, -2.0], [0.5, 0.25]])

    unit.def_vjp(length_taken_for_a_constant)
    print("With the length taken for a constant:\n")
    try:
        testing.check_grad(unit, x)
    except testing.GradCheckError as error:
        print(error)
    else:
        raise SystemExit("the bug was not found")

    unit.def_vjp(right)
    print("\nWith both terms:\n")
    for check in (
        testing.check_grad,  # the derivative
        testing.check_double_grad,  # and its derivative, by x and by g
        testing.check_pure,  # nothing changed, nothing shared
        testing.check_layouts,  # in any memory layout
        testing.check_dtypes,  # float32 in, float32 out
    ):
        print(check(unit, x))


if __name__ == "__main__":
    main()
