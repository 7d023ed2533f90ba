"""The functional face of layer, group, instance and RMS norm: shapes, statistics, errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import functional as F


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape)


def normalized(x, axes, eps):
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


@pytest.mark.parametrize(
    ("shape", "sizes"), [((4, 6), 6), ((2, 3, 4), (4,)), ((2, 3, 4), (3, 4)), ((5,), (5,))]
)
def test_layer_norm_goes_over_the_last_axes(shape, sizes):
    sizes_tuple = (sizes,) if isinstance(sizes, int) else sizes
    x, weight, bias = draw(shape), draw(sizes_tuple, 1), draw(sizes_tuple, 2)
    axes = tuple(range(len(shape) - len(sizes_tuple), len(shape)))
    expected = normalized(x, axes, 1e-3) * weight + bias
    np.testing.assert_allclose(F.layer_norm(x, sizes, weight, bias, 1e-3), expected, rtol=1e-12)
    square = (x**2).mean(axis=axes, keepdims=True)
    expected = x / np.sqrt(square + 1e-3) * weight
    np.testing.assert_allclose(F.rms_norm(x, sizes, weight, 1e-3), expected, rtol=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 6])
@given(seed=st.integers(0, 2**31))
def test_group_norm_goes_over_groups_of_neighbouring_channels(axis, num_groups, seed):
    x, g = np.random.default_rng(seed).standard_normal((2, 3, 6, 4, 2))
    weight, bias = draw(6, seed), draw(6, seed + 1)
    parts = np.split(x, num_groups, axis=1)
    expected = np.concatenate([normalized(part, (1, 2, 3), 1e-5) for part in parts], axis=1)
    expected = expected * weight[:, None, None] + bias[:, None, None]
    t = tg.Tensor(np.moveaxis(x, 1, axis).copy(), requires_grad=True)
    y = F.group_norm(t, num_groups, weight, bias, axis=axis)
    np.testing.assert_allclose(np.moveaxis(y.numpy(), axis, 1), expected, rtol=1e-9, atol=1e-11)
    y.backward(np.moveaxis(g, 1, axis))
    u = tg.Tensor(x, requires_grad=True)
    grouped = u.reshape(3, num_groups, -1)
    mean = grouped.mean(axis=2, keepdims=True)
    z = (grouped - mean) / (grouped.var(axis=2, keepdims=True) + 1e-5).sqrt()
    z = z.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    z.backward(g)
    got = np.moveaxis(t.grad.numpy(), axis, 1)
    np.testing.assert_allclose(got, u.grad.numpy(), rtol=1e-8, atol=1e-9)


def test_the_four_are_one_where_their_means_are():
    x = draw((3, 4, 5))
    flat = F.layer_norm(x, (4, 5))
    np.testing.assert_allclose(F.group_norm(x, 1), flat, rtol=1e-12)
    np.testing.assert_allclose(F.group_norm(x, 4), F.instance_norm(x), rtol=1e-12)
    ghosts = F.batch_norm(x, training=True, groups=3)
    np.testing.assert_allclose(F.instance_norm(x), ghosts, rtol=1e-12, atol=1e-13)
    centred = x - x.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(F.rms_norm(centred, (4, 5), eps=1e-5), flat, rtol=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
@given(momentum=st.floats(0, 1), samples=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_running_statistics_of_instances_are_averages_over_the_samples(
    axis, momentum, samples, seed
):
    x = np.random.default_rng(seed).normal(3, 2, (samples, 3, 5, 2))
    weight, bias = draw(3, seed), draw(3, seed + 1)
    mean, var = draw(3, 1), draw(3, 2) ** 2
    expected_mean = (1 - momentum) * mean + momentum * x.mean(axis=(0, 2, 3))
    unbiased = x.var(axis=(2, 3), ddof=1).mean(axis=0)
    expected_var = (1 - momentum) * var + momentum * unbiased
    moved = np.moveaxis(x, 1, axis)
    y = F.instance_norm(moved, mean, var, weight, bias, momentum=momentum, axis=axis)
    expected = normalized(x, (2, 3), 1e-5) * weight[:, None, None] + bias[:, None, None]
    np.testing.assert_allclose(np.moveaxis(y, axis, 1), expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(var, expected_var, rtol=1e-12)
    given_statistics = F.instance_norm(moved, mean, var, weight, bias, False, axis=axis)
    assert (given_statistics == F.batch_norm(moved, mean, var, weight, bias, axis=axis)).all()


def test_an_empty_batch_of_instances_leaves_the_statistics():
    mean, var = np.full(3, 0.5), np.full(3, 2.0)
    assert F.instance_norm(np.zeros((0, 3, 4)), mean, var).shape == (0, 3, 4)
    assert (mean == 0.5).all() and (var == 2.0).all()
    assert F.layer_norm(np.zeros((0, 3)), 3).shape == (0, 3)
    assert F.group_norm(np.zeros((0, 4, 3)), 2).shape == (0, 4, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_default_eps_of_rms_norm_is_the_machine_epsilon(dtype):
    x = np.full((1, 2), 2.0**-8, dtype)
    eps = float(np.finfo(dtype).eps)
    expected = 2.0**-8 / np.sqrt(2.0**-16 + eps)
    np.testing.assert_allclose(F.rms_norm(x, 2), np.full((1, 2), expected, dtype), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.layer_norm(draw((4, 3)), 4), ValueError, r"normalized_shape is \(4,\)"),
        (lambda: F.layer_norm(draw((4, 3)), (2, 4, 3)), ValueError, "sizes of the last axes"),
        (lambda: F.layer_norm(draw((4, 3)), ()), ValueError, r"normalized_shape is \(\)"),
        (lambda: F.rms_norm(draw((4, 3)), 4), ValueError, "rms_norm: x has shape"),
        (lambda: F.layer_norm(np.ones((4, 3), int), 3), TypeError, "int64, expected a floating"),
        (lambda: F.rms_norm([1.0], 1), TypeError, "x is a list"),
        (lambda: F.layer_norm(draw((4, 3)), 3, draw(4)), ValueError, r"weight has shape \(4,\)"),
        (lambda: F.layer_norm(draw((4, 1)), 1), ValueError, "layer_norm: .*one value for each mea"),
        (lambda: F.layer_norm(draw((4, 3)), 3, eps=-1), ValueError, "layer_norm: eps is -1"),
        (lambda: F.rms_norm(draw((4, 3)), 3, eps=-1), ValueError, "rms_norm: eps is -1"),
        (lambda: F.group_norm(draw((4, 6)), 4), ValueError, "num_groups=4 does not split the 6"),
        (lambda: F.group_norm(draw((4, 6)), 0), ValueError, "num_groups=0"),
        (lambda: F.group_norm(draw((4, 6)), 6), ValueError, "group_norm: .*one value for each me"),
        (lambda: F.group_norm(draw((4, 6)), 2, axis=0), ValueError, "axis=0 is the batch axis"),
        (lambda: F.group_norm(draw((4, 6)), 2, draw(4)), ValueError, r"expected \(6,\)"),
        (lambda: F.instance_norm(draw((4, 6))), ValueError, "instance_norm: .*one value for each"),
        (lambda: F.instance_norm(draw((4, 6, 2)), draw(6)), ValueError, "give both"),
        (lambda: F.instance_norm(draw((4, 6, 2)), axis=-3), ValueError, "axis=-3 is the batch"),
        (
            lambda: F.instance_norm(draw((4, 6, 2)), use_input_stats=False),
            ValueError,
            "use_input_stats=False needs",
        ),
        (
            lambda: F.instance_norm(draw((4, 6, 2)), draw(6), draw(6), momentum=2),
            ValueError,
            "momentum is 2.0, expected a weight of the new value",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
