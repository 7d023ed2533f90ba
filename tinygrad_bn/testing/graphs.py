"""Whole graphs of ops as plain data, and what their gradients must be.

The reference walks every path by itself: the gradient of a value is the sum, over all paths from
the outputs to it, of the cotangent carried along that path. Nothing is gathered on the way, so
nothing of the engine's bookkeeping (order, fan-out, broadcasting, pruning, unused outputs) can be
wrong in the same manner. The ops' own rules are trusted there; directional differences, which trust
nothing, come last. A graph that fails before them has found a fault of the engine, one that fails
in them a wrong rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinygrad_bn.autograd import grad
from tinygrad_bn.grad_mode import enable_grad
from tinygrad_bn.op import Op
from tinygrad_bn.ops.elementwise import cos, sin
from tinygrad_bn.tape import Output
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.gradients import check_grad
from tinygrad_bn.testing.noise import rounding_tolerance, spread
from tinygrad_bn.testing.report import Report


@dataclass(frozen=True)
class Leaf:
    """A value that is given. free: whether gradients flow to it (floating ones only)."""

    array: np.ndarray
    free: bool = True


@dataclass(frozen=True)
class Step:
    """An op applied to earlier values, by number (None: an optional input left out)."""

    op: Op
    inputs: tuple[int | None, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One output of an earlier step that has several."""

    of: int
    index: int


@dataclass(frozen=True, repr=False)
class Graph:
    """A program: value i is what `nodes[i]` says, made of earlier values only.

    outputs: the values that are differentiated; one may appear twice, and leaves may.
    cotangents: one per output, of its shape.

    `repr` is the program as code. `graph.fn` is it as a function of its free leaves,
    `graph.arrays`, for any checker.

    >>> from tinygrad_bn.op import REGISTRY
    >>> x = Leaf(np.array([1.0, 2.0]))
    >>> graph = Graph((x, Step(REGISTRY["multiply"], (0, 0))), (1,), (np.ones(2),))
    >>> graph
    v0 = Tensor(array([1., 2.]), requires_grad=True)
    v1 = multiply(v0, v0)
    outputs v1 with cotangents array([1., 1.])
    >>> graph.fn(*graph.arrays)
    (array([1., 4.]),)
    """

    nodes: tuple[Leaf | Step | Part, ...]
    outputs: tuple[int, ...]
    cotangents: tuple[np.ndarray, ...]

    @property
    def free(self) -> tuple[int, ...]:
        """The numbers of the leaves that gradients flow to."""
        return tuple(i for i, n in enumerate(self.nodes) if isinstance(n, Leaf) and n.free)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays of the free leaves."""
        return tuple(node.array for node in self.nodes if isinstance(node, Leaf) and node.free)

    @property
    def fn(self) -> Callable[..., tuple[Any, ...]]:
        """The graph as a function of its free leaves, arrays or Tensors."""

        def graph(*leaves: Any) -> tuple[Any, ...]:
            values = evaluate(self, leaves)
            return tuple(values[i] for i in self.outputs)

        return graph

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what Hypothesis prints by

    def __repr__(self) -> str:
        lines = [f"v{i} = {_as_code(node)}" for i, node in enumerate(self.nodes)]
        outputs = ", ".join(f"v{i}" for i in self.outputs)
        lines.append(f"outputs {outputs} with cotangents {', '.join(map(_flat, self.cotangents))}")
        return "\n".join(lines)


def evaluate(graph: Graph, leaves: Sequence[Any]) -> list[Any]:
    """Return all values of a graph for these free leaves: arrays for arrays, Tensors for Tensors.

    A value made by a step with several outputs is the tuple of them.
    """
    given = iter(leaves)
    wrap = Tensor if any(isinstance(leaf, Tensor) for leaf in leaves) else np.asarray
    values: list[Any] = []
    for node in graph.nodes:
        if isinstance(node, Leaf):
            values.append(next(given) if node.free else wrap(node.array))
        elif isinstance(node, Part):
            values.append(values[node.of][node.index])
        else:
            inputs = [None if i is None else values[i] for i in node.inputs]
            values.append(node.op(*inputs, **node.options))
    return values


def gradients_by_paths(
    graph: Graph, leaves: Sequence[Any] | None = None, cotangents: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """Return the gradient of every value (zeros where no path leads), path by path.

    leaves, cotangents: in place of the graph's own. The time grows with the number of paths.

    >>> from tinygrad_bn.op import REGISTRY
    >>> nodes = (Leaf(np.array([3.0])), Step(REGISTRY["multiply"], (0, 0)))
    >>> gradients_by_paths(Graph(nodes, (1,), (np.array([1.0]),)))
    [array([6.]), array([1.])]
    """
    leaves = graph.arrays if leaves is None else leaves
    cotangents = graph.cotangents if cotangents is None else cotangents
    values = evaluate(graph, leaves)
    totals = [np.zeros(np.shape(v)) for v in values]

    def follow(i: int, g: np.ndarray) -> None:
        totals[i] = totals[i] + g
        for source, h in _one_step_back(graph, values, i, g):
            follow(source, h)

    with enable_grad(), np.errstate(all="ignore"):
        for i, g in zip(graph.outputs, cotangents, strict=True):
            follow(i, np.asarray(g))
    return totals


def _one_step_back(
    graph: Graph, values: Sequence[Any], i: int, g: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the values that value `i` was made from, each with its share of the cotangent `g`."""
    node = graph.nodes[i]
    if isinstance(node, Leaf):
        return
    cotangent: Any = g
    if isinstance(node, Part):
        cotangent = tuple(
            g if k == node.index else np.zeros(v.shape) for k, v in enumerate(values[node.of])
        )
        node = graph.nodes[node.of]
    assert isinstance(node, Step)
    inputs: list[Any] = [None if k is None else values[k] for k in node.inputs]
    inputs = [
        Tensor(a, requires_grad=True) if a is not None and a.dtype.kind == "f" else a
        for a in inputs
    ]
    out = node.op(*inputs, **node.options)
    place = (out[0] if isinstance(out, tuple) else out).node
    if place is None:
        return
    recorded = place.parents[0] if isinstance(place, Output) else place
    # The op's rule and nothing else: the engine's walk is what is being checked.
    shares = node.op.pull_back(recorded, cotangent, None, False)
    for k, h in shares:
        source, tensor = node.inputs[k], inputs[k]
        if source is not None:
            yield source, _summed_to(np.asarray(h), tensor.shape)


def _summed_to(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return g summed, one axis at a time, over the axes along which `shape` was broadcast."""
    while g.ndim > len(shape):
        g = g.sum(axis=0)
    for axis, size in enumerate(shape):
        if size == 1 and g.shape[axis] != 1:
            g = g.sum(axis=axis, keepdims=True)
    return g


def check_graph(graph: Graph, *, seed: int = 0) -> Report:
    """Return a report that the library evaluates and differentiates `graph` rightly.

    The values are those of the same ops on raw arrays, to the bit. The gradients, by `grad` of all
    outputs together, of one leaf alone, of interior values and under `create_graph`, and by
    `backward` from one output after the other, are `gradients_by_paths`, up to rounding as measured
    at these values. And they agree with directional differences (by `check_grad`, whose `seed` it
    is).

    Raises GradCheckError with the program in it, and `Inconclusive` where `check_grad` does.

    >>> from tinygrad_bn.op import REGISTRY
    >>> nodes = (Leaf(np.array([3.0, 1.0])), Step(REGISTRY["multiply"], (0, 0)))
    >>> print(check_graph(Graph(nodes, (1,), (np.array([1.0, -0.5]),))).notes[0])
    5 ways to the gradients agree with the sum over paths
    """
    plain = evaluate(graph, graph.arrays)
    wrapped = evaluate(graph, _tensors(graph))
    for i, (a, b) in enumerate(zip(plain, wrapped, strict=True)):
        same = isinstance(a, tuple) or np.array_equal(np.asarray(a), _raw(b), equal_nan=True)
        if not same:
            raise GradCheckError(
                f"check_graph: v{i} on Tensors is {_flat(_raw(b))}, on raw arrays {_flat(a)}, in\n"
                f"{graph!r}"
            )
    want = gradients_by_paths(graph)
    for way in _WAYS:
        for i, got in way(graph).items():
            _require_equal(graph, way.__name__.strip("_").replace("_", " "), i, got, want[i])
    check_grad(graph.fn, *graph.arrays, directions=1, seed=seed)
    notes = (f"{len(_WAYS)} ways to the gradients agree with the sum over paths",)
    return Report("check_graph", "graph", notes=notes)


# --- ways to the gradients: each returns them by the number of the value -------------------------


def _grad_of_everything_together(graph: Graph, create_graph: bool = False) -> dict[int, Any]:
    values = evaluate(graph, _tensors(graph))
    outputs, cotangents = _live(graph, values)
    wanted = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
    if create_graph:
        wanted = list(graph.free)
    if not outputs:
        return {}
    found = grad(
        outputs,
        [values[i] for i in wanted],
        cotangents,
        create_graph=create_graph,
        allow_unused=True,
    )
    return dict(zip(wanted, found, strict=True))


def _grad_under_create_graph(graph: Graph) -> dict[int, Any]:
    return _grad_of_everything_together(graph, create_graph=True)


def _grad_of_one_leaf_at_a_time(graph: Graph) -> dict[int, Any]:
    values = evaluate(graph, _tensors(graph))
    outputs, cotangents = _live(graph, values)
    if not outputs:
        return {}
    return {
        i: grad(outputs, values[i], cotangents, retain_graph=True, allow_unused=True)[0]
        for i in graph.free
    }


def _backward_from_each_output(graph: Graph) -> dict[int, Any]:
    values = evaluate(graph, _tensors(graph))
    outputs, cotangents = _live(graph, values)
    for k, (output, g) in enumerate(zip(outputs, cotangents, strict=True), 1):
        output.backward(g, retain_graph=k < len(outputs))
    return {i: values[i].grad for i in graph.free}


def _backward_with_interior_gradients_kept(graph: Graph) -> dict[int, Any]:
    values = evaluate(graph, _tensors(graph))
    outputs, cotangents = _live(graph, values)
    kept = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
    for i in kept:
        values[i].retain_grad()
    for output, g in zip(outputs, cotangents, strict=True):
        output.backward(g, retain_graph=True)
    # Two values may be one Tensor only where a step returned its input; then both have its grad.
    return {i: values[i].grad for i in kept}


_WAYS = (
    _grad_of_everything_together,
    _grad_of_one_leaf_at_a_time,
    _grad_under_create_graph,
    _backward_from_each_output,
    _backward_with_interior_gradients_kept,
)


def _tensors(graph: Graph) -> list[Tensor]:
    return [Tensor(a.copy(), requires_grad=True) for a in graph.arrays]


def _live(graph: Graph, values: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """Return the outputs that a free leaf leads to, and their cotangents."""
    pairs = [(values[i], g) for i, g in zip(graph.outputs, graph.cotangents, strict=True)]
    live = [(v, Tensor(g.copy())) for v, g in pairs if isinstance(v, Tensor) and v.requires_grad]
    return [v for v, _ in live], [g for _, g in live]


def _require_equal(graph: Graph, way: str, i: int, got: Any, want: np.ndarray) -> None:
    found = np.zeros(want.shape) if got is None else _raw(got)
    if found.shape != want.shape:
        problem = f"has shape {found.shape}, expected {want.shape}"
    else:
        error = np.abs(found - want)
        if np.all(error <= rounding_tolerance(want, 0.0)):
            return
        count = len(graph.arrays)

        def by_paths(nudged: Sequence[Any]) -> list[np.ndarray]:
            return [gradients_by_paths(graph, nudged[:count], nudged[count:])[i]]

        (moved,) = spread(by_paths, [*graph.arrays, *graph.cotangents], [want])
        if np.all(error <= rounding_tolerance(want, moved)):
            return
        problem = f"is {_flat(found)}, expected {_flat(want)}, the sum over all paths"
    raise GradCheckError(f"check_graph: the gradient of v{i} by {way} {problem}, in\n{graph!r}")


def _raw(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _flat(array: Any) -> str:
    return " ".join(repr(np.asarray(array)).split())


def _as_code(node: Leaf | Step | Part) -> str:
    if isinstance(node, Leaf):
        return (
            f"Tensor({_flat(node.array)}, requires_grad=True)" if node.free else _flat(node.array)
        )
    if isinstance(node, Part):
        return f"v{node.of}[{node.index}]"
    inputs = ["None" if i is None else f"v{i}" for i in node.inputs]
    options = [f"{name}={value!r}" for name, value in node.options.items()]
    return f"{node.op.name}({', '.join([*inputs, *options])})"


def _sin_cos(x: Any) -> tuple[Any, Any]:
    return np.sin(x), np.cos(x)


#: An op with two outputs, since none of the library's has: (sin x, cos x). It is not registered.
SIN_COS = Op(_sin_cos, "sin_cos")
SIN_COS.def_vjp(lambda g, x: (g[0] * cos(x) - g[1] * sin(x),))
