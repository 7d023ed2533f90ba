import weakref

import numpy as np
import pytest

from tests.testing.planted import RIGHT, SHAPES, draw, made
from tinygrad_bn import autograd
from tinygrad_bn.backend import array_module
from tinygrad_bn.testing import GradCheckError, check_dtypes, check_pure


def square(x):
    return x * x


def right(g, x):
    return g * x * 2.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RIGHT)
def test_right_ops_pass(name, seed):
    inputs = draw(*SHAPES[name], seed=seed)
    check_pure(RIGHT[name], *inputs, seed=seed)
    check_dtypes(RIGHT[name], *inputs, seed=seed)


def assert_impure(op, match, *inputs):
    with pytest.raises(GradCheckError, match=match):
        check_pure(op, *(inputs or draw((3, 2))))


def test_forward_that_changes_its_input_is_caught():
    def forward(x):
        x *= 2.0
        return x * 1.0

    assert_impure(made(forward, x=lambda g: g * 2.0), "changed its input 0")


def test_memory_taken_back_from_a_view_is_caught():
    waiting = [np.empty((3, 2)) for _ in range(9)]

    def forward(x):
        out = waiting.pop().view()
        weakref.finalize(out, waiting.append, out.base)
        return np.multiply(x, 2.0, out=out)

    assert_impure(made(forward, x=lambda g: g * 2.0), "memory of output 0, of which a view is")


def test_rule_that_changes_its_input_is_caught():
    def rule(g, x):
        x *= 2.0
        return g * x

    assert_impure(made(square, x=rule), "changed its input 0")


def test_rule_that_changes_its_cotangent_is_caught():
    def rule(g, x):
        g *= 2.0
        return g * x

    assert_impure(made(square, x=rule), "changed the cotangent of output 0")


@pytest.fixture
def sharing(monkeypatch):
    """An engine that hands out whatever a rule returns. The real one copies what others hold."""
    monkeypatch.setattr(autograd, "_own", lambda g, *rest: autograd.new_tensor(g))


def test_the_engine_copies_what_rules_share():
    op = made(lambda x: array_module(x).exp(x), x=lambda g, out: out)
    check_pure(op, *draw((3, 2)))


@pytest.mark.usefixtures("sharing")
def test_gradient_that_is_an_input_is_caught():
    def forward(x, y):
        return (x * y).sum() * 0.0 + y

    assert_impure(
        made(forward, lambda g, x, y: (x, g)), "shares memory with input 0", *draw((3,), (3,))
    )


@pytest.mark.usefixtures("sharing")
def test_gradient_that_is_the_output_is_caught():
    assert_impure(made(lambda x: array_module(x).exp(x), x=lambda g, out: out), "with output 0")


@pytest.mark.usefixtures("sharing")
def test_gradient_in_a_buffer_that_is_used_again_is_caught():
    buffers = {}

    def rule(g, x):
        buffer = buffers.setdefault(g.shape, np.empty(g.shape))
        np.multiply(g, 2.0 * x, out=buffer)
        return buffer

    assert_impure(made(square, x=rule), r"shares memory with the gradient of input 0 .* another")


@pytest.mark.usefixtures("sharing")
def test_gradients_that_share_memory_with_each_other_are_caught():
    def rule(g, x, y):
        both = g * 1.0
        return both, both

    op = made(lambda x, y: x + y, rule)
    assert_impure(op, "shares memory with the gradient of input 1", *draw((3,), (3,)))


@pytest.mark.usefixtures("sharing")
def test_gradient_that_is_the_cotangent_is_caught():
    assert_impure(made(lambda x: x + 1.0, x=lambda g: g), "shares memory with the cotangent")


def test_output_in_a_buffer_that_is_used_again_is_caught():
    calls = []
    buffer = np.empty((3, 2))

    def forward(x):
        calls.append(1)
        np.multiply(x, float(len(calls)), out=buffer)
        return buffer

    assert_impure(made(forward, x=lambda g: g * 1.0), "output 0 differs between two equal calls")


def test_rule_that_depends_on_earlier_calls_is_caught():
    calls = []

    def rule(g, x):
        calls.append(1)
        return g * x * float(len(calls))

    assert_impure(made(square, x=rule), "differs between two equal calls")


def test_input_kept_behind_the_version_counter_is_caught():
    kept = {}

    def forward(x):
        kept["x"] = x  # not through the rule's parameters, so nothing watches it
        return x * x

    op = made(forward, x=lambda g: g * kept["x"] * 2.0)
    assert_impure(op, r"overwritten .* between forward and backward")


def test_dtype_leak_of_the_output_is_caught():
    op = made(lambda x: x * np.float64(2), x=lambda g: g * 2.0)
    with pytest.raises(GradCheckError, match="output 0 is float64 for float32 inputs"):
        check_dtypes(op, *draw((3,)))


def test_narrowing_is_caught_too():
    op = made(lambda x: x.astype(np.float32), x=lambda g: g)
    with pytest.raises(GradCheckError, match="output 0 is float32 for float64 inputs"):
        check_dtypes(op, *draw((3,)))


def test_conversion_on_request_is_no_leak():
    check_dtypes(lambda x: x.astype("float32"), *draw((3,)), outputs=False)
