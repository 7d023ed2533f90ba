"""Conventions: each library's formula, its defaults, and running state that changes over."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import nn

#: As the libraries document them: which value momentum weights, momentum, eps, correction, axis.
DOCUMENTED = {
    "torch": ("new", 0.1, 1e-5, 1, 1),
    "keras": ("old", 0.99, 1e-3, 0, -1),
    "flax": ("old", 0.99, 1e-5, 0, -1),
    "chainer": ("old", 0.9, 2e-5, 1, 1),
}
NAMES = sorted(DOCUMENTED)


def batches(count, seed=0, m=6):
    return np.random.default_rng(seed).normal(3, 2, (count, m, 3))


@pytest.mark.parametrize("name", NAMES)
def test_a_convention_brings_its_librarys_defaults(name):
    _, momentum, eps, correction, axis = DOCUMENTED[name]
    bn = nn.BatchNorm(3, convention=name)
    assert (bn.momentum, bn.eps, bn.correction, bn.axis) == (momentum, eps, correction, axis)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("donor", NAMES)
def test_an_explicit_value_wins_also_where_it_is_another_librarys_default(name, donor):
    _, momentum, eps, correction, axis = DOCUMENTED[donor]
    bn = nn.BatchNorm(
        3, eps=eps, momentum=momentum, correction=correction, axis=axis, convention=name
    )
    assert (bn.momentum, bn.eps, bn.correction, bn.axis) == (momentum, eps, correction, axis)
    assert nn.BatchNorm(3, momentum=None, convention=name).momentum is None


@given(
    name=st.sampled_from(NAMES),
    momentum=st.one_of(st.just("default"), st.floats(0, 1)),
    seed=st.integers(0, 2**31),
)
def test_running_statistics_follow_the_librarys_formula(name, momentum, seed):
    weighted, default, eps, correction, _ = DOCUMENTED[name]
    options = {} if momentum == "default" else {"momentum": momentum}
    m = default if momentum == "default" else momentum
    bn = nn.BatchNorm1d(3, convention=name, axis=1, dtype="float64", **options)
    mean, var = np.zeros(3), np.ones(3)
    for x in batches(3, seed):
        y = bn(x).numpy()
        np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + eps), atol=1e-12)
        old = 1 - m if weighted == "new" else m
        mean = old * mean + (1 - old) * x.mean(axis=0)
        var = old * var + (1 - old) * x.var(axis=0, ddof=correction)
    np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(bn.running_var.numpy(), var, rtol=1e-12)


@given(
    source=st.sampled_from(NAMES),
    target=st.sampled_from(NAMES),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_a_converted_layer_is_what_training_in_the_other_convention_gives(
    source, target, count, seed
):
    m = 5
    # Cumulative: no share of the start value remains, and the conversion is exact.
    first, second = (
        nn.BatchNorm1d(3, 1e-4, None, axis=1, convention=name, dtype="float64")
        for name in (source, target)
    )
    for x in batches(count, seed, m):
        first(x), second(x)
    assert first.convert(target, count=m) is first
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)
    # And it goes on as the other does.
    (x,) = batches(1, seed + 1, m)
    first(x), second(x)
    np.testing.assert_allclose(first.running_var.numpy(), second.running_var.numpy(), rtol=1e-12)
    assert (first.convention, first.correction) == (target, second.correction)


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_converting_keeps_the_weight_of_the_new_value_and_comes_back(source, target):
    bn = nn.BatchNorm1d(3, momentum=0.3, axis=1, convention=source)
    same_side = DOCUMENTED[source][0] == DOCUMENTED[target][0]
    assert bn.convert(target).momentum == (0.3 if same_side else 0.7)
    assert bn.convert(source).momentum == 0.3


def test_what_is_left_of_the_start_value_is_the_error_of_a_conversion():
    m, w, k = 5, 0.3, 4
    first = nn.BatchNorm1d(3, momentum=w, dtype="float64")
    second = nn.BatchNorm1d(3, momentum=1 - w, axis=1, convention="keras", dtype="float64")
    for x in batches(k, m=m):
        first(x), second(x)
    first.convert("keras", count=m)
    error = second.running_var.numpy() - first.running_var.numpy()
    np.testing.assert_allclose(error, (1 - w) ** k / m, rtol=1e-10)


def test_a_converted_variance_beyond_its_dtype_is_the_largest_there_is():
    bn = nn.BatchNorm1d(2, convention="keras")
    bn.running_var[...] = np.array([3e38, 1.0], np.float32)
    bn.num_batches_tracked[...] = 5
    assert bn.convert("torch", count=2).running_var.tolist() == [np.finfo(np.float32).max, 2.0]


def test_a_conversion_that_needs_the_count_asks_for_it_and_changes_nothing():
    bn = nn.BatchNorm1d(3)
    bn(batches(1)[0])
    before = bn.running_var.numpy().copy()
    with pytest.raises(ValueError, match=r"how many values per channel.*correction=1 to keep"):
        bn.convert("flax")
    assert (bn.convention, bn.momentum) == ("torch", 0.1)
    bn.convert("flax", correction=1)
    assert (bn.convention, bn.momentum, bn.correction) == ("flax", 0.9, 1)
    np.testing.assert_array_equal(bn.running_var.numpy(), before)


def test_a_layer_that_saw_no_batch_converts_without_a_count():
    bn = nn.BatchNorm1d(3).convert("keras")
    assert bn.running_var.tolist() == [1, 1, 1] and bn.correction == 0
    assert nn.BatchNorm1d(3, track_running_stats=False).convert("keras").correction == 0


def test_converting_is_a_write_that_a_pending_backward_notices():
    bn = nn.BatchNorm1d(3)
    bn(batches(1)[0])
    loss = bn.eval()(tg.randn(2, 3, requires_grad=True)).sum()
    bn.convert("keras", count=6)
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


@given(st.integers(2, 50), st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_convert_running_var_divides_by_the_other_divisor(m, source, target):
    squares = 7.0
    divisor = {name: m - DOCUMENTED[name][3] for name in NAMES}
    got = nn.convert_running_var(squares / divisor[source], m, source, target)
    assert got == pytest.approx(squares / divisor[target], rel=1e-14)
    corrections = DOCUMENTED[source][3], DOCUMENTED[target][3]
    np.testing.assert_allclose(
        nn.convert_running_var(np.ones(2), m, *corrections), divisor[source] / divisor[target]
    )


def test_a_correction_that_leaves_nothing_does_not_apply():
    assert nn.convert_running_var(3.0, 1, "torch", "keras") == 3.0


@pytest.mark.parametrize("count", [0, -1, float("nan")])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(ValueError, match="expected how many values per channel"):
        nn.convert_running_var(1.0, count, "torch", "keras")


def test_an_unknown_convention_is_named():
    with pytest.raises(ValueError, match=r"BatchNorm1d: convention is 'jax'.*'flax'"):
        nn.BatchNorm1d(3, convention="jax")
    with pytest.raises(ValueError, match="convention is 'jax'"):
        nn.BatchNorm1d(3).convert("jax")


@pytest.mark.parametrize("name", NAMES)
def test_text_and_errors_say_which_value_momentum_weights(name):
    weighted = DOCUMENTED[name][0]
    bn = nn.BatchNorm1d(3, convention=name)
    assert f"momentum={bn.momentum} (weight of the {weighted} value)" in repr(bn)
    assert (f"convention='{name}'" in repr(bn)) == (name != "torch")
    with pytest.raises(
        ValueError, match=rf"momentum is 1\.5, expected the weight of the {weighted}"
    ):
        nn.BatchNorm1d(3, momentum=1.5, convention=name)
    bn.momentum = -1.0  # also when it is set later
    x = batches(1)[0]
    with pytest.raises(
        ValueError, match=rf"momentum is -1\.0, expected the weight of the {weighted}"
    ):
        bn(x)
