"""Writes in place: recorded as ops are, refused or reported where a gradient would be wrong."""

import operator

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.ops.elementwise import exp
from tinygrad_bn.ops.indexing import setitem


def leaf(*values, dtype="float64"):
    return tg.tensor(np.array(values, dtype), requires_grad=True)


def constant(*values, dtype="float64"):
    return tg.tensor(np.array(values, dtype))


# --- gradients against the functional form ----------------------------------------------------

INDICES = {
    "an integer": (1, ()),
    "a slice": (slice(1, 3), (2,)),
    "a broadcast slice": (slice(None), ()),
    "backwards": (slice(None, None, -2), (2,)),
    "an integer array": (np.array([3, 0]), (2,)),
    "a mask": (np.array([True, False, True, False]), (2,)),
    "an Ellipsis": (Ellipsis, (4,)),
}


@pytest.mark.parametrize(("index", "shape"), INDICES.values(), ids=INDICES.keys())
@pytest.mark.parametrize("create_graph", [False, True])
def test_assignment_has_the_gradients_of_its_functional_form(index, shape, create_graph):
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    grads = []
    for in_place in (True, False):
        x = leaf(5.0, 6.0, 7.0, 8.0)
        v = tg.tensor(np.full(shape, 9.0), requires_grad=True)
        y = x * x
        if in_place:
            y[index] = v * 2
        else:
            y = setitem(y, v * 2, index=index)
        (y * weights).sum().backward(create_graph=create_graph)
        grads.append((y.tolist(), x.grad.tolist(), v.grad.tolist()))
    assert grads[0] == grads[1]
    overwritten = np.ones(4)
    overwritten[index] = 0
    np.testing.assert_array_equal(grads[0][1], overwritten * weights * 2 * [5.0, 6.0, 7.0, 8.0])


OPERATORS = {
    "+=": (operator.iadd, operator.add),
    "-=": (operator.isub, operator.sub),
    "*=": (operator.imul, operator.mul),
    "/=": (operator.itruediv, operator.truediv),
}
OTHERS = {
    "a number": lambda: 3.0,
    "an array": lambda: np.array([2.0, 4.0]),
    "a broadcast array": lambda: np.array([4.0]),
    "a constant Tensor": lambda: constant(2.0, 4.0),
}


@pytest.mark.parametrize(("in_place", "functional"), OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_operators_have_the_gradients_of_their_functional_form(in_place, functional, other):
    found = []
    for function in (in_place, functional):
        x = leaf(5.0, 6.0)
        y = x * x
        y = function(y, other())
        (y * y).sum().backward()
        found.append((y.tolist(), x.grad.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("in_place", "functional"), list(OPERATORS.values())[:2], ids=["+=", "-="])
def test_operators_give_the_other_operand_its_gradient(in_place, functional):
    found = []
    for function in (in_place, functional):
        x, v = leaf(5.0, 6.0), leaf(2.0)
        y = function(x * x, v)
        (y * y).sum().backward()
        found.append((y.tolist(), x.grad.tolist(), v.grad.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("function", [operator.imul, operator.itruediv])
def test_a_product_that_overwrote_what_its_rule_needs_says_so(function):
    y, v = leaf(5.0) * 1, leaf(2.0)
    y = function(y, v)  # the gradient of v needs the value that y had
    with pytest.raises(RuntimeError, match=r"input 'x' was changed in place"):
        y.backward()


def test_in_place_operators_write_into_the_memory_and_keep_the_object():
    array = np.ones(2)
    t = same = tg.Tensor(array)
    t += 1
    t *= 4
    t -= 2
    t /= 3
    assert t is same
    assert t.data is array
    assert array.tolist() == [2.0, 2.0]


def test_a_second_name_sees_the_write_and_the_gradient():
    x = leaf(1.0)
    t = x * 2
    alias = t
    t += 1
    assert alias.item() == 3.0
    (alias * alias).backward()
    assert x.grad.item() == 12.0


def test_a_tensor_may_be_added_to_itself_in_place():
    x = leaf(1.0, 2.0)
    y = x * 1
    y += y
    y[1:] = y[:1]
    y.sum().backward()
    assert y.tolist() == [2.0, 2.0]
    assert x.grad.tolist() == [4.0, 0.0]


def test_assigning_something_that_requires_grad_makes_a_constant_require_grad():
    buffer, v = constant(0.0, 0.0), leaf(3.0)
    buffer[0] = v[0] * 2
    assert buffer.requires_grad
    assert not buffer.is_leaf
    (buffer * 5).sum().backward()
    assert v.grad.tolist() == [10.0]
    assert buffer.grad is None


# --- dtypes -----------------------------------------------------------------------------------


def test_the_written_tensor_keeps_its_dtype_and_each_gradient_has_its_own():
    x, v = leaf(1.0, 2.0, dtype="float32"), leaf(3.0)
    y = x * 1
    y[:1] = v
    y += v
    assert y.dtype == np.float32
    y.sum().backward()
    assert (x.grad.dtype, v.grad.dtype) == (np.float32, np.float64)
    assert (x.grad.tolist(), v.grad.tolist()) == ([0.0, 1.0], [3.0])


def test_floats_do_not_fit_into_integers_in_place():
    t = tg.tensor([1, 2])
    with pytest.raises(TypeError, match="cast"):
        t += 1.5
    assert t.tolist() == [1, 2]


def test_an_integer_tensor_never_comes_to_require_grad():
    t = tg.tensor([1, 2])
    t[0] = leaf(7.0)[0]
    assert t.tolist() == [7, 2]
    assert not t.requires_grad


# --- leaves -----------------------------------------------------------------------------------

WRITES = {
    "an assignment": lambda t: operator.setitem(t, 0, 5.0),
    "+=": lambda t: operator.iadd(t, 1.0),
    "-=": lambda t: operator.isub(t, 1.0),
    "*=": lambda t: operator.imul(t, 2.0),
    "/=": lambda t: operator.itruediv(t, 2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_leaf_that_requires_grad_is_written_only_under_no_grad(write):
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match=r"leaf that requires grad.*no_grad"):
        write(x)
    assert x.tolist() == [1.0, 2.0]
    with tg.no_grad():
        write(x)
    assert x.tolist() != [1.0, 2.0]
    assert x.requires_grad
    assert x.is_leaf


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_constant_can_be_written_and_stays_one(write):
    t = constant(1.0, 2.0)
    write(t)
    assert t.tolist() != [1.0, 2.0]
    assert not t.requires_grad


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_that_fails_changes_nothing(write):
    array = np.array([1.0, 2.0])
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        write(tg.Tensor(array))
    x = leaf(1.0)
    y = (x * 1).broadcast_to((2,))
    square = y * y
    with pytest.raises((RuntimeError, ValueError), match=r"read-only|view"):
        write(y)
    square.sum().backward()
    assert x.grad.tolist() == [4.0]


def test_a_value_that_does_not_fit_changes_nothing():
    x = leaf(1.0, 2.0)
    y = x * 1
    square = y * y
    with pytest.raises(ValueError, match="broadcast"):
        y += np.ones(3)
    with pytest.raises(ValueError, match="broadcast"):
        y[:] = leaf(1.0, 2.0, 3.0)
    assert y.node_name() == "multiply"
    square.sum().backward()
    assert x.grad.tolist() == [2.0, 4.0]


# --- pending backward passes ------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x, y: x * y, "'multiply'.*input 'y'"),
        (lambda x, y: y * x, "'multiply'.*input 'x'"),
        (lambda x, y: (x * 0 + 1) / y, "'divide'.*input 'y'"),
    ],
    ids=["y", "x", "divisor"],
)
def test_a_write_to_a_value_that_a_rule_needs_is_an_error_that_names_op_and_input(
    build, message, write
):
    x, y = leaf(1.0, 2.0), constant(3.0, 4.0)
    pending = build(x, y).sum()
    write(y)
    with pytest.raises(RuntimeError, match=f"{message} was changed in place"):
        pending.backward()
    assert x.grad is None


def test_a_write_to_an_output_that_its_rule_needs_is_an_error():
    x = leaf(1.0)
    y = exp(x)
    y += 1
    with pytest.raises(RuntimeError, match=r"'exp'.*its output was changed in place"):
        y.backward()


def test_an_optimizers_step_before_backward_is_noticed():
    w, x = leaf(1.0, 2.0), leaf(3.0, 4.0)
    loss = (w * x).sum()
    with tg.no_grad():
        w -= 0.1
    with pytest.raises(RuntimeError, match=r"'multiply'.*'x' was changed in place"):
        loss.backward()


def test_writes_that_no_rule_minds_are_harmless():
    x, y = leaf(1.0, 2.0), constant(3.0, 4.0)
    pending = (x + y).sum() + (x * y.copy()).sum() + exp(x).sum() * 0
    y[0] = 100.0
    y *= 2
    pending.backward()
    assert x.grad.tolist() == [4.0, 5.0]


def test_a_write_after_backward_is_harmless():
    w, x = leaf(1.0), constant(3.0)
    for _ in range(3):
        (w * x * w).backward()
        with tg.no_grad():
            w -= w.grad * 0.0
        w.grad = None


def test_an_index_tensor_that_was_changed_since_is_an_error_or_was_copied():
    x, index = leaf(1.0, 2.0, 3.0, 4.0), tg.tensor([0, 1])
    y = x[index]
    index += 2
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "in place" in str(error)
    else:
        assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
