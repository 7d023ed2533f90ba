from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.testing import GradCheckError, Law, assert_law
from tinygrad_bn.testing import strategies as tgst
from tinygrad_bn.testing.laws import EVALUATION_LAWS, TRAINING_LAWS


def test_equal_sides_pass_and_others_do_not():
    assert assert_law(np.ones(3), np.ones(3), roundings=0).check == "assert_law"
    assert_law([1.0, np.nan], [1.0, np.nan], roundings=0)
    with pytest.raises(GradCheckError, match=r"x = x does not hold at \[1\]"):
        assert_law([1.0, 2.0], [1.0, 2.001], law="x = x")


def test_what_cancels_is_measured_by_its_terms():
    left, right = 1e8 - 1e8 * (1 + 1e-16) + 1e-9, 0.0
    assert_law(left, right, scale=1e8)
    with pytest.raises(GradCheckError):
        assert_law(left, right)


def test_the_narrower_dtype_sets_the_tolerance():
    assert_law(np.float32(1.0), 1.0 + 1e-6)
    with pytest.raises(GradCheckError):
        assert_law(np.float64(1.0), 1.0 + 1e-6)


def test_nan_against_a_number_fails():
    with pytest.raises(GradCheckError):
        assert_law([np.nan], [1.0], scale=np.inf)


def run_of(function, d):
    def run(x, weight, bias, cotangent, eps, axis):
        inputs = [tg.Tensor(a, requires_grad=True) for a in (x, weight, bias)]
        y = function(*inputs, eps, axis)
        return (y.numpy(), *(g.numpy() for g in tg.grad(y, inputs, cotangent)))

    return run


def in_training(x, weight, bias, eps, axis):
    return F.batch_norm(x, weight=weight, bias=bias, training=True, eps=eps, axis=axis)


@given(tgst.batch_norm_inputs(training=True, affine=True, max_ratio=10.0, max_spread=10.0))
def test_training_laws_hold_exactly_where_they_say_so(d):
    for law in TRAINING_LAWS:
        law.check(run_of(in_training, d), d)


@given(tgst.batch_norm_inputs(training=False, affine=True, max_ratio=10.0, max_spread=10.0))
def test_evaluation_laws_hold(d):
    def in_evaluation(x, weight, bias, eps, axis):
        return F.batch_norm(x, d.running_mean, d.running_var, weight, bias, eps=eps, axis=axis)

    for law in EVALUATION_LAWS:
        law.check(run_of(in_evaluation, d), d)


#: Faults of (y, gx, gweight, gbias) and the law that sees each without a reference.
FAULTS = {
    "sum of gx": lambda y, gx, gw, gb, d: (y, gx + 1e-6, gw, gb),
    "component along x̂": lambda y, gx, gw, gb, d: (y, gx + y * 1e-6, gw, gb),
    "self-adjoint": lambda y, gx, gw, gb, d: (y, gx * np.abs(d.cotangent), gw, gb),
    "power of two": lambda y, gx, gw, gb, d: (y + 1e-9 * d.x, gx, gw, gb),
    "negation": lambda y, gx, gw, gb, d: (np.abs(y), gx, gw, gb),
    "linear in g and γ": lambda y, gx, gw, gb, d: (y, gx * np.abs(gx), gw, gb),
    "shift": lambda y, gx, gw, gb, d: (y + 1e-3 * d.x, gx, gw, gb),
    "permutation": lambda y, gx, gw, gb, d: (y, gx * _first_larger(y), gw, gb),
    "duplication": lambda y, gx, gw, gb, d: (y, gx / d.x.shape[0], gw, gb),
    "channels apart": lambda y, gx, gw, gb, d: (y, gx + d.cotangent.sum() * 1e-6, gw, gb),
    "Euler": lambda y, gx, gw, gb, d: (y, gx, gw * 1.001, gb),
    "moments": lambda y, gx, gw, gb, d: (y * 1.001, gx, gw, gb),
}


def _first_larger(y):
    scale = np.ones_like(y)
    scale[0] = 1.001
    return scale


@pytest.mark.parametrize("law", TRAINING_LAWS, ids=lambda law: law.name)
def test_every_training_law_sees_a_fault(law):
    rng = np.random.default_rng(0)
    d = tgst.BatchNormInputs(
        x=rng.normal(size=(6, 3, 2)),
        weight=np.array([0.5, -1.0, 2.0]),
        bias=rng.normal(size=3),
        running_mean=np.zeros(3),
        running_var=np.ones(3),
        training=True,
        momentum=0.1,
        eps=0.1,
        cotangent=rng.normal(size=(6, 3, 2)),
        axis=1,
    )
    right = run_of(in_training, d)
    law.check(right, d)

    def wrong(x, weight, bias, cotangent, eps, axis):
        given = replace(d, x=x, weight=weight, bias=bias, cotangent=cotangent, eps=eps)
        return FAULTS[law.name](*right(x, weight, bias, cotangent, eps, axis), given)

    with pytest.raises(GradCheckError, match="does not hold"):
        law.check(wrong, d)


def test_a_law_of_ones_own():
    law = Law("even", "f(-x) = f(x)", lambda f, x: [(f(-x), f(x), np.abs(f(x)))])
    law.check(np.cos, np.arange(3.0))
    with pytest.raises(GradCheckError, match="even"):
        law.check(np.sin, np.arange(3.0))
