"""Softmax and cross-entropy: by definition, at the ends of the range, at any order, and errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import testing
from tinygrad_bn.ops.loss import cross_entropy, log_softmax, logsumexp, softmax

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def one_hot(labels, classes, dtype=np.float64):
    return np.moveaxis(np.eye(classes, dtype=dtype)[labels], -1, 1)


@given(rng=seeds, scale=st.sampled_from([1.0, 50.0, 1e4, 1e30]), axis=st.integers(-3, 2))
def test_softmax_and_its_logarithm_follow_the_definition_at_any_scale(rng, scale, axis):
    x = rng.normal(size=(2, 3, 4)) * scale
    exact = x.astype(np.longdouble)
    exact = exact - exact.max(axis, keepdims=True)
    total = np.exp(exact).sum(axis, keepdims=True)
    # The shift rounds each logit by half a unit in its last place.
    tolerance = 4e-16 * np.abs(x).max() + 1e-15
    np.testing.assert_allclose(log_softmax(x, axis=axis), exact - np.log(total), atol=tolerance)
    np.testing.assert_allclose(
        softmax(x, axis=axis), np.exp(exact) / total, rtol=min(1.0, tolerance * 2), atol=1e-300
    )
    np.testing.assert_allclose(softmax(x, axis=axis).sum(axis), 1.0)


@given(rng=seeds, shift=st.sampled_from([-1e4, 1e4]))
def test_adding_a_number_to_all_logits_changes_nothing(rng, shift):
    x = rng.integers(-8, 8, (3, 5)).astype(np.float32)  # exact sums
    labels = rng.integers(0, 5, 3)
    np.testing.assert_array_equal(softmax(x), softmax(x + np.float32(shift)))
    assert cross_entropy(x, labels) == cross_entropy(x + np.float32(shift), labels)


@given(
    rng=seeds,
    axis=st.sampled_from([0, 1, -1, (0, 2), (0, 1, 2)]),
    keepdims=st.booleans(),
)
def test_logsumexp_follows_the_definition(rng, axis, keepdims):
    x = rng.normal(size=(2, 3, 4))
    expected = np.log(np.exp(x).sum(axis, keepdims=keepdims))
    np.testing.assert_allclose(logsumexp(x, axis=axis, keepdims=keepdims), expected)
    huge = logsumexp(x + 1e4, axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(huge, expected + 1e4)


@given(
    rng=seeds,
    extra=st.sampled_from([(), (2,), (2, 3)]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_labels_and_their_one_hot_rows_give_the_same_loss_and_gradient(rng, extra, reduction):
    logits = rng.normal(size=(4, 5, *extra)) * 5
    labels = rng.integers(0, 5, (4, *extra)).astype(rng.choice(["int64", "uint8", "int32"]))
    rows = one_hot(labels, 5, rng.choice([np.float64, np.int64]))
    x, y = (tg.Tensor(logits, requires_grad=True) for _ in range(2))
    a, b = (
        cross_entropy(x, labels, reduction=reduction),
        cross_entropy(y, rows, reduction=reduction),
    )
    logs = np.take_along_axis(log_softmax(logits, axis=1), labels[:, None].astype(int), 1)[:, 0]
    expected = {"none": -logs, "sum": -logs.sum(), "mean": -logs.mean()}[reduction]
    np.testing.assert_allclose(a.data, expected, rtol=1e-12)
    np.testing.assert_allclose(b.data, expected, rtol=1e-12)
    g = rng.normal(size=a.shape)
    a.backward(g)
    b.backward(g)
    np.testing.assert_allclose(x.grad.data, y.grad.data, rtol=1e-12, atol=1e-15)


@given(rng=seeds, reduction=st.sampled_from(["mean", "sum", "none"]), labelled=st.booleans())
def test_first_and_second_order_agree_with_differences(rng, reduction, labelled):
    logits = rng.normal(size=(3, 4, 2))
    fn = lambda *inputs: cross_entropy(*inputs, reduction=reduction)  # noqa: E731
    # Rows that do not sum to 1, so that the factor Σ t is seen.
    target = rng.integers(0, 4, (3, 2)) if labelled else rng.uniform(0.1, 1.0, logits.shape)
    testing.check_grad(fn, logits, target)
    testing.check_double_grad(fn, logits, target)


def test_the_third_derivative_of_the_loss_is_that_of_logsumexp():
    # d³/dx³ log(eˣ + 1) = s (1 - s) (1 - 2 s)
    x = tg.Tensor(np.array([[0.3, 0.0]]), requires_grad=True)
    g = cross_entropy(x, tg.Tensor(np.array([1])))
    for _ in range(3):
        (g,) = tg.grad(g.sum() if g.ndim < 2 else g[0, 0], x, create_graph=True)
    s = 1 / (1 + np.exp(-0.3))
    np.testing.assert_allclose(g.data[0, 0], s * (1 - s) * (1 - 2 * s))


def test_an_impossible_class_has_no_probability_and_no_gradient():
    x = tg.Tensor(np.array([[0.0, -np.inf, 0.0]]), requires_grad=True)
    assert softmax(x).tolist() == [[0.5, 0.0, 0.5]]
    assert logsumexp(x).item() == pytest.approx(np.log(2))
    for target in (np.array([0]), np.array([[1.0, 0.0, 0.0]])):
        loss = cross_entropy(x, target)
        assert loss.item() == pytest.approx(np.log(2))
        (gx,) = tg.grad(loss, x)
        assert gx.tolist() == [[-0.5, 0.0, 0.5]]
    assert cross_entropy(x, np.array([1])).item() == np.inf


def test_nothing_possible_is_minus_infinity_for_logsumexp_and_gets_no_gradient():
    x = tg.Tensor(np.array([[-np.inf, -np.inf], [0.0, 0.0]]), requires_grad=True)
    out = logsumexp(x)
    assert out.tolist() == [-np.inf, pytest.approx(np.log(2))]
    out.backward(np.ones(2))
    assert x.grad.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_the_mean_over_an_empty_batch_is_nan_and_its_gradient_empty():
    for target in (np.zeros(0, int), np.zeros((0, 3))):
        x = tg.Tensor(np.zeros((0, 3)), requires_grad=True)
        loss = cross_entropy(x, target)
        assert np.isnan(loss.item())
        loss.backward()
        assert x.grad.shape == (0, 3)
        assert cross_entropy(np.zeros((0, 3)), target, reduction="sum") == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_are_kept_and_float16_is_rounded_once(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 1000)).astype(dtype)
    labels = rng.integers(0, 1000, 64)
    for out in (softmax(x), log_softmax(x), logsumexp(x), cross_entropy(x, labels)):
        assert out.dtype == dtype
    wide = x.astype(np.float32) if dtype == np.float16 else x
    np.testing.assert_array_equal(softmax(x), softmax(wide).astype(dtype))
    assert cross_entropy(x, labels) == cross_entropy(wide, labels).astype(dtype)
    t = tg.Tensor(x, requires_grad=True)
    cross_entropy(t, labels).backward()
    assert t.grad.dtype == dtype


def test_integer_logits_give_float64():
    assert softmax(np.array([0, 0])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("logits", "target", "parts"),
    [
        (np.zeros(3), np.array(0), ["(3,)", "axis 1", "logits[None]"]),
        (np.zeros((2, 3)), np.zeros(3, int), ["(3,)", "(2, 3)", "labels of shape (2,)"]),
        (np.zeros((2, 3)), np.zeros(2), ["float64", "integer", "astype('int64')"]),
        (np.zeros((2, 3)), np.array([0, 3]), ["from 0 to 3", "classes 0 to 2"]),
        (np.zeros((2, 3)), np.array([-1, 0]), ["from -1 to 0", "classes 0 to 2"]),
        (np.zeros((2, 0)), np.zeros(2, int), ["(2, 0)"]),
    ],
)
def test_cross_entropy_says_what_came_and_what_was_expected(logits, target, parts):
    with pytest.raises(ValueError, match=r"^cross_entropy: ") as caught:
        cross_entropy(logits, target)
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_reduction_or_axis_is_refused():
    with pytest.raises(ValueError, match=r"reduction 'avg'.*'mean'"):
        cross_entropy(np.zeros((1, 2)), np.zeros(1, int), reduction="avg")
    for function in (softmax, log_softmax, logsumexp):
        for x, axis in ((np.zeros((2, 3)), 2), (np.zeros((2, 0)), 1), (np.zeros(()), 0)):
            with pytest.raises(ValueError, match=rf"^{function.name}: axis is {axis}"):
                function(x, axis=axis)
