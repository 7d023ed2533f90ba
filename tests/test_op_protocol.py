"""An op's forward, its rule and the engine: what is asked for, what is kept, what is passed."""

import gc
import weakref

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.op import REGISTRY, saving
from tinygrad_bn.ops.elementwise import cos, exp

pytestmark = pytest.mark.usefixtures("own_ops")


def leaf(*values, dtype="float64"):
    return tg.tensor(np.array(values, dtype), requires_grad=True)


def affine():
    """Return the op scale · xᵖ · y (+ bias), and what its rule saw last."""
    seen = {}

    @tg.op
    def affine(x, y, bias=None, *, scale, power=2):
        out = scale * x**power * y
        return out if bias is None else out + bias

    @affine.def_vjp
    def _(bias, power, g, y_dtype, x, out, x_shape, scale, y, needs):
        seen.update(locals())
        gbias = None if bias is None else g
        return (g * scale * power * x ** (power - 1) * y, g * scale * x**power, gbias)

    return affine, seen


# --- what a rule receives ---------------------------------------------------------------------


def test_a_rule_receives_what_it_names_in_any_order():
    op, seen = affine()
    x, y, bias = leaf(1.0, 2.0), leaf(3.0, dtype="float32"), leaf(5.0)
    out = op(x, y, bias, scale=10.0, power=3)
    out.sum().backward()
    assert seen["x"] is x.data
    assert seen["y"] is y.data
    assert seen["bias"] is bias.data
    assert seen["out"] is out.data
    assert (seen["scale"], seen["power"]) == (10.0, 3)
    assert (seen["x_shape"], seen["y_dtype"]) == ((2,), np.float32)
    assert list(seen["needs"]) == [True, True, True]
    assert type(seen["g"]) is np.ndarray
    assert x.grad.tolist() == [90.0, 360.0]
    assert y.grad.tolist() == [90.0]
    assert bias.grad.tolist() == [2.0]


def test_under_create_graph_the_same_rule_receives_tensors_on_the_graph():
    op, seen = affine()
    x, y = leaf(2.0), leaf(3.0)
    (gx,) = tg.grad(op(x, y, scale=1.0), x, create_graph=True)
    assert seen["x"] is x
    assert isinstance(seen["g"], tg.Tensor)
    assert seen["out"].requires_grad
    (gxy,) = tg.grad(gx, y)
    assert gxy.tolist() == [4.0]  # d²(x² y) / dx dy


def test_an_absent_optional_input_is_none_and_an_option_has_its_default():
    op, seen = affine()
    op(leaf(1.0), leaf(3.0), scale=1.0).backward()
    assert (seen["bias"], seen["power"]) == (None, 2)


def test_needs_says_whose_cotangent_is_wanted():
    op, seen = affine()
    x, y = leaf(1.0), leaf(3.0)
    out = op(x, y.detach(), scale=1.0)
    out.backward(retain_graph=True)
    assert list(seen["needs"]) == [True, False, False]
    inner = x * 1
    tg.grad(op(inner, y, scale=1.0), y)
    assert list(seen["needs"]) == [False, True, False]


def test_a_rule_for_an_input_is_not_called_when_nobody_wants_it():
    called = []

    @tg.op
    def product(x, y):
        return x * y

    product.def_vjp(
        x=lambda g, y: called.append("x") or g * y, y=lambda g, x: called.append("y") or g * x
    )
    x, y = leaf(2.0), leaf(3.0)
    product(x, y.detach()).backward()
    tg.grad(product(x * 1, y), y)
    assert called == ["x", "y"]


def test_array_inputs_may_be_passed_by_name():
    op, seen = affine()
    x, bias = leaf(1.0), leaf(7.0)
    assert op(y=3.0, x=x, bias=bias, scale=2.0).tolist() == [13.0]
    op(x, scale=1.0, y=leaf(3.0)).backward()
    assert seen["bias"] is None
    with pytest.raises(TypeError, match=r"affine: unexpected \['x'\]"):
        op(x, x=x, y=x, scale=1.0)
    with pytest.raises(TypeError, match=r"affine: unexpected \['offset'\].*'power', 'scale'"):
        op(x, x, offset=1.0, scale=1.0)


def test_variadic_inputs_arrive_as_a_tuple():
    seen = {}

    @tg.op
    def weighted(first, *rest, weight=1.0):
        return first + weight * sum(rest)

    @weighted.def_vjp
    def _(g, rest, rest_shape, rest_dtype, weight):
        seen.update(locals())
        return (g, *(g * weight for _ in rest))

    x, y, z = leaf(1.0), tg.tensor(np.ones((3, 1), "float32")), leaf(3.0)
    weighted(x, y, z, 2.0, weight=10.0).sum().backward()
    assert [type(entry) for entry in seen["rest"]] == [np.ndarray, np.ndarray, float]
    assert seen["rest_shape"] == ((3, 1), (1,), ())
    assert seen["rest_dtype"][:2] == (np.float32, np.float64)
    assert (x.grad.tolist(), z.grad.tolist(), y.grad) == ([3.0], [30.0], None)


def test_several_outputs_arrive_as_tuples_and_only_floating_ones_require_grad():
    @tg.op
    def index_and_largest(x):
        return x.argmax(axis=0), x.max(axis=0)

    @index_and_largest.def_vjp
    def _(g, out, x_shape):
        gx = np.zeros(x_shape)
        gx[out[0]] = g[1]
        return (gx,)

    x = leaf(1.0, 5.0, 3.0)
    index, largest = index_and_largest(x)
    assert index.item() == 1
    assert not index.requires_grad
    assert largest.requires_grad
    (largest * 2).backward()
    assert x.grad.tolist() == [0.0, 2.0, 0.0]


# --- residuals --------------------------------------------------------------------------------


def residual_op(seen):
    @tg.op
    def scaled_exp(x, *, scale=1.0):
        e = np.exp(x)
        return saving(scale * e, e=e, positive=x > 0, rank=x.argsort(), count=x.size)

    @scaled_exp.def_vjp
    def _(g, x, e, positive, rank, count, scale):
        seen.update(e=e, positive=positive, rank=rank, count=count)
        return (g * scale * (exp(x) if e is None else e),)

    return scaled_exp


def test_residuals_reach_the_rule_and_are_no_second_output():
    seen = {}
    x = leaf(2.0, -1.0)
    out = residual_op(seen)(x, scale=3.0)
    assert isinstance(out, tg.Tensor)
    out.sum().backward()
    np.testing.assert_array_equal(seen["e"], np.exp([2.0, -1.0]))
    assert seen["positive"].tolist() == [True, False]
    assert (seen["rank"].tolist(), seen["count"]) == ([1, 0], 2)


def test_under_create_graph_floating_residuals_are_withheld_and_others_are_not():
    seen = {}
    x = leaf(2.0, -1.0)
    (first,) = tg.grad(residual_op(seen)(x).sum(), x, create_graph=True)
    assert seen["e"] is None
    assert (seen["positive"].tolist(), seen["rank"].tolist()) == ([True, False], [1, 0])
    (second,) = tg.grad(first.sum(), x)
    np.testing.assert_array_equal(second.numpy(), np.exp([2.0, -1.0]))


@pytest.mark.parametrize("freeze", [float, np.float64, lambda e: (e, 1), lambda e: {"e": e}])
def test_a_floating_residual_is_withheld_in_whatever_it_is_wrapped(freeze):
    seen = []

    @tg.op
    def exponential(x):
        e = np.exp(x)
        return saving(e, kept=freeze(e))

    @exponential.def_vjp
    def _(g, x, kept):
        seen.append(kept)
        return (g * exp(x),)

    x = tg.tensor(np.array(0.5), requires_grad=True)
    exponential(x).backward()
    assert seen == [freeze(np.exp(0.5))]
    tg.grad(exponential(x), x, create_graph=True)
    assert seen[1] is None


def test_residuals_can_be_had_from_arrays_and_tensors():
    op = residual_op({})
    for x in (np.array([2.0]), leaf(2.0)):
        out, residuals = op.call_with_residuals(x)
        assert sorted(residuals) == ["count", "e", "positive", "rank"]
        assert type(residuals["e"]) is np.ndarray
        assert type(out) is type(x)


# --- what is kept alive -----------------------------------------------------------------------


def test_what_a_rule_does_not_ask_for_is_not_kept_alive():
    @tg.op
    def lean(x, y, z):
        return saving(np.exp(x) * y + z, big=np.ones(9), small=np.ones(9))

    @lean.def_vjp
    def _(g, y, x_shape, small):
        return (g * y, None, None)

    gc.disable()
    try:
        x = leaf(1.0)
        inputs = [x * 1, tg.tensor(np.ones(1)), tg.tensor(np.ones(1))]
        out, residuals = lean.call_with_residuals(*inputs)
        total = out.sum()  # keeps the graph, but not out's data
        arrays = [*(t.data for t in inputs), out.data, residuals["big"], residuals["small"]]
        names = ["x", "y", "z", "out", "big", "small"]
        references = dict(zip(names, map(weakref.ref, arrays), strict=True))
        del inputs, out, residuals, arrays
        alive = {name for name, reference in references.items() if reference() is not None}
    finally:
        gc.enable()
    assert alive == {"y", "small"}
    total.backward()
    assert x.grad.tolist() == [1.0]


def test_a_rule_for_an_input_that_needs_no_gradient_keeps_nothing():
    x, constant = leaf(1.0), tg.tensor(np.ones(1))
    inner = x * 1
    reference = weakref.ref(inner.data)
    out = inner * constant  # only the constant's gradient would need `inner`
    del inner
    assert reference() is None
    out.backward()
    assert x.grad.tolist() == [1.0]


# --- the registry, and raw arrays -------------------------------------------------------------


def test_a_users_op_is_registered_under_its_modules_name():
    op = tg.op(lambda x: x, name="mine")
    assert REGISTRY[f"{__name__}.mine"] is op
    assert "mine" not in REGISTRY
    assert REGISTRY["add"].name == "add"


def test_arrays_pass_through_untouched_by_the_tape():
    op, _ = affine()
    out = op(np.ones(2), np.float64(3), scale=2.0)
    assert type(out) is np.ndarray
    assert out.tolist() == [6.0, 6.0]
    reduced = tg.op(lambda x: x.sum(), name="total")(np.ones(2))
    assert (type(reduced), reduced.shape) == (np.ndarray, ())


def test_an_op_has_its_forwards_name_and_docstring():
    assert cos.__name__ == "cos"
    assert cos.__doc__.startswith("Return the cosine")
    assert repr(cos) == "<op cos(x)>"
