"""What a failure says: what is wrong, where, of what kind, and code that shows it again."""

import re
import textwrap
from functools import partial

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.testing.planted import WRONG, draw, made, normalize
from tinygrad_bn import functional as F
from tinygrad_bn import testing
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing import GradCheckError, Inconclusive, check_double_grad, check_grad
from tinygrad_bn.testing.reproduction import reference_to

AXES = (0, 2, 3)


def message_of(check, fn, *inputs, **options):
    with pytest.raises(GradCheckError) as caught:
        check(fn, *inputs, **options)
    assert not isinstance(caught.value, Inconclusive), str(caught.value)
    return str(caught.value)


def code_in(message):
    return textwrap.dedent(message.split("reproduce:\n")[1])


def doubled(x):
    """Return 2x: a function of Tensors that is wrong, and can be imported."""
    return WRONG["sign"][0](x)


# --- code that shows it again --------------------------------------------------------------------


def planted_square(x, *, factor=1.0):
    return x * x * factor


SQUARE = made(planted_square, x=lambda g, x, factor: g * x * factor)
SQUARE.name = "SQUARE"


def frozen(g, x):
    return g * getattr(x, "data", x) * 2.0 if isinstance(x, tg.Tensor) else g * x * 2.0


FROZEN = made(lambda x: x * x, x=frozen)
FROZEN.name = "FROZEN"


@pytest.mark.parametrize(
    ("check", "fn", "shape", "options"),
    [
        (check_grad, doubled, (3,), {}),
        (check_grad, SQUARE, (2, 3), {"mode": "full"}),
        (check_grad, SQUARE, (2, 3), {"cotangents": np.arange(6.0).reshape(2, 3)}),
        (check_grad, SQUARE, (40, 50), {"seed": 3}),
        (check_grad, SQUARE, (40, 50), {"cotangents": np.arange(2000.0).reshape(40, 50)}),
        (check_grad, partial(SQUARE, factor=2.0), (3,), {"directions": 3}),
        (check_double_grad, FROZEN, (4, 5), {}),
        (check_double_grad, FROZEN, (40, 50), {}),
    ],
)
def test_the_code_in_the_message_runs_and_fails_the_same_way(check, fn, shape, options):
    (x,) = draw(shape)
    message = message_of(check, fn, x, **options)
    with pytest.raises(GradCheckError) as again:
        exec(code_in(message), {})
    assert str(again.value).splitlines()[0] == message.splitlines()[0]
    if x.size <= 64:
        assert str(again.value) == message


def test_inputs_that_cannot_be_written_or_imitated_are_on_the_error():
    # Wrong far out only, where random inputs do not get.
    op = made(lambda x: x * 2.0, x=lambda g, x: g * (2.0 + (x > 90)))
    (x,) = draw((200,))
    x[77] = 100.0
    with pytest.raises(GradCheckError) as caught:
        check_grad(op, x)
    assert "*error.inputs" in str(caught.value)
    with pytest.raises(GradCheckError, match=r"at \[77\]"):
        check_grad(op, *caught.value.inputs, seed=0)


def test_functions_are_imported_where_they_can_be():
    assert reference_to(REGISTRY["tanh"])[1] == "tanh"
    assert reference_to(F.softmax) == (["from tinygrad_bn.functional import softmax"], "softmax")
    lines, call = reference_to(partial(F.softmax, axis=0))
    assert call == "partial(softmax, axis=0)" and lines[0] == "from functools import partial"
    (line,), call = reference_to(lambda x: x)
    assert call == "fn" and re.search(r"fn = \.\.\.  # <lambda>, line \d+ of .*test_messages", line)


# --- what kind of mistake ------------------------------------------------------------------------


def batch_norm_with(rule):
    return made(normalize, rule)


def pieces(g, x):
    s = 1 / np.sqrt(x.var(AXES, keepdims=True))
    x_hat = (x - x.mean(AXES, keepdims=True)) * s
    mean = g.mean(AXES, keepdims=True)
    along = x_hat * (g * x_hat).mean(AXES, keepdims=True)
    return s, g, mean, along


KINDS = {
    "a wrong sign": lambda s, g, mean, along: -s * (g - mean - along),
    "a missing mean term: - mean(gradient) over axes (0, 2, 3)": lambda s, g, mean, along: (
        s * (g - along)
    ),
    "a missing term along x - mean(x) over axes (0, 2, 3)": lambda s, g, mean, along: (
        s * (g - mean)
    ),
    "missing terms of mean and variance over axes (0, 2, 3)": lambda s, g, mean, along: s * g,
    "a missing factor 1.04347826 (24/23: m/(m - 1) for m = 24)": lambda s, g, mean, along: (
        s * (g - mean - along) * (23 / 24)
    ),
    "a gradient that is zero": lambda s, g, mean, along: g * 0,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_a_batch_norm_are_named(kind, seed):
    op = batch_norm_with(lambda g, x: (KINDS[kind](*pieces(g, x)),))
    message = message_of(check_grad, op, *draw((4, 3, 2, 3), seed=seed))
    assert f"it looks like {kind}" in message


def test_swapped_gradients_are_named():
    op = made(lambda x, y: x * x * y, lambda g, x, y: (g * x * x, 2 * g * x * y))
    message = message_of(check_grad, op, *draw((3,), (3,)))
    assert "it looks like the gradient of input 1 ('y') in its place" in message


def test_conditioning_is_told():
    op = made(lambda x: np.sin(x), x=lambda g, x: g * np.cos(x) * 1.5)
    message = message_of(check_grad, op, np.array([1e6, 2e6]))
    found = re.search(r"moves the result by (\S+) ε of its size; measured noise (\S+) ε", message)
    assert 1e5 < float(found[1]) < 1e7
    assert 1e5 < float(found[2]) < 1e8


def test_the_entry_is_found_with_few_evaluations():
    calls = []

    def forward(x):
        calls.append(1)
        return x * x

    def rule(g, x):
        gx = 2.0 * g * x
        gx.flat[-7] *= 1.5
        return gx

    message = message_of(check_grad, made(forward, x=rule), *draw((100, 100)))
    assert "at [99, 93]" in message
    # 14 halvings of 10,000 entries, a dozen evaluations each, and the patterns.
    assert len(calls) < 400


def test_a_module_names_its_parameters():
    class Doubled(tg.nn.Module):
        def __init__(self):
            self.inner = tg.nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(x) + WRONG["sign"][0](self.inner.bias)

    message = message_of(testing.check_module, Doubled(), *draw((4, 3)))
    assert "the derivative for parameter 'inner.bias' is wrong" in message
