"""What a forward hands out beside its output."""

from __future__ import annotations

from typing import Any


class saving:  # noqa: N801  (reads as a word in `return saving(out, mean=mean)`)
    """Return from a forward its output and, beside it, named residuals for the derivative rule.

    Not a tuple, so that residuals cannot be mistaken for further outputs.
    """

    __slots__ = ("out", "residuals")

    def __init__(self, out: Any, **residuals: Any):
        self.out = out
        self.residuals = residuals
