"""Whole graphs of registered ops: fan-out, reuse, broadcasting, views, unused branches.

What is drawn is a short list of recipes, (op, case, which operands); a builder turns any such list
into a valid graph, so nothing is filtered out and a failing graph shrinks by leaving recipes out.
The builder knows every value as it goes: an operand of the wrong shape is reshaped, sliced or
broadcast to fit (views!), and one outside an op's domain, or too near a kink, is replaced by a new
leaf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from tinygrad_bn import functional  # noqa: F401  (registers every op of the library)
from tinygrad_bn.domain import Boolean, Case, Domain, Integer, Real
from tinygrad_bn.op import REGISTRY, Op
from tinygrad_bn.testing.cotangents import signed_uniform
from tinygrad_bn.testing.graphs import SIN_COS, Graph, Leaf, Part, Step
from tinygrad_bn.testing.strategies.arrays import allowed_intervals, seeds, spread_over

Shape = tuple[int, ...]

#: Distance that operands keep from kinks and from each other, in units of a range of 4.
_MARGIN = 0.05

#: Arrays larger than this, and values beyond the other, do not occur.
_MAX_SIZE, _MAX_VALUE = 64, 50.0

#: The reference walks every path, so there must not be too many.
_MAX_PATHS = 128

_SHAPES: tuple[Shape, ...] = ((), (1,), (3,), (2, 3), (2, 1), (2, 2, 2))

_OPERANDS = 3
#: From this number on an operand is a new leaf.
_NEW_LEAF, _LAST = 6, 7


class _Recipe(NamedTuple):
    op: Op
    case: int
    operands: tuple[int, ...]  # 0 is the newest value, 1 the one before, ...; then a new leaf
    shape: int  # which shape new leaves have, where the op leaves that open


@st.composite
def graphs(draw: st.DrawFn, *, ops: Sequence[Op | str] | None = None, max_steps: int = 8) -> Graph:
    """Return a strategy for `testing.graphs.Graph`, for `testing.check_graph` and other checkers.

    ops: Ops, or names in the registry; None takes every differentiable op of the library, and one
        with two outputs. Each must have a sample domain.
    max_steps: the largest number of ops that are drawn; views that make operands fit come on top.

    Every output has a random cotangent, and at least one leaf is free. A fault of the engine
    shrinks to the few steps that show it.

    >>> from hypothesis import find
    >>> find(graphs(ops=["multiply"]), lambda graph: graph.nodes[-1].inputs == (0, 0))
    v0 = Tensor(array(0.55), requires_grad=True)
    v1 = multiply(v0, v0)
    outputs v1 with cotangents array(-1.42)
    """
    vocabulary = _vocabulary(ops)
    recipe = st.builds(
        _Recipe,
        # What broadcasts, or has several outputs, is where engines stumble: four times as often.
        st.sampled_from([*vocabulary, *3 * [op for op in vocabulary if _is_telling(op)]]),
        st.integers(0, 31),
        st.tuples(*[st.integers(0, _LAST)] * _OPERANDS),
        st.integers(0, 8 * len(_SHAPES) - 1),
    )
    recipes = draw(st.lists(recipe, min_size=1, max_size=max_steps))
    picks = draw(st.lists(st.integers(0, 15), min_size=1, max_size=3))
    frozen = draw(st.sets(st.integers(0, 7), max_size=2))
    builder = _Builder(draw(seeds()))
    for one in recipes:
        builder.apply(one)
    return builder.finished(picks, frozen)


def _vocabulary(ops: Sequence[Op | str] | None) -> list[Op]:
    if ops is None:
        library = [op for op in REGISTRY.values() if op.__module__.startswith("tinygrad_bn.")]
        return [*(op for op in library if op.differentiable and op.domain), SIN_COS]
    chosen = [REGISTRY[op] if isinstance(op, str) else op for op in ops]
    for op in chosen:
        if op.domain is None and op is not SIN_COS:
            raise ValueError(
                f"graphs: {op.name} has no sample domain; declare one beside it, for example "
                f"@op(domain=elementwise(Real()))"
            )
    return chosen


def _is_telling(op: Op) -> bool:
    return op is SIN_COS or (op.domain is not None and not op.domain.cases and len(op.inputs) > 1)


class _Builder:
    """Nodes so far, with their values and the number of paths that lead back from each."""

    def __init__(self, seed: int):
        self.seed = seed
        self.nodes: list[Leaf | Step | Part] = []
        self.values: list[Any] = []
        self.paths: list[int] = []
        self.usable: list[int] = []  # floating values, not tuples

    def apply(self, recipe: _Recipe) -> None:
        """Add what a recipe says."""
        op = recipe.op
        domain = op.domain or Domain()
        if domain.cases:
            cases = _small(domain)
            chosen = cases[recipe.case % len(cases)]
            shapes, options = chosen.shapes, chosen.options
        else:
            shapes, options = [None] * len(op.inputs), {}
        inputs: list[int | None] = []
        for k, shape in enumerate(shapes):
            if domain.cases and shape is None:
                inputs.append(None)
                continue
            kind = domain.inputs[min(k, len(domain.inputs) - 1)]
            others = [self.values[i].shape for i in inputs if i is not None]
            wanted = shape if domain.cases else self._matching(recipe, k, others)
            pick = recipe.operands[k % _OPERANDS]
            inputs.append(self._operand(kind, wanted, pick, recipe.shape))
        inputs = self._in_domain(op, domain, inputs, options)
        self._add_step(op, tuple(inputs), options)

    def finished(self, picks: Sequence[int], frozen: set[int]) -> Graph:
        """Return the graph with the outputs that `picks` choose, the last value first."""
        outputs = tuple(self.usable[-1 - p % len(self.usable)] for p in picks)
        leaves = [i for i, n in enumerate(self.nodes) if isinstance(n, Leaf) and n.free]
        constant = {leaves[k] for k in frozen if 0 < k < len(leaves)}  # the first stays free
        nodes = tuple(
            Leaf(n.array, False) if isinstance(n, Leaf) and i in constant else n
            for i, n in enumerate(self.nodes)
        )
        rng = np.random.default_rng((self.seed, 7))
        # Two digits, as for leaves: short in a message, and nothing hides in the rest.
        cotangents = tuple(
            np.round(signed_uniform(rng, 0.5, 1.5, s), 2)
            for s in (np.shape(self.values[i]) for i in outputs)
        )
        return Graph(nodes, outputs, cotangents)

    def _rng(self) -> np.random.Generator:
        # For the next node alone: the shrinker may then take others away without changing it.
        return np.random.default_rng((self.seed, sum(isinstance(n, Leaf) for n in self.nodes)))

    # --- operands --------------------------------------------------------------------------------

    def _operand(
        self, kind: Real | Integer | Boolean, wanted: Shape | None, pick: int, leaf_shape: int
    ) -> int:
        """Return the number of a value of the wanted shape (None: any)."""
        if not isinstance(kind, Real):
            return self._add_leaf(kind, wanted or ())
        shape = _SHAPES[leaf_shape % len(_SHAPES)] if wanted is None else wanted
        if pick >= _NEW_LEAF or not self.usable:
            return self._add_leaf(kind, shape)
        i = self.usable[-1 - pick % len(self.usable)]
        if wanted is None:
            return i
        fitted = self._fitted(i, wanted)
        return self._add_leaf(kind, wanted) if fitted is None else fitted

    def _matching(self, recipe: _Recipe, k: int, others: Sequence[Shape]) -> Shape | None:
        """Return the shape that operand `k` of an elementwise op needs; None if any will do."""
        if not others:
            return None
        shape = np.broadcast_shapes(*others)
        pick = recipe.operands[k % _OPERANDS]
        # One that broadcasts: fewer axes, some of them of size 1.
        cut = shape[recipe.shape % (len(shape) + 1) :]
        smaller = tuple(1 if recipe.shape >> axis & 1 else n for axis, n in enumerate(cut))
        if pick >= _NEW_LEAF or not self.usable:
            return smaller
        mine = self.values[self.usable[-1 - pick % len(self.usable)]].shape
        try:
            together = np.broadcast_shapes(shape, mine)
        except ValueError:
            return smaller
        return mine if math.prod(together) <= _MAX_SIZE else smaller

    def _fitted(self, i: int, wanted: Shape) -> int | None:
        """Return value `i` as one of the wanted shape, by views; None if it is too small."""
        have = self.values[i].shape
        if have == wanted:
            return i
        try:
            broadcasts = np.broadcast_shapes(have, wanted) == wanted
        except ValueError:
            broadcasts = False
        if broadcasts:
            return self._add_step(REGISTRY["broadcast_to"], (i,), {"shape": wanted})
        size = math.prod(wanted)
        if math.prod(have) < size or size == 0:
            return None
        if math.prod(have) > size:
            if len(have) != 1:
                i = self._add_step(REGISTRY["reshape"], (i,), {"shape": (-1,)})
            i = self._add_step(REGISTRY["getitem"], (i,), {"index": slice(0, size)})
        if self.values[i].shape == wanted:
            return i
        return self._add_step(REGISTRY["reshape"], (i,), {"shape": wanted})

    def _in_domain(
        self, op: Op, domain: Domain, inputs: Sequence[int | None], options: Mapping[str, Any]
    ) -> list[int | None]:
        """Return inputs at which the op may be differentiated, some of them new leaves."""
        kinds = [domain.inputs[min(k, len(domain.inputs) - 1)] for k in range(len(inputs))]
        result: list[int | None] = []
        for i, kind in zip(inputs, kinds, strict=True):
            inside = i is None or not isinstance(kind, Real) or _inside(kind, self.values[i])
            result.append(i if inside or i is None else self._add_leaf(kind, self.values[i].shape))
        real = [k for k, i in enumerate(result) if i is not None and isinstance(kinds[k], Real)]

        def arrays() -> list[Any]:
            return [None if i is None else self.values[i] for i in result]

        if domain.distinct and _too_close([arrays()[k] for k in real]):
            self._make_distinct(result, real)
        paths = sum(self.paths[i] for i in result if i is not None)
        with np.errstate(all="ignore"):
            out = op(*arrays(), **options)
        largest = max(float(np.abs(o).max(initial=0.0)) for o in _as_tuple(out))
        if paths > _MAX_PATHS or not largest <= _MAX_VALUE:
            for k in real:
                result[k] = self._add_leaf(kinds[k], self.values[result[k] or 0].shape)
            if domain.distinct:
                self._make_distinct(result, real)
        return result

    def _make_distinct(self, inputs: list[int | None], real: Sequence[int]) -> None:
        """Replace these inputs by leaves in which no two entries are near each other."""
        shapes = [self.values[inputs[k] or 0].shape for k in real]
        sizes = [math.prod(s) for s in shapes]
        rng = self._rng()
        ranks = rng.permutation(sum(sizes)) + rng.uniform(0.3, 0.7, sum(sizes))
        parts = np.split(ranks * 4.0 / max(sum(sizes), 1) - 2.0, np.cumsum(sizes)[:-1])
        for k, part, shape in zip(real, parts, shapes, strict=True):
            inputs[k] = self._add(Leaf(part.reshape(shape)), part.reshape(shape), 1)

    # --- adding ----------------------------------------------------------------------------------

    def _add_leaf(self, kind: Real | Integer | Boolean, shape: Shape) -> int:
        rng = self._rng()
        if isinstance(kind, Integer):
            array = np.asarray(rng.integers(kind.low, kind.high, shape), kind.dtype)
        elif isinstance(kind, Boolean):
            array = np.asarray(rng.random(shape) < 0.5)
        else:
            margin = (kind.high - kind.low) / 20
            pieces = allowed_intervals(kind.low, kind.high, kind.kinks, margin)
            array = np.asarray(np.round(spread_over(rng.random(shape), pieces), 2))
        return self._add(Leaf(array, isinstance(kind, Real)), array, 1)

    def _add_step(self, op: Op, inputs: tuple[int | None, ...], options: Mapping[str, Any]) -> int:
        arrays = [None if i is None else self.values[i] for i in inputs]
        value = op(*arrays, **options)
        paths = sum(self.paths[i] for i in inputs if i is not None)
        i = self._add(Step(op, inputs, options), value, paths)
        if isinstance(value, tuple):
            for k, part in enumerate(value):
                self._add(Part(i, k), part, paths)
        return i

    def _add(self, node: Leaf | Step | Part, value: Any, paths: int) -> int:
        self.nodes.append(node)
        self.values.append(value)
        self.paths.append(paths)
        i = len(self.nodes) - 1
        if not isinstance(value, tuple) and value.dtype.kind == "f":
            self.usable.append(i)
        return i


def _small(domain: Domain) -> Sequence[Case]:
    """Return the cases with small inputs; all of them if none is small."""
    sizes = [sum(math.prod(s) for s in c.shapes if s is not None) for c in domain.cases]
    small = [c for c, size in zip(domain.cases, sizes, strict=True) if size <= 2 * _MAX_SIZE]
    return small or domain.cases


def _inside(kind: Real, array: np.ndarray) -> bool:
    """Return whether an op with this input may be differentiated at `array`."""
    margin = _MARGIN * (kind.high - kind.low) / 4
    if any(np.abs(array - kink).min(initial=np.inf) < margin for kink in kind.kinks):
        return False
    # A symmetric range is where to draw from; any other says what the op is defined for.
    if kind.low == -kind.high:
        return True
    return bool(np.all((array >= kind.low) & (array <= kind.high)))


def _too_close(arrays: Sequence[np.ndarray]) -> bool:
    entries = np.sort(np.concatenate([a.reshape(-1) for a in arrays]))
    return bool(np.diff(entries).min(initial=np.inf) < _MARGIN)


def _as_tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)
