"""What an op refuses: rules that cannot be right, and rules that return what they must not."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.op import saving

pytestmark = pytest.mark.usefixtures("own_ops")


def leaf(*values):
    return tg.tensor(np.array(values, "float64"), requires_grad=True)


def broken(rule, forward=lambda x, y: x * y, **names):
    op = tg.op(forward, name="broken")
    if rule is not None:
        op.def_vjp(rule)
    return op


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("returned", "described"),
    [(lambda g: (g,), "1"), (lambda g: (g, g, g), "3"), (lambda g: g, "a single cotangent")],
)
def test_the_wrong_number_of_cotangents_is_an_error(returned, described, create_graph):
    op = broken(lambda g: returned(g))
    with pytest.raises(TypeError, match=f"broken: .*tuple of 2 cotangents.*{described}"):
        op(leaf(1.0), leaf(2.0)).backward(create_graph=create_graph)


@pytest.mark.parametrize("shape", [(), (3,), (6,), (3, 2), (2, 2), (6, 1), (1, 3)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_cotangent_of_the_wrong_shape_is_an_error_that_names_the_op(shape, create_graph):
    wrong = tg.Tensor(np.ones(shape)) if create_graph else np.ones(shape)
    op = broken(lambda g: (wrong, None))
    x = tg.tensor(np.ones((2, 3)), requires_grad=True)
    with pytest.raises((ValueError, TypeError), match="broken"):
        op(x, 1.0).sum().backward(create_graph=create_graph)


def test_a_rule_that_asks_for_an_unknown_name_is_an_error_that_lists_the_residuals():
    op = broken(lambda g, means: (g, g), lambda x, y: saving(x * y, mean=x))
    with pytest.raises(TypeError, match=r"broken: .*'means'.*\['mean'\]"):
        op(leaf(1.0), leaf(2.0))


def test_an_op_without_a_rule_is_an_error_only_where_a_gradient_would_need_it():
    op = broken(None)
    with pytest.raises(RuntimeError, match=r"broken: it has no derivative rule.*def_vjp.*detach"):
        op(leaf(1.0), leaf(2.0))
    assert op(tg.tensor([2.0]), 3.0).tolist() == [6.0]
    with tg.no_grad():
        assert op(leaf(2.0), 3.0).tolist() == [6.0]
    assert not tg.op(lambda x: x * 2, name="flat", differentiable=False)(leaf(1.0)).requires_grad


def test_def_vjp_refuses_rules_that_cannot_be_right():
    with pytest.raises(TypeError, match=r"broken\.def_vjp: the rule must take the cotangent"):
        broken(lambda grad, x: (x, x))
    with pytest.raises(TypeError, match=r"broken\.def_vjp: \['z'\] are no inputs.*\['x', 'y'\]"):
        broken(None).def_vjp(z=lambda g: g)
    with pytest.raises(TypeError, match=r"broken\.def_vjp: give one rule"):
        broken(None).def_vjp()
    with pytest.raises(TypeError, match=r"broken\.def_vjp: give one rule"):
        broken(None).def_vjp(lambda g: (g, g), x=lambda g: g)


def test_def_vjp_returns_a_rule_that_can_be_called_by_itself():
    op = broken(None)

    @op.def_vjp
    def rule(g, x, y):
        return (g * y, g * x)

    assert rule(1.0, 2.0, 3.0) == (3.0, 2.0)
