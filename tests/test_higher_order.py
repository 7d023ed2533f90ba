"""Gradients of gradients, and ops with several outputs, at first order and above."""

import math

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.ops.elementwise import cos, exp, sin

pytestmark = pytest.mark.usefixtures("own_ops")


def leaf(*values):
    return tg.tensor(np.array(values, "float64"), requires_grad=True)


def pair_op():
    """Return the op x -> (eˣ, sin x), whose rule uses its first output."""

    @tg.op
    def pair(x):
        return np.exp(x), np.sin(x)

    @pair.def_vjp
    def _(g, out, x):
        return (g[0] * out[0] + g[1] * cos(x),)

    return pair


# --- several outputs --------------------------------------------------------------------------


def test_unused_output_has_a_zero_cotangent():
    x = leaf(0.5)
    first, second = pair_op()(x)
    assert tg.grad(first, x, retain_graph=True)[0].item() == math.exp(0.5)
    assert tg.grad(second, x, retain_graph=True)[0].item() == math.cos(0.5)
    total = math.exp(0.5) + 2 * math.cos(0.5)
    assert tg.grad([first, second], x, [None, np.array([2.0])])[0].item() == total


def test_several_outputs_have_a_second_derivative():
    x = leaf(0.3)
    a, b = pair_op()(x)
    (first,) = tg.grad((a * a * b).sum(), x, create_graph=True)
    (second,) = tg.grad(first, x)
    # y = e²ˣ sin x, y″ = e²ˣ (3 sin x + 4 cos x)
    expected = math.exp(0.6) * (3 * math.sin(0.3) + 4 * math.cos(0.3))
    assert second.item() == pytest.approx(expected, rel=1e-14)  # a dozen roundings


def test_gradient_depends_on_an_output_that_its_rule_uses():
    x = leaf(0.3)
    a, _ = pair_op()(x)
    (first,) = tg.grad(a, x, create_graph=True)  # it is a itself
    assert tg.grad(first, a)[0].item() == 1.0


def test_repr_of_one_of_several_outputs_names_the_op():
    a, b = pair_op()(leaf(0.0))
    assert repr(a) == "Tensor([1.], dtype=float64, op='pair')"
    assert repr(b) == "Tensor([0.], dtype=float64, op='pair')"


# --- higher orders ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "derivatives"),
    [
        (lambda x: sin(x * x), lambda x: _sin_of_square(x)),
        (lambda x: exp(-x), lambda x: [-math.exp(-x), math.exp(-x), -math.exp(-x)]),
        (lambda x: 1 / x, lambda x: [-(x**-2), 2 * x**-3, -6 * x**-4]),
        (lambda x: x**4, lambda x: [4 * x**3, 12 * x**2, 24 * x]),
        (lambda x: (x * x).log(), lambda x: [2 / x, -2 * x**-2, 4 * x**-3]),
        (lambda x: (x * 2).reshape(1, 1)[0] * x**3, lambda x: [8 * x**3, 24 * x**2, 48 * x]),
    ],
    ids=["sin x²", "e⁻ˣ", "1/x", "x⁴", "log x²", "2x⁴"],
)
def test_three_derivatives_have_their_closed_forms(function, derivatives):
    x = leaf(0.7)
    value = function(x)
    for expected in derivatives(0.7):
        (value,) = tg.grad(value, x, create_graph=True)
        assert value.item() == pytest.approx(expected, rel=1e-13)  # tens of roundings


def _sin_of_square(x):
    s, c = math.sin(x * x), math.cos(x * x)
    return [2 * x * c, 2 * c - 4 * x**2 * s, -12 * x * s - 8 * x**3 * c]


def test_backward_with_create_graph_leaves_gradients_that_can_be_differentiated():
    x = leaf(2.0)
    (x**3).backward(create_graph=True)
    (second,) = tg.grad(x.grad, x)
    assert second.item() == 12.0


def test_gradient_of_a_gradient_penalty():
    w, x = leaf(0.5, -1.0), leaf(3.0, 4.0)
    (gx,) = tg.grad((w * x * x).sum(), x, create_graph=True)  # 2 w x
    ((gx * gx).sum()).backward()  # 4 w² x²
    assert w.grad.tolist() == [8 * 0.5 * 9, 8 * -1.0 * 16]
    assert x.grad.tolist() == [8 * 0.25 * 3, 8 * 1.0 * 4]


def test_a_write_to_the_output_is_seen_by_what_create_graph_recorded():
    x, v = leaf(1.0), leaf(1.0)
    y = exp(x)
    (first,) = tg.grad(y, x, v, create_graph=True)  # v · y
    with tg.no_grad():
        y *= 0
    with pytest.raises(RuntimeError, match="in place"):
        tg.grad(first, v)


def test_a_write_to_a_constant_input_is_seen_by_what_create_graph_recorded():
    x, v, constant = leaf(1.0), leaf(1.0), tg.tensor(np.array([3.0]))
    (first,) = tg.grad(x * constant, x, v, create_graph=True)  # v · constant
    constant[0] = 100.0
    with pytest.raises(RuntimeError, match="in place"):
        tg.grad(first, v)


def test_a_write_to_an_input_is_seen_by_what_create_graph_recorded():
    x, v = leaf(1.0), leaf(1.0)
    y = x * 3
    (first,) = tg.grad(y * y, y, v, create_graph=True)  # 2 v · y
    with tg.no_grad():
        y += 1
    with pytest.raises(RuntimeError, match="in place"):
        tg.grad(first, v)
