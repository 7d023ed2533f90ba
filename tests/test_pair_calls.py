"""Calls with two inputs are recorded in a shorter way, `Op._call_pair`: with the same result."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.op import Op, saving
from tinygrad_bn.ops.elementwise import add, divide, greater, multiply, power

pytestmark = pytest.mark.usefixtures("own_ops")


def leaf(*values, dtype="float64"):
    return tg.tensor(np.array(values, dtype), requires_grad=True)


def made(values):
    """Return a Tensor with a history."""
    return leaf(*values) * 1.0


def hypotenuse():
    """Return an op whose rule wants inputs and output."""
    op = Op(lambda x, y: (x * x + y * y) ** 0.5, "hypotenuse")
    op.def_vjp(x=lambda g, x, out: g * x / out, y=lambda g, y, out: g * y / out)
    return op


INPUTS = {
    "leaf": lambda: leaf(3.0, 4.0),
    "result": lambda: made([3.0, 4.0]),
    "broadcast": lambda: leaf(3.0),
    "constant": lambda: tg.tensor(np.array([3.0, 4.0])),
    "view": lambda: made([1.0, 3.0, 4.0])[1:],
    "array": lambda: np.array([3.0, 4.0]),
    "number": lambda: 3.0,
}


@pytest.mark.parametrize("op", [add, multiply, divide, power, hypotenuse()], ids=lambda op: op.name)
@pytest.mark.parametrize("y", INPUTS)
@pytest.mark.parametrize("x", ["leaf", "result", "broadcast", "number"])
def test_both_ways_record_the_same(op, x, y):
    inputs = INPUTS[x](), INPUTS[y]()
    general, _ = op._call(inputs, {})
    short = op(*inputs)
    assert short.tolist() == general.tolist()
    assert (type(short), short.dtype) == (type(general), general.dtype)
    if x == "number" and y in ("constant", "array", "number"):
        assert getattr(short, "node", None) is None
        return
    ours, theirs = short.node, general.node
    assert ours.plan is theirs.plan
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert all(a is b for a, b in zip(ours.parents, theirs.parents, strict=True))
    versions = [
        ["own" if v is out.version else id(v) for v in out.node.guards] for out in (short, general)
    ]
    assert versions[0] == versions[1]
    values = [
        ["own" if v is out.data else id(v) for v in out.node.saved] for out in (short, general)
    ]
    assert values[0] == values[1]


def counting(forward):
    """Return an op of two inputs that counts the runs of its forward."""
    runs = []

    def counted(x, y):
        runs.append(1)
        return forward(x, y)

    op = Op(counted, "counted")
    op.def_vjp(x=lambda g, y: g, y=lambda g: g)
    return op, runs


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, y: x + y,
        lambda x, y: (x + y).sum(),  # a NumPy scalar
        lambda x, y: float((x + y).sum()),
        lambda x, y: saving(x + y, sign=x > y),
        lambda x, y: (x + y, x > y),
        lambda x, y: x > y,
    ],
    ids=["array", "scalar", "float", "residuals", "outputs", "boolean"],
)
def test_a_forward_runs_once_a_call_whatever_it_returns(forward):
    op, runs = counting(forward)
    x, y = leaf(1.0, 2.0), leaf(2.0, 1.0)
    first, second = op(x, y), op(x, y)
    assert len(runs) == 2
    if type(first) is not tuple:
        first, second = (first,), (second,)
    for a, b in zip(first, second, strict=True):
        assert (type(b), b.shape, b.dtype) == (tg.Tensor, a.shape, a.dtype)
        assert b.requires_grad == a.requires_grad == (a.dtype.kind == "f")
        assert b.tolist() == a.tolist()


def test_nothing_is_recorded_under_no_grad_or_without_a_derivative():
    x, y = leaf(1.0), leaf(2.0)
    multiply(x, y)  # the plan is there
    with tg.no_grad():
        assert multiply(x, y).node is None
    assert multiply(x.detach(), y.detach()).node is None
    assert greater(x, y).node is None
    assert multiply(x, y).node is not None


def test_a_stale_view_is_refused():
    x, y = made([1.0, 2.0]), leaf(3.0)
    view = x[:1]
    multiply(view, y)
    x[0] = y.sum()
    with pytest.raises(RuntimeError, match="multiply: an input is a view"):
        multiply(view, y)
    with pytest.raises(RuntimeError, match="multiply: an input is a view"):
        multiply(y, view)


def test_a_new_rule_is_used_by_the_next_call():
    op = Op(lambda x, y: x * y, "product")
    op.def_vjp(x=lambda g, y: g * y, y=lambda g, x: g * x)
    x, y = leaf(2.0), leaf(3.0)
    op(x, y).backward()
    op.def_vjp(x=lambda g, y: g * 100.0)
    x.grad = y.grad = None
    op(x, y).backward()
    assert (x.grad.tolist(), y.grad) == ([100.0], None)


def test_a_kernel_that_comes_later_is_used():
    op = Op(lambda x, y: x * y, "product")
    op.def_vjp(x=lambda g, y: g * y, y=lambda g, x: g * x)
    x, y = leaf(2.0), leaf(3.0)
    op(x, y)
    op.use_kernels(numpy=__name__)
    assert op(x, y).tolist() == [-6.0]


def forward(x, y):
    """Be the kernel of the test above."""
    return -(x * y)
