"""The life of a graph: passes that keep or free it, accumulation, writes in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.ops.elementwise import sin
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.errors import GradCheckError

Array = np.ndarray
#: By leaf: the derivative with respect to it, and the sum of the sizes of the terms it is made of.
Slopes = dict[int, tuple[Array, Array]]

_SIZE = 3
_PICK = st.integers(0, 9)  # 0 is the newest value
#: Values stay below this, so that errors do not grow without bound.
_MAX_VALUE = 4.0


@dataclass
class _Memory:
    """What a Tensor and its views share: the numbers, and how often they were written."""

    values: Array
    writes: int = 0


@dataclass
class _Node:
    """A recorded op: where it leads, and the memories that it may have kept, as it saw them."""

    parents: list[_Node]
    kept: list[tuple[_Memory, int]]
    freed: bool = False
    doubtful: bool = False  # a pass that raised may have freed it or not

    def behind(self) -> Iterator[_Node]:
        """Yield this node and all that it was made from."""
        seen: set[int] = set()
        stack = [self]
        while stack:
            node = stack.pop()
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                stack += node.parents


@dataclass
class _Value:
    """A Tensor, and what the model knows of it."""

    tensor: Any
    memory: _Memory
    slopes: Slopes = field(default_factory=dict)
    node: _Node | None = None
    leaf: int | None = None  # its number, if it is a leaf that requires grad
    is_view: bool = False


class GraphLifetimeMachine(RuleBasedStateMachine):
    """Ops, views, backward passes that keep or free, accumulation in `.grad`, writes in place.

    The model carries every derivative forward, beside the value, and so knows any gradient without
    a graph. What it demands of a backward pass: RuntimeError if the graph was freed; the right
    gradients if no input or output of its ops was written to since; one or the other if there was
    such a write. `.grad` of each leaf must be the sum of the passes that succeeded since it was set
    to None, in memory of its own.

    ops: name -> (function of Tensors, function of arrays that returns its partial derivatives),
        acting entry by entry. Add your own.

    >>> from hypothesis import settings
    >>> from hypothesis.stateful import run_state_machine_as_test
    >>> short = settings(max_examples=3, stateful_step_count=5, deadline=None, derandomize=True)
    >>> run_state_machine_as_test(GraphLifetimeMachine, settings=short)
    """

    ops: dict[str, tuple[Callable[..., Any], Callable[..., tuple[Any, ...]]]] = {  # noqa: RUF012
        "multiply": (lambda a, b: a * b, lambda a, b: (b, a)),
        "add": (lambda a, b: a + b, lambda a, b: (1.0, 1.0)),
        "tanh": (lambda a: a.tanh(), lambda a: (1 - np.tanh(a) ** 2,)),
        "sin": (sin, lambda a: (np.cos(a),)),
    }

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        """Make two leaves and a constant."""
        self.values: list[_Value] = []
        self.stale: list[_Value] = []
        self.leaves: list[_Value] = []
        self.grads: Slopes = {}
        self.given: list[tuple[Any, Array]] = []  # cotangents, and what they must still be
        rng = np.random.default_rng(seed)
        constant, *leaves = np.round(rng.uniform(-1.5, 1.5, (3, _SIZE)), 2)
        self._add(Tensor(constant), {}, None)
        for leaf, array in enumerate(leaves):
            slopes = {leaf: (np.ones(_SIZE), np.ones(_SIZE))}
            value = self._add(Tensor(array.copy(), requires_grad=True), slopes, None)
            value.leaf = leaf
            self.leaves.append(value)

    # --- making values ---------------------------------------------------------------------------

    @rule(op=st.integers(0, 63), first=_PICK, second=_PICK)
    def apply(self, op: int, first: int, second: int) -> None:
        """Apply one of the ops to any values, or take a view of one."""
        name = [*sorted(self.ops), "view"][op % (len(self.ops) + 1)]
        if name == "view":
            return self._take_view(self._pick(first))
        function, partials = self.ops[name]
        inputs = [self._pick(first), self._pick(second)][: len(signature(partials).parameters)]
        arrays = [v.memory.values.copy() for v in inputs]
        result = function(*[v.tensor for v in inputs])
        if np.abs(result.numpy()).max() > _MAX_VALUE:
            return None
        slopes = _chained(inputs, partials(*arrays))
        made = self._add(result, slopes, self._node(inputs, [v.memory for v in inputs]))
        if made.node is not None:
            made.node.kept.append((made.memory, 0))
        return None

    def _take_view(self, base: _Value) -> None:
        view = self._add(base.tensor[:], dict(base.slopes), self._node([base], []))
        view.memory, view.is_view = base.memory, True

    # --- passes ----------------------------------------------------------------------------------

    @rule(
        pick=_PICK, passes=st.lists(st.booleans(), min_size=1, max_size=3), anything=st.booleans()
    )
    def backward(self, pick: int, passes: list[bool], anything: bool) -> None:
        """Run backward passes from one value, each keeping the graph (True) or not.

        The value is the result of a recorded op, or `anything`: a leaf, a constant.
        """
        made = [v for v in self.values if v.node is not None]
        value = self._pick(pick) if anything or not made else made[-1 - pick % len(made)]
        for retain in passes:
            self._backward(value, retain)

    def _backward(self, value: _Value, retain: bool) -> None:
        rng = np.random.default_rng(len(self.given))
        cotangent = rng.uniform(0.5, 1.5, _SIZE) * rng.choice((-1.0, 1.0), _SIZE)
        given = Tensor(cotangent.copy())
        nodes = list(value.node.behind()) if value.node is not None else []
        freed = any(n.freed for n in nodes)
        written = any(memory.writes != seen for n in nodes for memory, seen in n.kept)
        doubtful = written or any(n.doubtful for n in nodes)
        try:
            value.tensor.backward(given, retain_graph=retain)
        except RuntimeError as error:
            if value.slopes and not (freed or doubtful):
                raise GradCheckError(
                    f"backward raised although nothing had changed: {error}"
                ) from error
            for n in nodes:
                n.doubtful = n.doubtful or not retain
            return
        if not value.slopes:
            raise GradCheckError("backward from a value that requires no grad did not raise")
        if freed:
            raise GradCheckError("backward through a graph that was freed did not raise")
        self.given.append((given, cotangent))
        for leaf, (slope, size) in value.slopes.items():
            old, old_size = self.grads.get(leaf, (0.0, 0.0))
            term = slope * cotangent
            self.grads[leaf] = old + term, old_size + size * np.abs(cotangent)
        for n in nodes:
            n.freed = not retain

    @precondition(lambda self: self.grads)
    @rule(pick=_PICK, to_none=st.booleans())
    def change_grad(self, pick: int, to_none: bool) -> None:
        """Set the `.grad` of a leaf to None, or write into it: it must own its memory."""
        leaf = sorted(self.grads)[pick % len(self.grads)]
        if to_none:
            self.leaves[leaf].tensor.grad = None
            del self.grads[leaf]
        else:
            self.leaves[leaf].tensor.grad[...] = 0.25
            self.grads[leaf] = np.full(_SIZE, 0.25), np.full(_SIZE, 0.25)

    # --- writes ----------------------------------------------------------------------------------

    @rule(into=_PICK, source=_PICK, how=st.sampled_from(["+=", "*=", "[1:] ="]))
    def write(self, into: int, source: int, how: str) -> None:
        """Write into a Tensor in place, which is recorded if either requires grad."""
        t, s = self._pick(into), self._pick(source)
        if how == "[1:] =" and s.memory is t.memory:
            return
        before, other = t.memory.values.copy(), s.memory.values.copy()
        recorded = bool(t.slopes or s.slopes)
        after, partials = {
            "+=": (before + other, (1.0, 1.0)),
            "*=": (before * other, (other, before)),
            "[1:] =": (np.r_[before[:1], other[1:]], (_FIRST, 1 - _FIRST)),
        }[how]
        if np.abs(after).max() > _MAX_VALUE:
            return
        refused = recorded and (t.leaf is not None or t.is_view)
        slopes = _chained([t, s], partials)
        kept = []
        if how == "*=":
            # The old value is what the rule for the other factor needs, and it is gone.
            kept = [s.memory, t.memory] if s.slopes else [s.memory]
        node = self._node([t, s], kept)
        try:
            _write(t.tensor, s.tensor, how)
        except RuntimeError as error:
            if not refused:
                raise GradCheckError(f"a write in place ({how}) was refused: {error}") from error
            return
        if refused:
            kind = "a leaf that requires grad" if t.leaf is not None else "a view"
            raise GradCheckError(f"a recorded write in place ({how}) to {kind} did not raise")
        t.memory.values[:] = after
        t.memory.writes += 1
        if recorded:
            t.slopes, t.node = slopes, node
            # What other Tensors of this memory know of its history is out of date.
            twins = [v for v in self.values if v.memory is t.memory and v is not t]
            self.stale += twins
            self.values = [v for v in self.values if not any(v is w for w in twins)]

    @rule(into=_PICK, through_a_view=st.booleans(), then=_PICK)
    def write_unrecorded(self, into: int, through_a_view: bool, then: int) -> None:
        """Write under no_grad, as optimizers do; then run a pass that may need the old values."""
        t = self._pick(into)
        with no_grad():
            target = t.tensor[:] if through_a_view else t.tensor
            target[...] = 0.75
        t.memory.values[:] = 0.75
        t.memory.writes += 1
        made = [v for v in self.values if v.node is not None]
        if made:
            self._backward(made[-1 - then % len(made)], True)

    @precondition(lambda self: self.stale)
    @rule(pick=_PICK)
    def use_stale_view(self, pick: int) -> None:
        """Use a view whose base was assigned something that it knows nothing of: it must raise."""
        stale = self.stale[pick % len(self.stale)]
        if not stale.is_view:
            return
        try:
            stale.tensor * 2.0
        except RuntimeError:
            return
        raise GradCheckError("a view from before a recorded write to its base was used silently")

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def gradients_and_values_are_those_of_the_model(self) -> None:
        """Raise GradCheckError unless every value and every `.grad` is as it must be."""
        for value in getattr(self, "values", ()):
            found = value.tensor.numpy()
            if not np.allclose(found, value.memory.values, rtol=1e-13, atol=1e-13):
                raise GradCheckError(f"a value is {found}, expected {value.memory.values}")
        for given, cotangent in getattr(self, "given", ()):
            if not np.array_equal(given.numpy(), cotangent):
                raise GradCheckError("a cotangent that was given to backward was changed")
        for leaf, value in enumerate(getattr(self, "leaves", ())):
            found = value.tensor.grad
            if (found is None) != (leaf not in self.grads):
                raise GradCheckError(f".grad of leaf {leaf} is {found}, expected {self.grads}")
            if found is not None:
                want, size = self.grads[leaf]
                # A thousand units of the terms' sizes: a few dozen operations made them.
                if not np.all(np.abs(found.numpy() - want) <= 1e-13 * (1 + size)):
                    raise GradCheckError(
                        f".grad of leaf {leaf} is {found.numpy()}, expected {want}, the sum of the "
                        f"passes since it was set to None"
                    )

    # --- inside ----------------------------------------------------------------------------------

    def _pick(self, pick: int) -> _Value:
        return self.values[-1 - pick % len(self.values)]

    def _add(self, tensor: Any, slopes: Slopes, node: _Node | None) -> _Value:
        value = _Value(tensor, _Memory(tensor.numpy().copy()), slopes, node if slopes else None)
        self.values.append(value)
        return value

    def _node(self, inputs: list[_Value], kept: list[_Memory]) -> _Node:
        parents = [v.node for v in inputs if v.node is not None]
        return _Node(parents, [(memory, memory.writes) for memory in kept])


_FIRST = np.array([1.0, 0.0, 0.0])


def _chained(inputs: list[_Value], partials: tuple[Any, ...]) -> Slopes:
    """Return the slopes of a result, by the chain rule."""
    result: Slopes = {}
    for value, partial in zip(inputs, partials, strict=True):
        for leaf, (slope, size) in value.slopes.items():
            old, old_size = result.get(leaf, (np.zeros(_SIZE), np.zeros(_SIZE)))
            result[leaf] = old + partial * slope, old_size + np.abs(partial) * size
    return result


def _write(tensor: Any, source: Any, how: str) -> None:
    if how == "+=":
        tensor += source
    elif how == "*=":
        tensor *= source
    else:
        tensor[1:] = source[1:]
