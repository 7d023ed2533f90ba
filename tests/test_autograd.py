"""backward and grad: what they return, what they refuse, and that every path is summed once."""

import math
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn.ops.elementwise import sin


def leaf(*values, dtype="float64"):
    return tg.tensor(np.array(values, dtype), requires_grad=True)


# --- graphs against a naive evaluator ---------------------------------------------------------

# Each op: its value, and its partial derivatives as functions of its operands' values.
PRIMITIVES = {
    "add": (lambda a, b: a + b, (lambda a, b: 1, lambda a, b: 1)),
    "sub": (lambda a, b: a - b, (lambda a, b: 1, lambda a, b: -1)),
    "mul": (lambda a, b: a * b, (lambda a, b: b, lambda a, b: a)),
    "half": (lambda a: a * 0.5, (lambda a: 0.5,)),
    "sin": (sin, (np.cos,)),
}


@st.composite
def programs(draw):
    """Draw a list of (op, operands): entries 0 and 1 are leaves, each later one an op."""
    program = [None, None]
    for _ in range(draw(st.integers(1, 9))):
        name = draw(st.sampled_from(sorted(PRIMITIVES)))
        arity = len(PRIMITIVES[name][1])
        operands = draw(st.lists(st.integers(0, len(program) - 1), min_size=arity, max_size=arity))
        program.append((name, operands))
    return program


def run(program, leaves):
    values = list(leaves)
    for name, operands in program[2:]:
        values.append(PRIMITIVES[name][0](*(values[i] for i in operands)))
    return values


def path_sum(program, values, top, bottom):
    """Return d top / d bottom and the sum of its terms' sizes: one term per path, no memory."""
    if top == bottom:
        return 1.0, 1.0
    if program[top] is None:
        return 0.0, 0.0
    name, operands = program[top]
    total = size = 0.0
    for partial, operand in zip(PRIMITIVES[name][1], operands, strict=True):
        factor = partial(*(values[i] for i in operands))
        inner, inner_size = path_sum(program, values, operand, bottom)
        total, size = total + factor * inner, size + abs(factor) * inner_size
    return total, size


@given(programs(), st.integers(0, 2**32 - 1))
def test_gradient_is_the_sum_over_all_paths(program, seed):
    arrays = np.random.default_rng(seed).uniform(-1, 1, (2, 3))
    tensors = run(program, [leaf(*array) for array in arrays])
    values = run(program, list(arrays))
    tensors[-1].sum().backward()
    for i in (0, 1):
        expected, size = path_sum(program, values, len(program) - 1, i)
        grad = tensors[i].grad
        found = np.zeros(3) if grad is None else grad.numpy()
        # At most 2⁹ terms of at most 9 factors each, all rounded, in any order.
        assert np.all(np.abs(found - expected) <= 2**10 * np.finfo(float).eps * size)


@given(programs(), st.data())
def test_grad_of_any_inner_value_is_the_sum_over_all_paths(program, data):
    inner = data.draw(st.integers(0, len(program) - 1))
    arrays = np.random.default_rng(0).uniform(-1, 1, (2, 3))
    tensors = run(program, [leaf(*array) for array in arrays])
    values = run(program, list(arrays))
    expected, size = path_sum(program, values, len(program) - 1, inner)
    (found,) = tg.grad(tensors[-1].sum(), tensors[inner], allow_unused=True)
    found = np.zeros(3) if found is None else found.numpy()
    assert np.all(np.abs(found - expected) <= 2**10 * np.finfo(float).eps * size)
    assert all(tensor.grad is None for tensor in tensors)


# --- what grad and backward accept and refuse -------------------------------------------------


def test_backward_of_more_than_one_entry_needs_a_gradient():
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match=r"backward.*\(2,\).*\.sum\(\)"):
        (x * 2).backward()
    (x * 2).backward(tg.tensor([1.0, 10.0]))
    assert x.grad.tolist() == [2.0, 20.0]


@pytest.mark.parametrize("gradient", [np.array([1.0, 10.0]), [1, 10], tg.tensor([1.0, 10.0])])
def test_gradient_may_be_an_array_a_list_or_a_tensor(gradient):
    x = leaf(1.0, 2.0)
    (x * 2).backward(gradient)
    assert x.grad.tolist() == [2.0, 20.0]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2), (2, 1)])
def test_gradient_of_another_shape_is_refused(shape):
    x = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match=r"gradient has shape .*the output \(2,\)"):
        (x * 2).backward(np.ones(shape))


def test_backward_without_anything_that_requires_grad_is_refused():
    with pytest.raises(RuntimeError, match="does not require grad"):
        tg.tensor([1.0]).backward()


def test_grad_refuses_inputs_and_outputs_that_do_not_require_grad():
    x, constant = leaf(1.0), tg.tensor([1.0])
    with pytest.raises(RuntimeError, match=r"inputs\[1\] does not require grad"):
        tg.grad(x * 2, [x, constant])
    with pytest.raises(RuntimeError, match=r"outputs\[0\] does not require grad"):
        tg.grad(constant, x)
    with pytest.raises(TypeError, match=r"inputs\[0\] is a ndarray"):
        tg.grad(x * 2, np.ones(1))
    with pytest.raises(ValueError, match="1 outputs but 2 grad_outputs"):
        tg.grad(x * 2, x, [np.ones(1), np.ones(1)])


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_integers_that_require_grad_are_refused(dtype):
    with pytest.raises(TypeError, match=f"only floating.*{dtype}.*astype"):
        tg.Tensor(np.ones(2, dtype), requires_grad=True)
    with pytest.raises(TypeError, match=f"only floating.*{dtype}"):
        tg.tensor(np.ones(2, dtype)).requires_grad_()


def test_unused_input_is_an_error_or_none():
    x, y = leaf(1.0), leaf(2.0)
    with pytest.raises(RuntimeError, match=r"inputs\[1\].*allow_unused=True"):
        tg.grad(x * 2, [x, y])
    gx, gy = tg.grad(x * 2, [x, y], allow_unused=True)
    assert (gx.tolist(), gy) == ([2.0], None)


def test_grad_of_an_output_by_itself_is_its_cotangent():
    x = leaf(3.0)
    y = x * 2
    assert tg.grad(y, y)[0].tolist() == [1.0]
    assert tg.grad(x, x, np.array([5.0]))[0].tolist() == [5.0]


def test_grad_sums_several_outputs_and_repeats_repeated_inputs():
    x = leaf(3.0)
    first, second = tg.grad([x * x, x * 5], [x, x], [np.array([1.0]), np.array([10.0])])
    assert first.tolist() == second.tolist() == [56.0]
    assert x.grad is None


def test_backward_accumulates_until_grad_is_none_again():
    x = leaf(1.0)
    for expected in (2.0, 4.0):
        (x * 2).backward()
        assert x.grad.tolist() == [expected]
    x.grad = None
    (x * 2).backward()
    assert x.grad.tolist() == [2.0]


def test_second_backward_names_the_op_and_retain_graph_allows_it():
    x = leaf(2.0)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == [8.0]
    with pytest.raises(RuntimeError, match=r"'sum' a second time.*retain_graph=True"):
        y.backward()
    with pytest.raises(RuntimeError, match=r"second time.*retain_graph=True"):
        tg.grad(y, x)


def test_create_graph_retains_the_graph_unless_told_otherwise():
    x = leaf(2.0)
    y = (x * x).sum()
    tg.grad(y, x, create_graph=True)
    y.backward(create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_retain_grad_fills_the_gradient_of_an_inner_tensor():
    x = leaf(1.0, 2.0)
    y, z = x * 2, x * 3
    y.retain_grad()
    (y * y + z).sum().backward()
    assert y.grad.tolist() == [4.0, 8.0]
    assert z.grad is None
    with pytest.raises(RuntimeError, match=r"retain_grad.*does not require grad"):
        tg.tensor([1.0]).retain_grad()


def test_retain_grad_after_an_in_place_write_is_the_gradient_of_the_new_value():
    x = leaf(1.0)
    y = x * 2
    y.retain_grad()
    y *= 3
    (y * 5).backward()
    assert y.grad.tolist() == [5.0]
    assert x.grad.tolist() == [30.0]


# --- shapes and dtypes ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (1, 1), (1, 2, 3)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_broadcast_inputs_receive_gradients_of_their_own_shape(shape, create_graph):
    x = tg.tensor(np.ones(shape), requires_grad=True)
    (x * np.ones((4, 2, 3))).sum().backward(create_graph=create_graph)
    np.testing.assert_array_equal(x.grad.numpy(), np.full(shape, 24 / math.prod(shape)))


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float64")])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_have_their_inputs_dtypes(dtypes, create_graph):
    narrow, wide = (leaf(1.0, 2.0, dtype=dtype) for dtype in dtypes)
    inner = narrow * 1
    product = inner * wide
    assert product.dtype == dtypes[1]
    grads = tg.grad(product.sum(), [narrow, inner, wide], create_graph=create_graph)
    assert [g.dtype for g in grads] == [dtypes[0], dtypes[0], dtypes[1]]
    product = narrow * wide
    product.backward(np.ones(2, "float64"))
    assert [narrow.grad.dtype, wide.grad.dtype] == list(dtypes)


# --- threads ----------------------------------------------------------------------------------


def test_two_threads_run_backward_at_once_on_separate_graphs():
    wrong = []
    barrier = threading.Barrier(2)

    def work(factor):
        barrier.wait()
        for _ in range(20):
            x = leaf(1.0)
            y = x
            for _ in range(100):
                y = y * factor
            with tg.no_grad():
                y.backward()
            if x.grad.item() != factor**100:
                wrong.append(x.grad.item())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(factor,)) for factor in (2.0, -1.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize(("dtype", "rows"), [("float16", 5_000), ("float32", 2**17)])
def test_gradients_of_many_rows_are_added_up_without_losing_digits(dtype, rows):
    # Added up one by one, float16 ones stop at 2048, and float32 is off by 1e-5.
    g = np.random.default_rng(0).uniform(0.5, 1.5, (rows, 2)).astype(dtype)
    bias = tg.Tensor(np.zeros(2, dtype), requires_grad=True)
    (tg.Tensor(g) + bias).backward(tg.Tensor(g))
    np.testing.assert_array_equal(bias.grad, g.sum(axis=0, dtype=np.float64).astype(dtype))
