import numpy as np
import pytest
from hypothesis import strategies as st

from tests.testing.planted import RIGHT, SHAPES, WRONG, draw, made
from tinygrad_bn.functional import batch_norm
from tinygrad_bn.ops.elementwise import exp
from tinygrad_bn.testing import (
    GradCheckError,
    Inconclusive,
    batch_norm_reference,
    check_reference,
    reference,
    verify,
    verify_batch_norm,
)
from tinygrad_bn.testing.reference import gradient_by_rules

DTYPES = ("float64", "float32", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tanh", "multiply", "mean", "softmax"])
def test_right_ops_agree_with_numpy_in_longdouble(name, dtype):
    inputs = [a.astype(dtype) for a in draw(*SHAPES[name])]
    # By difference quotients of the forward, which knows nothing of the rule.
    check_reference(RIGHT[name], *inputs, reference=RIGHT[name].forward)
    # By its rules, run in longdouble.
    check_reference(RIGHT[name], *inputs, reference=RIGHT[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sign", "missing factor", "missing term", "cotangent ignored"])
def test_wrong_gradients_are_caught_in_any_dtype(name, dtype):
    op, _ = WRONG[name]
    inputs = [a.astype(dtype) for a in draw(*SHAPES[op.name])]
    for right in (RIGHT[op.name], RIGHT[op.name].forward):
        with pytest.raises(GradCheckError, match="the gradient of input 0"):
            check_reference(op, *inputs, reference=right)


def test_wrong_output_is_caught_and_measured_in_units():
    def nearly(x):
        return np.exp(x) * np.float32(1 + 1e-5)

    with pytest.raises(GradCheckError, match=r"output 0 in float32 .* units in the last place"):
        check_reference(
            made(nearly, x=lambda g, out: g * out),
            np.linspace(-1, 1, 9, dtype=np.float32),
            reference=np.exp,
            gradients=False,
        )


def test_units_and_scale_can_be_given():
    x = np.float32([1.0, 2.0, 3.0])
    fn = lambda t: (t - t.mean()) + 1e-6  # noqa: E731
    right = lambda a: a - a.mean()  # noqa: E731
    check_reference(fn, x, reference=right, ulps=16, scale=3.0, gradients=False)
    with pytest.raises(GradCheckError, match="units in the last place"):
        check_reference(fn, x, reference=right, ulps=4, scale=1.0, gradients=False)


def test_a_gradient_can_be_given():
    x = np.linspace(-1, 1, 5)
    check_reference(exp, x, reference=np.exp, gradient=lambda g, a: g[0] * np.exp(a), ulps=4)
    with pytest.raises(GradCheckError, match="the gradient"):
        check_reference(exp, x, reference=np.exp, gradient=lambda g, a: g[0], ulps=4)


def test_infinity_is_right_where_the_right_value_overflows():
    check_reference(exp, np.float16([1.0, 20.0]), reference=np.exp, gradients=False)


def test_a_reference_that_is_nowhere_finite_is_inconclusive():
    with pytest.raises(Inconclusive, match="not finite"):
        check_reference(lambda x: x.log(), np.array([-1.0]), reference=np.log)


def largest(x):
    return (x + 1).max()


def test_of_an_empty_array_there_is_nothing_to_be_wrong():
    assert "passed" in str(check_reference(exp, np.empty((0, 3)), reference=np.exp))


def test_gradient_whose_side_of_a_kink_is_rounded_off_is_rejected():
    # Added to 1, the first two tie in float32 and share the gradient; the second is larger.
    x = np.float32([1e-9, 2e-9, -1.0])
    options = {"reference": largest, "gradient": gradient_by_rules(largest)}
    with pytest.raises(Inconclusive, match="which side of a kink"):
        check_reference(largest, x, **options)
    check_reference(largest, x.astype(np.float64), **options)


def test_gradient_that_is_wrong_beside_a_kink_is_not_excused_by_it():
    x = np.float32([1.0, 1.5, -1.0])
    wrong = made(largest, x=lambda g: g * np.float32([1, 0, 0]))
    with pytest.raises(GradCheckError) as caught:
        check_reference(wrong, x, reference=largest, gradient=gradient_by_rules(largest))
    assert caught.type is not Inconclusive


def test_wrong_shape_is_caught():
    with pytest.raises(GradCheckError, match="shapes"):
        check_reference(lambda x: x.sum(), np.ones(3), reference=lambda a: a)


def test_reports_say_where_longdouble_is_float64(monkeypatch):
    monkeypatch.setattr(reference, "WIDE", np.float64)
    monkeypatch.setattr(batch_norm_reference, "WIDE", np.float64)
    x = np.linspace(0.5, 1.0, 3)
    for report in (
        check_reference(exp, x, reference=np.exp),
        verify(exp, st.just(x), reference=np.exp, max_examples=12, seed=0),
        verify_batch_norm(batch_norm, max_examples=40, seed=0),
    ):
        assert reference.NOT_WIDER in report.notes
    # Nothing is measured against longdouble here.
    unmeasured = verify(exp.__call__, st.just(x), max_examples=12, seed=0)
    assert reference.NOT_WIDER not in unmeasured.notes
