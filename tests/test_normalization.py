"""The functional face of batch norm: running statistics, arguments, errors."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import functional as F


def draw(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@given(
    momentum=st.floats(0, 1),
    correction=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_running_statistics_follow_the_formula(momentum, correction, seed):
    x = draw((5, 3, 4), seed) * 3 + 1
    mean, var = draw(3, seed + 1), np.abs(draw(3, seed + 2))
    expected_mean = (1 - momentum) * mean + momentum * x.mean((0, 2))
    expected_var = (1 - momentum) * var + momentum * x.var((0, 2), ddof=correction)
    F.batch_norm(x, mean, var, training=True, momentum=momentum, correction=correction)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(var, expected_var, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_momentum_of_one_takes_the_batchs_statistics_and_of_zero_keeps_the_old(dtype, size):
    x = draw((50, 3)) * size
    for momentum, mean, var in ((1, x.mean(0), x.var(0)), (0, np.full(3, 0.1), np.full(3, 0.7))):
        running = np.full(3, 0.1, dtype), np.full(3, 0.7, dtype)
        F.batch_norm(x, *running, training=True, momentum=momentum, correction=0)
        # The sums of the two differ by some roundings of float64, and their means cancel.
        rounding = 4 * np.finfo(dtype).eps
        np.testing.assert_allclose(running[0], mean.astype(dtype), rounding, rounding * size)
        np.testing.assert_allclose(running[1], var.astype(dtype), rounding)


def test_running_statistics_may_be_tensors_and_the_write_is_seen_by_pending_backwards():
    x = tg.Tensor(draw((5, 3)), requires_grad=True)
    mean, var = tg.zeros(3), tg.ones(3)
    evaluated = F.batch_norm(x, mean, var).sum()
    F.batch_norm(x, mean, var, training=True)
    with pytest.raises(RuntimeError, match=r"batch_norm_given.*changed in place"):
        evaluated.backward()


def test_the_output_of_training_does_not_depend_on_running_statistics():
    x = draw((5, 3))
    alone = F.batch_norm(x, training=True)
    assert (F.batch_norm(x, np.full(3, 9.0), np.full(3, 7.0), training=True) == alone).all()


def test_without_running_statistics_evaluation_uses_the_batch():
    x = draw((5, 3))
    assert (F.batch_norm(x) == F.batch_norm(x, training=True)).all()


@pytest.mark.parametrize("axis", [-1, 2, (0, 2), (2, 0)])
def test_axis_names_the_kept_axes(axis):
    x, named = draw((4, 5, 3)), axis if isinstance(axis, tuple) else (axis % 3,)
    reduced = tuple(i for i in range(3) if i not in named)
    expected = (x - x.mean(reduced, keepdims=True)) / np.sqrt(x.var(reduced, keepdims=True) + 1e-5)
    np.testing.assert_allclose(F.batch_norm(x, training=True, axis=axis), expected, atol=1e-12)


def test_a_weight_over_two_axes_follows_the_order_of_x():
    x, weight = draw((4, 2, 3)), draw((2, 3), 1)
    y = F.batch_norm(x, weight=weight, training=True, axis=(2, 1))
    np.testing.assert_allclose(y, weight * F.batch_norm(x, training=True, axis=(1, 2)), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_dtype_of_x_is_kept_and_gradients_have_the_dtypes_of_their_inputs(dtype):
    x = tg.Tensor(draw((40, 3, 40), dtype=dtype), requires_grad=True)
    weight = tg.Tensor(np.ones(3, np.float32), requires_grad=True)
    y = F.batch_norm(x, weight=weight, training=True)
    y.backward(draw(y.shape, 1, dtype))
    assert y.dtype == dtype and x.grad.dtype == dtype and weight.grad.dtype == np.float32


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_result_zero_gradients_and_untouched_statistics(training):
    mean, var = np.full(3, 0.5), np.full(3, 2.0)
    x = tg.zeros((0, 3, 4), requires_grad=True)
    weight, bias = tg.ones(3, requires_grad=True), tg.zeros(3, requires_grad=True)
    y = F.batch_norm(x, mean, var, weight, bias, training=training)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4)
    assert (weight.grad.numpy() == 0).all() and (bias.grad.numpy() == 0).all()
    assert (mean == 0.5).all() and (var == 2.0).all()


def test_transposed_strided_and_read_only_inputs_give_the_same_and_stay_as_they_are():
    base = draw((16, 12, 12, 6), dtype=np.float32)
    expected = F.batch_norm(base, training=True, axis=3)
    transposed = base.transpose(0, 3, 1, 2)
    got = F.batch_norm(transposed, training=True).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(got, expected)
    strided = np.repeat(base, 2, axis=3)[..., ::2]
    np.testing.assert_allclose(F.batch_norm(strided, training=True, axis=3), expected, atol=1e-6)
    frozen = base.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(F.batch_norm(frozen, training=True, axis=3), expected)
    np.testing.assert_array_equal(frozen, base)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": draw(5)}, ValueError, r"shape \(5,\), expected at least 2 dimensions"),
        ({"x": draw((4, 3)), "weight": np.ones(4)}, ValueError, r"weight has shape \(4,\).*\(3,\)"),
        ({"x": np.ones((4, 3), int)}, TypeError, "int64, expected a floating dtype"),
        ({"x": [[1.0, 2.0]]}, TypeError, "x is a list, expected an array or a Tensor"),
        ({"x": draw((1, 3)), "training": True}, ValueError, "one value per channel"),
        ({"x": draw((4, 3)), "axis": 2}, ValueError, "axis 2 does not name distinct axes"),
        ({"x": draw((4, 3)), "axis": (1, -1)}, ValueError, "does not name distinct axes"),
        ({"x": draw((4, 3)), "axis": (0, 1)}, ValueError, "keeps every axis"),
        ({"x": draw((4, 3)), "eps": -1.0}, ValueError, "eps is -1.0, expected a number >= 0"),
        ({"x": draw((4, 3)), "running_mean": np.ones(3)}, ValueError, "give both"),
        (
            {
                "x": draw((4, 3)),
                "running_mean": np.zeros(3),
                "running_var": np.ones(3),
                "training": True,
                "momentum": 1.5,
            },
            ValueError,
            "momentum is 1.5, expected a weight of the new value",
        ),
        ({"x": draw((4, 3)), "correction": -1}, ValueError, "correction is -1, expected a number"),
        ({"x": draw((4, 3)), "correction": np.nan}, ValueError, "correction is nan"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        F.batch_norm(**arguments)


def test_a_wrong_momentum_leaves_the_statistics_alone():
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="momentum"):
        F.batch_norm(draw((4, 3)), mean, var, training=True, momentum=float("nan"))
    assert (mean == 0).all() and (var == 1).all()


@pytest.mark.parametrize("function", [F.batch_norm, F.batch_norm_relu, F.batch_renorm])
def test_statistics_that_training_cannot_move_are_refused_before_either_is_moved(function):
    mean, var = np.zeros(3), np.ones(3)
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=f"{function.__name__}: running_var is read-only"):
        function(draw((4, 3)), mean, frozen, training=True)
    with pytest.raises(TypeError, match="running_mean is int64, expected a floating dtype"):
        function(draw((4, 3)), np.zeros(3, np.int64), var, training=True)
    assert (mean == 0).all() and (var == 1).all()
    function(draw((4, 3)), mean, frozen)  # evaluation only reads them
    with pytest.raises(ValueError, match=f"{function.__name__}: momentum is 2.0"):
        function(draw((4, 3)), mean, var, training=True, momentum=2)


def test_one_value_per_channel_is_allowed_in_evaluation_and_with_spatial_axes():
    assert F.batch_norm(draw((1, 3)), np.zeros(3), np.ones(3)).shape == (1, 3)
    assert F.batch_norm(draw((1, 3, 2)), training=True).shape == (1, 3, 2)


def test_evaluation_with_float32_statistics_is_computed_in_the_wide_dtype_of_x():
    x = draw((6, 3))
    mean, var = (draw(3, seed) ** 2 for seed in (1, 2))
    narrow = [v.astype(np.float32) for v in (mean, var)]
    wide = [v.astype(np.float64) for v in narrow]
    t = tg.Tensor(x, requires_grad=True)
    y = F.batch_norm(t, *narrow)
    y.backward(draw((6, 3), 3))
    expected = (x - wide[0]) / np.sqrt(wide[1] + 1e-5)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-14)
    np.testing.assert_allclose(
        t.grad.numpy(), draw((6, 3), 3) / np.sqrt(wide[1] + 1e-5), rtol=1e-14
    )
