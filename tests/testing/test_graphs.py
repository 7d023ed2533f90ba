"""Graphs are what they say, and checking one finds faults that are planted in the engine."""

from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import Phase, find, given, reject, settings

from tests.testing.planted import made
from tinygrad_bn import autograd
from tinygrad_bn.domain import elementwise
from tinygrad_bn.op import REGISTRY, Op
from tinygrad_bn.tape import Output, TensorBase
from tinygrad_bn.testing import GradCheckError, Inconclusive
from tinygrad_bn.testing import graphs as testing_graphs
from tinygrad_bn.testing.graphs import (
    SIN_COS,
    Graph,
    Leaf,
    Part,
    Step,
    check_graph,
    evaluate,
    gradients_by_paths,
)
from tinygrad_bn.testing.strategies.op_graphs import graphs

#: The same graphs in every run: whether a planted fault is found must not be a matter of luck.
FIXED = settings(max_examples=200, derandomize=True, database=None, deadline=None)


def checked(graph):
    try:
        check_graph(graph)
    except Inconclusive:
        reject()


@given(graphs())
def test_the_library_differentiates_drawn_graphs_rightly(graph):
    checked(graph)


# --- what is drawn -------------------------------------------------------------------------------


def steps_of(graph):
    return [node for node in graph.nodes if isinstance(node, Step)]


def traits(graph):
    """Yield what a graph has that an engine may stumble over."""
    uses = Counter(i for step in steps_of(graph) for i in step.inputs)
    uses.update(node.of for node in graph.nodes if isinstance(node, Part))
    values = evaluate(graph, graph.arrays)
    if any(len(set(step.inputs)) < len(step.inputs) for step in steps_of(graph)):
        yield "one value twice in one step"
    if any(n > 1 for n in uses.values()):
        yield "fan-out"
    if any(step.op.view for step in steps_of(graph)):
        yield "views"
    if any(i not in uses and i not in graph.outputs for i in range(len(graph.nodes))):
        yield "unused branch"
    if len(set(graph.outputs)) > 1:
        yield "several outputs"
    if len(set(graph.outputs)) < len(graph.outputs):
        yield "an output twice"
    if any(i in uses for i in graph.outputs):
        yield "an output that is used again"
    if any(isinstance(node, Leaf) and not node.free for node in graph.nodes):
        yield "constants"
    if any(isinstance(value, tuple) for value in values):
        yield "a step with several outputs"
    for step in steps_of(graph):
        shapes = [np.shape(values[i]) for i in step.inputs if i is not None]
        if not step.op.domain or step.op.domain.cases or len(set(shapes)) < 2:
            continue
        yield "broadcasting"
        return


def test_graphs_have_everything_that_an_engine_may_stumble_over():
    seen, ops = Counter(), Counter()

    @settings(FIXED, max_examples=600)
    @given(graphs())
    def run(graph):
        seen.update(traits(graph))
        ops.update({step.op.name for step in steps_of(graph)})
        seen["all"] += 1

    run()
    rare = {trait: n for trait, n in seen.items() if n < 0.03 * seen["all"]}
    assert len(seen) == 11, seen
    assert rare == {}
    differentiable = {
        name
        for name, op in REGISTRY.items()
        if op.differentiable and op.domain and op.__module__.startswith("tinygrad_bn.")
    }
    # There are some sixty, and those that broadcast come four times as often as the rest.
    missing = differentiable - set(ops)
    assert len(missing) <= 3, (missing, len(differentiable))


@given(graphs())
def test_every_leaf_is_an_array(graph):
    # NumPy's scalars take other loops: their powers differ from those of arrays in the last bit.
    assert {type(node.array) for node in graph.nodes if isinstance(node, Leaf)} == {np.ndarray}


def test_graphs_of_a_users_op():
    def cube(x):
        return x * x * x

    op = Op(cube, "cube", elementwise())
    op.def_vjp(x=lambda g, x: 3 * g * x * x)

    @settings(FIXED, max_examples=20)
    @given(graphs(ops=[op, "add"]))
    def run(graph):
        assert {step.op.name for step in steps_of(graph)} <= {
            *("cube", "add", "reshape", "getitem", "broadcast_to")
        }
        checked(graph)

    run()


def test_op_without_a_domain_is_refused():
    with pytest.raises(ValueError, match="has no sample domain"):
        find(graphs(ops=[made(lambda x: x, x=lambda g: g)]), lambda graph: True)


# --- the reference -------------------------------------------------------------------------------


def test_gradient_by_paths_is_the_one_worked_out_by_hand():
    x = np.array([0.3, -0.7])
    nodes = (
        Leaf(x),
        Step(SIN_COS, (0,)),
        Part(1, 0),
        Part(1, 1),
        Step(REGISTRY["multiply"], (2, 2)),
        Step(REGISTRY["broadcast_to"], (4,), {"shape": (3, 2)}),
    )
    g = np.arange(6.0).reshape(3, 2)
    graph = Graph(nodes, (5, 3), (g, np.array([1.0, 2.0])))
    by_hand = 2 * np.sin(x) * np.cos(x) * g.sum(axis=0) - np.sin(x) * np.array([1.0, 2.0])
    assert gradients_by_paths(graph)[0] == pytest.approx(by_hand, rel=1e-14)
    check_graph(graph)


def test_message_has_the_program_in_it(monkeypatch):
    monkeypatch.setattr(autograd, "_add", overwriting)
    nodes = (Leaf(np.array([3.0, 1.0])), Step(REGISTRY["multiply"], (0, 0)))
    with pytest.raises(GradCheckError) as caught:
        check_graph(Graph(nodes, (1,), (np.array([1.0, -0.5]),)))
    message = str(caught.value)
    assert "the gradient of v0 by grad of everything together is" in message
    assert "expected array([ 6., -1.]), the sum over all paths" in message
    assert "v1 = multiply(v0, v0)" in message


# --- planted faults ------------------------------------------------------------------------------


def overwriting(pending, place, g, source=None):
    """`_add` that forgets what had reached a place before."""
    _add({}, place, g, source)
    pending[place] = autograd.sum_to_shape(g, place.shape)


_add = autograd._add
_newest_first = autograd.newest_first
_complete = autograd._complete
_leading_to = autograd.leading_to


def fan_out_overwritten(monkeypatch):
    monkeypatch.setattr(autograd, "_add", overwriting)


def visited_breadth_first(monkeypatch):
    """A stale order: by distance from the output, so that a node may be visited too early."""

    def order(places):
        queue = list(dict.fromkeys(p for p in places if not isinstance(p, TensorBase)))
        for node in queue:
            for parent in node.parents:
                if not (parent is None or isinstance(parent, TensorBase) or parent in queue):
                    queue.append(parent)
        return queue

    monkeypatch.setattr(autograd, "newest_first", order)


def unused_output_given_ones(monkeypatch):
    def complete(node, filed, create_graph):
        filled = _complete(node, filed, create_graph)
        return tuple(z + 1 if g is None else z for g, z in zip(filed, filled, strict=True))

    monkeypatch.setattr(autograd, "_complete", complete)


def broadcast_not_summed(monkeypatch):
    def first(g, shape):
        for _ in range(g.ndim - len(shape)):
            g = g[0]
        index = tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)
        return g[index]

    monkeypatch.setattr(autograd, "sum_to_shape", first)


def leading_axes_alone_summed(monkeypatch):
    def partly(g, shape):
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
        return g[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)]

    monkeypatch.setattr(autograd, "sum_to_shape", partly)


def pruned_too_far(monkeypatch):
    """Only what is one or two steps from a target counts as leading to it."""

    def leading(order, targets):
        near = set(targets)
        for _ in range(2):
            near |= {n for n in order if any(p in near for p in n.parents if p is not None)}
        return near

    monkeypatch.setattr(autograd, "leading_to", leading)


def second_root_lost(monkeypatch):
    def walk(roots, *rest):
        return _walk(list({place: (place, g) for place, g in roots}.values()), *rest)

    _walk = autograd._walk
    monkeypatch.setattr(autograd, "_walk", walk)


def parts_mixed_up(monkeypatch):
    """Cotangents of a step's outputs filed under the wrong index."""
    index = Output.index
    monkeypatch.setattr(
        Output,
        "index",
        property(
            lambda self: len(self.parents[0].shape) - 1 - index.__get__(self),
            lambda self, value: index.__set__(self, value),
        ),
    )


def accumulation_lost(monkeypatch):
    """`.grad` set by each pass, not added to."""

    def backward(output, *args, **options):
        for place in [output.node, *_newest_first([output.node])] if output.node else []:
            for parent in place.parents:
                if isinstance(parent, TensorBase):
                    parent.grad = None
        return _backward(output, *args, **options)

    _backward = autograd.backward
    monkeypatch.setattr(autograd, "backward", backward)


PLANTED = [
    fan_out_overwritten,
    visited_breadth_first,
    unused_output_given_ones,
    broadcast_not_summed,
    leading_axes_alone_summed,
    pruned_too_far,
    second_root_lost,
    parts_mixed_up,
    accumulation_lost,
]


def is_found_wrong(graph):
    try:
        check_graph(graph)
    except Inconclusive:
        return False
    except GradCheckError:
        return True
    return False


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_of_the_engine_is_found(plant, monkeypatch):
    plant(monkeypatch)
    find(
        graphs(),
        is_found_wrong,
        settings=settings(FIXED, max_examples=500, phases=[Phase.generate]),
    )


def test_a_planted_fault_shrinks_to_the_steps_that_show_it(monkeypatch):
    fan_out_overwritten(monkeypatch)
    # The engine's faults show before the differences, which take half of the time.
    monkeypatch.setattr(testing_graphs, "check_grad", lambda *args, **options: None)
    graph = find(graphs(ops=["multiply", "exp"], max_steps=5), is_found_wrong, settings=FIXED)
    # A single step would do; the shrinker may stop at a second one.
    assert len(steps_of(graph)) <= 2, graph


def test_a_wrong_rule_is_found_by_the_differences():
    def tripled(x):
        return x * 3.0

    op = Op(tripled, "tripled", elementwise())
    op.def_vjp(x=lambda g: g * 2.0)
    with pytest.raises(GradCheckError, match="check_grad: graph"), suppress(Inconclusive):
        check_graph(Graph((Leaf(np.ones(2)), Step(op, (0,))), (1,), (np.array([1.0, -0.5]),)))
