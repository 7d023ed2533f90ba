"""The kit against itself: a checker that was made blind must not go unnoticed.

`sees` states what a sighted kit does. It holds for the kit as it is, and fails for every way of
blinding it, so a change that blinds the kit fails a test.
"""

import numpy as np
import pytest

from tests.testing.planted import SHAPES, WRONG, WRONG_TWICE, draw, made
from tinygrad_bn.testing import (
    GradCheckError,
    Inconclusive,
    check_double_grad,
    check_grad,
    gradients,
    probe,
    report,
)
from tinygrad_bn.testing.differences import derivative


def rejects(check, fn, *inputs, as_inconclusive=False):
    try:
        check(fn, *inputs)
    except Inconclusive:
        return as_inconclusive
    except GradCheckError:
        return not as_inconclusive
    return False


def slightly_wrong():
    """tanh with a derivative that is a ten-millionth too large."""
    return made(lambda x: np.tanh(x), x=lambda g, out: g * (1 - out * out) * (1 + 1e-7))


def sees():
    (x,) = draw((3, 4))
    # Of a linear function nothing but rounding is left: 16 ε over a step of some ε^⅓.
    assert check_grad(lambda t: t * 2.0, x).resolution < 3e-9
    assert rejects(check_grad, slightly_wrong(), x)
    for op in (
        WRONG["batch norm without its mean term"][0],
        WRONG["batch norm without its x̂ term"][0],
    ):
        assert rejects(check_grad, op, *draw(*SHAPES["normalize"]))
    for op in WRONG_TWICE.values():
        assert rejects(check_double_grad, op, *draw(*SHAPES[op.name]))
    assert rejects(check_grad, lambda t: abs(t), np.array([0.0, 1.0]), as_inconclusive=True)


def test_the_kit_sees():
    sees()


def loosened(monkeypatch):
    total = report.Tolerance.total.fget
    monkeypatch.setattr(report.Tolerance, "total", property(lambda self: 1000 * total(self)))


def with_ones_for_cotangents(monkeypatch):
    monkeypatch.setattr(
        gradients,
        "_cotangents",
        lambda name, outputs, given, seed: [np.ones_like(o) for o in outputs],
    )


def without_kinks(monkeypatch):
    monkeypatch.setattr(probe.Probe, "_kinked", lambda *args: False)


def without_second_order(monkeypatch):
    # The derivative of the backward pass compared with itself.
    monkeypatch.setattr(gradients.SecondOrder, "value", lambda self, arrays: [])


def with_zero_directions(monkeypatch):
    monkeypatch.setattr(
        probe.Probe, "direction", lambda self, i, k: np.zeros(self.problem.inputs[i].shape)
    )


def with_huge_truncation(monkeypatch):
    def coarse(*args):
        found = derivative(*args)
        return type(found)(**{**vars(found), "truncation": 1e-5 * abs(found.value)})

    monkeypatch.setattr(probe, "derivative", coarse)


@pytest.mark.parametrize(
    "blind",
    [
        loosened,
        with_ones_for_cotangents,
        without_kinks,
        without_second_order,
        with_zero_directions,
        with_huge_truncation,
    ],
    ids=lambda blind: blind.__name__,
)
def test_a_blinded_kit_is_caught(blind, monkeypatch):
    blind(monkeypatch)
    with pytest.raises((AssertionError, TypeError)):
        sees()
