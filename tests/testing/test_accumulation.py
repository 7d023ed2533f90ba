import numpy as np
import pytest

import tinygrad_bn as tg
from tests.testing.planted import RIGHT, SHAPES, draw, made
from tinygrad_bn.testing import GradCheckError, check_accumulation


@pytest.mark.parametrize("name", RIGHT)
def test_right_ops_pass(name):
    check_accumulation(RIGHT[name], *draw(*SHAPES[name]))


def test_a_rule_that_remembers_its_first_use_is_caught():
    seen = []

    def forward(x):
        seen.append(x * 1.0)
        return x * x

    def rule(g, x):
        return g * 2.0 * (x if len(seen) < 4 else x * 0.0)

    with pytest.raises(GradCheckError, match="input 0"):
        check_accumulation(made(forward, x=rule), *draw((3,)))


def test_a_gradient_that_is_set_and_not_added_is_caught(monkeypatch):
    backward = tg.Tensor.backward

    def forgetful(self, *args, **kwargs):
        x.grad = None
        backward(self, *args, **kwargs)

    x = tg.Tensor(np.ones(3), requires_grad=True)
    monkeypatch.setattr(tg.Tensor, "backward", forgetful)
    # The function smuggles in a leaf of its own, as a layer does its parameters.
    report = check_accumulation(lambda t: t * x, np.arange(3.0))
    assert report.check == "check_accumulation"
    monkeypatch.setattr(
        tg.Tensor, "backward", lambda self, g, retain_graph=None: backward(self, g * 0.5)
    )
    with pytest.raises(GradCheckError, match=r"two backward\(\) calls"):
        check_accumulation(lambda t: t * 3.0, np.arange(3.0))


def test_an_input_without_influence_counts_as_zero():
    check_accumulation(lambda x, y: x * 2.0, np.ones(3), np.ones(2))
