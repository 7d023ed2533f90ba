"""The Batch Renorm layer: the paper's recursion, and limits that open with the batches seen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn import nn


def batches(count, seed=0):
    return np.random.default_rng(seed).normal(1, 2, (count, 8, 3))


@given(
    start=st.integers(0, 3),
    r_more=st.integers(0, 4),
    d_more=st.integers(0, 4),
    r_max=st.floats(1, 4),
    d_max=st.floats(0, 5),
    seed=st.integers(0, 2**31),
)
def test_training_follows_the_paper_while_the_limits_open(
    start, r_more, d_more, r_max, d_max, seed
):
    warmup = (start, start + r_more, start + d_more)
    bn = nn.BatchRenorm(3, 1e-3, 0.25, r_max=r_max, d_max=d_max, warmup=warmup, dtype="float64")
    bn.weight.data[...] = [0.5, -2, 1]
    bn.bias.data[...] = [1, 2, 3]
    mean, var = np.zeros(3), np.ones(3)
    for k, x in enumerate(batches(6, seed)):
        # k batches were seen before this one
        opened = [
            np.interp(k, [start, end], [0, 1]) if end > start else k >= end for end in warmup[1:]
        ]
        r_now, d_now = 1 + opened[0] * (r_max - 1), opened[1] * d_max
        np.testing.assert_allclose(bn.limits(), (r_now, d_now), rtol=1e-12)
        sigma, batch_sigma = np.sqrt(var + 1e-3), np.sqrt(x.var(axis=0) + 1e-3)
        r = np.clip(batch_sigma / sigma, 1 / r_now, r_now)
        d = np.clip((x.mean(axis=0) - mean) / sigma, -d_now, d_now)
        expected = ((x - x.mean(axis=0)) / batch_sigma * r + d) * [0.5, -2, 1] + [1, 2, 3]
        np.testing.assert_allclose(bn(x).numpy(), expected, rtol=1e-9, atol=1e-9)
        mean = 0.75 * mean + 0.25 * x.mean(axis=0)
        var = 0.75 * var + 0.25 * x.var(axis=0, ddof=1)
    np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bn.running_var.numpy(), var, rtol=1e-12)
    x = batches(1, seed + 1)[0]
    expected = (x - mean) / np.sqrt(var + 1e-3) * [0.5, -2, 1] + [1, 2, 3]
    np.testing.assert_allclose(bn.eval()(x).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_before_the_warm_up_ends_it_is_batch_norm_and_without_one_limits_are_open():
    x = batches(1)[0]
    plain = nn.BatchNorm(3, dtype="float64")
    early = nn.BatchRenorm(3, dtype="float64")
    np.testing.assert_allclose(early(x).numpy(), plain(x).numpy(), rtol=1e-12, atol=1e-12)
    assert early.limits() == (1.0, 0.0)
    assert nn.BatchRenorm(3, warmup=None).limits() == (3.0, 5.0)
    early.num_batches_tracked.data[...] = 22500
    assert early.limits() == (2.0, 4.375)  # the paper's: r to 40000, d to 25000, both from 5000


def test_limits_may_be_set_in_the_course_of_training():
    bn = nn.BatchRenorm(3, warmup=None)
    bn.r_max, bn.d_max = 1.0, 0.0
    x = batches(1)[0]
    np.testing.assert_allclose(bn(x).numpy(), nn.BatchNorm(3)(x).numpy(), rtol=1e-12, atol=1e-12)


def test_an_empty_batch_and_a_frozen_layer_move_nothing():
    bn = nn.BatchRenorm(3)
    assert bn(tg.zeros((0, 3))).shape == (0, 3)
    bn.freeze()(batches(1)[0])
    assert bn.num_batches_tracked.item() == 0 and bn.running_mean.tolist() == [0, 0, 0]


def test_a_forward_that_moved_nothing_is_not_the_one_that_is_recomputed():
    x = np.random.default_rng(0).normal(3, 2, (3, 8, 3))
    bn = nn.BatchRenorm(3, warmup=None)
    bn(x[0])
    y = bn(x[1]).numpy()
    nn.update_batch_norm(bn, x)
    with bn.recomputing():
        np.testing.assert_array_equal(bn(x[1]).numpy(), y)


def test_momentum_may_be_none_or_of_another_convention():
    kept = []
    for options in ({"momentum": None}, {"momentum": 0.0, "convention": "keras", "axis": 1}):
        bn = nn.BatchRenorm(3, **options)
        bn(batches(1)[0])
        kept.append(bn.running_mean.numpy())
    np.testing.assert_array_equal(*kept)  # the first batch alone


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r_max": 0.5}, "r_max is 0.5 and d_max 5.0, expected r_max >= 1"),
        ({"d_max": -1}, "r_max is 3.0 and d_max -1, expected"),
        ({"warmup": (5, 4, 6)}, r"warmup is \(5, 4, 6\)"),
        ({"warmup": (-1, 4, 6)}, r"warmup is \(-1, 4, 6\)"),
    ],
)
def test_options_are_checked_at_once(options, words):
    with pytest.raises(ValueError, match=f"BatchRenorm: {words}"):
        nn.BatchRenorm(3, **options)


def test_a_mask_is_refused_and_the_text_names_the_limits():
    with pytest.raises(ValueError, match="takes no mask"):
        nn.BatchRenorm(3)(batches(1)[0], np.ones((8, 1)))
    assert "r_max=3.0, d_max=5.0, warmup=(5000, 40000, 25000)" in repr(nn.BatchRenorm(3))


@pytest.mark.parametrize("shape", [(8, 3), (64, 3, 8, 8)])
def test_float16_is_rounded_once(shape):
    rng = np.random.default_rng(5)
    x = rng.normal(1, 2, shape).astype(np.float16)
    mean, var = rng.normal(0, 1, 3).astype(np.float32), rng.uniform(1, 9, 3).astype(np.float32)
    weight, bias = rng.normal(0, 1, (2, 3)).astype(np.float32)
    y = F.batch_renorm(x, mean.copy(), var.copy(), weight, bias, training=True)
    along = (1, 3) + (1,) * (len(shape) - 2)
    axes = tuple(i for i in range(len(shape)) if i != 1)
    wide = x.astype(np.longdouble)
    mean, var, weight, bias = (
        v.astype(np.longdouble).reshape(along) for v in (mean, var, weight, bias)
    )
    batch_mean = wide.mean(axis=axes, keepdims=True)
    batch_sigma = np.sqrt(wide.var(axis=axes, keepdims=True) + 1e-5)
    sigma = np.sqrt(var + 1e-5)
    r = np.clip(batch_sigma / sigma, 1 / 3, 3)
    d = np.clip((batch_mean - mean) / sigma, -5, 5)
    right = weight * ((wide - batch_mean) / batch_sigma * r + d) + bias
    half_unit = np.spacing(np.abs(right.astype(np.float16))).astype(np.float64) / 2
    # Besides that rounding, float32 work: some 10 roundings of numbers up to 10.
    assert y.dtype == np.float16 and (np.abs(y - right) <= half_unit + 1e-5).all()
