"""The tape's memory: depth costs no recursion, saved arrays go, gradients own what they hold."""

import gc
import itertools
import weakref

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.ops.elementwise import add, exp
from tinygrad_bn.ops.shape import broadcast_to, concatenate, to_device

DEPTH = 100_000

pytestmark = pytest.mark.usefixtures("own_ops")


@pytest.fixture
def no_gc():
    """Only reference counts free memory during the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def leaf(*values):
    return tg.tensor(np.array(values, "float64"), requires_grad=True)


# --- depth ------------------------------------------------------------------------------------


def _added_in_place(x):
    y = x * 1
    for _ in range(DEPTH):
        y += x
    return y


def _chain(step):
    def build(x):
        y = x
        for _ in range(DEPTH):
            y = step(y, x)
        return y

    return build


CHAINS = {
    "add": (_chain(lambda y, x: y + x), DEPTH + 1),
    "multiply": (_chain(lambda y, x: y * 1.0), 1),
    "in place": (_added_in_place, DEPTH + 1),
    "views": (_chain(lambda y, x: y.reshape(1)), 1),
}


@pytest.mark.parametrize(("build", "expected"), CHAINS.values(), ids=CHAINS.keys())
def test_a_chain_of_100_000_ops_does_not_recurse(build, expected):
    x = leaf(1.0)
    build(x).backward()
    assert x.grad.item() == expected


def test_a_chain_of_100_000_ops_that_was_never_walked_is_deallocated(no_gc):
    x = leaf(1.0)
    y = x * 1
    first = weakref.ref(y.node)
    for _ in range(DEPTH):
        y = y + x
    del y
    assert first() is None


def test_a_deep_chain_has_a_second_derivative():
    x = leaf(1.0)
    y = x * x
    for _ in range(20_000):
        y = y * 1.0
    (first,) = tg.grad(y, x, create_graph=True)
    (second,) = tg.grad(first, x)
    assert second.item() == 2.0


# --- what is freed ----------------------------------------------------------------------------


def _inner(x):
    """Return a result, and a weak reference to an array inside that its graph saved."""
    y = exp(x)
    return (y * y).sum(), weakref.ref(y.data)


def test_saved_arrays_are_freed_by_backward(no_gc):
    x = leaf(1.0, 2.0)
    result, saved = _inner(x)
    assert saved() is not None
    result.backward()
    assert saved() is None


def test_saved_arrays_survive_retain_graph_and_go_with_the_result(no_gc):
    result, saved = _inner(leaf(1.0, 2.0))
    result.backward(retain_graph=True)
    assert saved() is not None
    del result
    assert saved() is None


def test_grad_frees_what_it_walked(no_gc):
    x = leaf(1.0, 2.0)
    result, saved = _inner(x)
    tg.grad(result, x)
    assert saved() is None


def test_nothing_is_saved_under_no_grad(no_gc):
    x = leaf(1.0, 2.0)
    with tg.no_grad():
        result, saved = _inner(x)
    assert saved() is None
    assert result.node is None


def _writes(x):
    y = x * 1
    y[0] = x[1]
    y += x
    return y


GRAPHS = {
    "saves its output": exp,
    "saves inputs": lambda x: x * x / (x + 3),
    "in place": _writes,
    "a view": lambda x: (x * 1)[:1].reshape(1, 1).T,
    "variadic": lambda x: concatenate(x, exp(x)),
    "a second derivative": lambda x: tg.grad((x * x * x).sum(), x, create_graph=True)[0],
}


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS.keys())
@pytest.mark.parametrize("walked", [False, True])
def test_a_graph_has_no_reference_cycle(no_gc, build, walked):
    x = leaf(1.0, 2.0)
    y = build(x)
    y.retain_grad()
    references = [weakref.ref(y), weakref.ref(y.node), weakref.ref(y.data)]
    if walked:
        y.sum().backward(retain_graph=True)
    del y
    assert [reference() for reference in references] == [None] * 3


def test_several_outputs_make_no_reference_cycle(no_gc):
    @tg.op
    def twice(x):
        return x + 1, x + 2

    @twice.def_vjp
    def _(g, out):
        return (g[0] * out[0] + g[1] * out[1],)

    a, b = twice(leaf(1.0))
    tg.grad(a * b, a, retain_graph=True)
    references = [weakref.ref(a.node), weakref.ref(b.node), weakref.ref(a.node.parents[0])]
    del a, b
    assert [reference() for reference in references] == [None] * 3


def test_a_failed_backward_leaves_no_gradient_behind():
    x = leaf(1.0, 2.0)
    y = exp(x)
    z = (y * 2 + x).sum()
    with tg.no_grad():
        y += 1
    with pytest.raises(RuntimeError, match="'exp'"):
        z.backward()
    assert x.grad is None


# --- whose memory a gradient is ---------------------------------------------------------------

PASSING = {
    "both inputs of add": lambda x, y: add(x, y),
    "reshape": lambda x, y: x.reshape(2, 2) + y.reshape(2, 2),
    "transpose": lambda x, y: x.reshape(2, 2).T + y.reshape(2, 2),
    "halves": lambda x, y: concatenate(x, y),
    "broadcast": lambda x, y: broadcast_to(x, shape=(3, 4)) + y,
    "sum": lambda x, y: x.sum() + y.sum(),
    "moved to where it is": lambda x, y: to_device(x, device="cpu") + y,
    "copied and cast": lambda x, y: x.copy() + y.astype("float64"),
    "x itself": lambda x, y: x[:] + y[...],
}


@pytest.mark.parametrize("build", PASSING.values(), ids=PASSING.keys())
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_own_writable_memory(build, create_graph):
    x, y = leaf(1.0, 2.0, 3.0, 4.0), leaf(5.0, 6.0, 7.0, 8.0)
    out = build(x, y)
    cotangent = tg.Tensor(np.ones(out.shape))
    kept = cotangent.numpy().copy()
    returned = tg.grad(out, [x, y, x], cotangent, create_graph=create_graph, retain_graph=True)
    out.backward(cotangent, create_graph=create_graph)
    tensors = [*returned, x.grad, y.grad, x, y, cotangent]
    for a, b in itertools.combinations(tensors, 2):
        assert not np.shares_memory(a.numpy(), b.numpy())
    for tensor in (*returned, x.grad, y.grad):
        assert tensor.numpy().flags.writeable
        tensor.numpy()[...] = -1
    np.testing.assert_array_equal(cotangent.numpy(), kept)


def test_a_rule_that_returns_a_saved_array_does_not_give_it_away():
    @tg.op
    def dot(x, w):
        return (x * w).sum()

    dot.def_vjp(x=lambda g, w: w, w=lambda g, x: x)  # right only where g is 1
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    dot(x, w).backward()
    assert x.grad.tolist() == [3.0, 4.0]
    assert not np.shares_memory(x.grad.numpy(), w.numpy())
    assert not np.shares_memory(w.grad.numpy(), x.numpy())


def test_an_array_that_a_rule_made_for_the_gradient_becomes_the_gradient():
    @tg.op
    def twice(x):
        return 2 * x

    made = []

    @twice.def_vjp
    def _(g):
        gx = 2 * g
        made.append(gx.__array_interface__["data"])
        return (gx,)

    x = leaf(1.0, 2.0)
    twice(x).sum().backward()
    assert x.grad.data.__array_interface__["data"] == made[0]
    (returned,) = tg.grad(twice(x).sum(), x)
    assert returned.data.__array_interface__["data"] == made[1]


def test_gradients_of_a_leaf_that_is_the_output_itself_are_copies():
    x = leaf(1.0, 2.0)
    cotangent = np.ones(2)
    x.backward(cotangent)
    assert not np.shares_memory(x.grad.numpy(), cotangent)


def test_accumulating_writes_into_the_same_memory():
    x = leaf(1.0, 2.0)
    x.sum().backward()
    memory = x.grad.data
    x.sum().backward()
    assert x.grad.data is memory
    assert x.grad.tolist() == [2.0, 2.0]


def test_a_retained_gradient_is_no_alias_of_a_leafs():
    x = leaf(1.0, 2.0)
    y = x + 0
    y.retain_grad()
    y.sum().backward()
    assert not np.shares_memory(x.grad.numpy(), y.grad.numpy())
    y.grad.numpy()[...] = 9
    assert x.grad.tolist() == [1.0, 1.0]
