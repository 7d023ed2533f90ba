"""What a forward hands out beside its output."""

from __future__ import annotations

from typing import Any


class saving:  # noqa: N801  (reads as a word in `return saving(out, mean=mean)`)
    """Return from a forward its output and, beside it, named residuals for the derivative rule.

    out: the output, or a tuple of outputs. Not a tuple with the rest, so that residuals cannot be
        mistaken for further outputs.
    residuals: what a rule may ask for by these names; floating ones come as None under
        `create_graph`, since they depend on the inputs.

    >>> import tinygrad_bn as tg
    >>> @tg.op
    ... def square_root(x):
    ...     root = x**0.5
    ...     return tg.saving(root, slope=0.5 / root)
    >>> @square_root.def_vjp
    ... def _(g, x, slope):
    ...     return (g * (0.5 * x**-0.5 if slope is None else slope),)
    >>> x = tg.tensor([4.0], requires_grad=True)
    >>> square_root(x).backward()
    >>> x.grad.item()
    0.25
    """

    __slots__ = ("out", "residuals")

    def __init__(self, out: Any, **residuals: Any):
        self.out = out
        self.residuals = residuals
