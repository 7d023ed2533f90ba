"""Inputs for any op that declares its sample domain: this is what walks the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinygrad_bn.domain import Boolean, Domain, Integer, Real
from tinygrad_bn.op import Op
from tinygrad_bn.testing.strategies.arrays import away_from_kinks, distinct_arrays, seeds
from tinygrad_bn.testing.strategies.shapes import Shape, broadcastable_shapes
from tinygrad_bn.testing.strategies.shown import shown


@dataclass(frozen=True, repr=False)
class OpInputs:
    """One call of an op: `fn(*arrays)` is the op with its options, ready for the checkers."""

    op: Op
    arrays: tuple[np.ndarray | None, ...]
    options: Mapping[str, Any]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # What Hypothesis prints by; without it a dataclass is spelt out to the last entry.
        printer.text(repr(self))

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"{self.op.name}({', '.join([*map(shown, self.arrays), *options])})"

    @property
    def fn(self) -> Callable[..., Any]:
        """The op as a function of its arrays alone."""
        return partial(self.op, **self.options) if self.options else self.op


@st.composite
def op_inputs(draw: st.DrawFn, op: Op, dtype: Any = "float64") -> OpInputs:
    """Return a strategy for calls of `op` from its domain, floating inputs in `dtype`.

    Raises ValueError for an op without a domain.

    >>> import tinygrad_bn as tg
    >>> from hypothesis import find
    >>> from tinygrad_bn.op import REGISTRY
    >>> find(op_inputs(REGISTRY["log"]), lambda drawn: drawn.arrays[0].size == 2).arrays
    (array([0.3, 0.3]),)
    """
    domain = op.domain
    if domain is None:
        raise ValueError(
            f"{op.name} has no sample domain; declare one beside it, for example "
            f"@op(domain=Domain(...)), so that it can be tested"
        )
    shapes: Sequence[Shape | None]
    if domain.cases:
        chosen = draw(st.sampled_from(domain.cases))
        shapes, options = chosen.shapes, chosen.options
    else:
        shapes, options = draw(broadcastable_shapes(len(op.inputs) or 2)), {}
    kinds = _kinds(domain, len(shapes))
    arrays: list[Any] = [None] * len(shapes)
    if domain.distinct:
        _draw_distinct(draw, arrays, kinds, shapes, dtype)
    for i, (kind, shape) in enumerate(zip(kinds, shapes, strict=True)):
        if shape is not None and arrays[i] is None:
            arrays[i] = _draw_one(draw, kind, shape, dtype)
    return OpInputs(op, tuple(arrays), options)


def _kinds(domain: Domain, count: int) -> list[Real | Integer | Boolean]:
    """Return what each of `count` inputs holds; the domain's last entry repeats."""
    return [domain.inputs[min(i, len(domain.inputs) - 1)] for i in range(count)]


def _draw_one(draw: st.DrawFn, kind: Real | Integer | Boolean, shape: Shape, dtype: Any) -> Any:
    if isinstance(kind, Real):
        drawn = draw(away_from_kinks(shape, dtype, low=kind.low, high=kind.high, kinks=kind.kinks))
        # Close to 0 too, where what subtracts its way there loses all digits.
        near = not kind.kinks and kind.low < 0 < kind.high and draw(st.sampled_from((0, 0, 1)))
        return drawn * drawn.dtype.type(2.0**-10) if near else drawn
    rng = np.random.default_rng(draw(seeds()))
    if isinstance(kind, Integer):
        return np.asarray(rng.integers(kind.low, kind.high, shape), kind.dtype)
    return np.asarray(rng.random(shape) < 0.5)


def _draw_distinct(
    draw: st.DrawFn,
    arrays: list[Any],
    kinds: Sequence[Real | Integer | Boolean],
    shapes: Sequence[Shape | None],
    dtype: Any,
) -> None:
    """Fill in the real inputs, no two of their entries equal."""
    real = [i for i, kind in enumerate(kinds) if isinstance(kind, Real) and shapes[i] is not None]
    if not real:
        return
    # Entries of different inputs must differ too, so they share the range of the first.
    kind = kinds[real[0]]
    drawn = draw(
        distinct_arrays([shapes[i] or () for i in real], dtype, low=kind.low, high=kind.high)  # pyrefly: ignore
    )
    for i, array in zip(real, drawn, strict=True):
        arrays[i] = array
