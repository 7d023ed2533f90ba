"""The batch norm layer on part of a batch, on its parts by themselves, with half its affine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import nn


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape)


def state(bn):
    return [t.numpy().copy() for t in bn.buffers()]


# --- scale and center ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "weight", "bias"),
    [
        ({}, True, True),
        ({"affine": False}, False, False),
        ({"scale": False}, False, True),
        ({"center": False}, True, False),
        ({"affine": False, "scale": True}, True, False),
        ({"affine": False, "center": True}, False, True),
    ],
)
def test_scale_and_center_default_to_affine(options, weight, bias):
    bn = nn.BatchNorm1d(3, dtype="float64", **options)
    names = [name for name, _ in bn.named_parameters()]
    assert names == ["weight"] * weight + ["bias"] * bias
    assert bn.affine == (weight and bias)
    x = draw((6, 3))
    expected = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    if weight:
        bn.weight.data[...] = [2, 3, -4]
        expected = expected * [2, 3, -4]
    if bias:
        bn.bias.data[...] = [5, 6, 7]
        expected = expected + np.array([5, 6, 7])
    y = bn(tg.Tensor(x)) if names else tg.Tensor(bn(x))
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12)
    shown = f"scale={weight}, center={bias}" if weight != bias else f"affine={weight}"
    assert shown in repr(bn)


# --- masks -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    momentum=st.one_of(st.none(), st.floats(0, 1)),
    correction=st.sampled_from([0, 1]),
)
def test_masked_batches_move_the_statistics_as_their_counting_values_do(seed, momentum, correction):
    options = {"momentum": momentum, "correction": correction, "dtype": "float64"}
    masked, alone = nn.BatchNorm1d(3, **options), nn.BatchNorm1d(3, **options)
    rng = np.random.default_rng(seed)
    for step in range(4):
        x = rng.normal(3, 2, (7, 3))
        mask = rng.random((7, 1)) < 0.3
        counting = x[mask[:, 0]]
        x[~mask[:, 0]] = np.nan
        y = masked(x, mask).numpy()
        if len(counting) >= 2:
            np.testing.assert_allclose(y[mask[:, 0]], alone(counting).numpy(), atol=1e-12)
        assert (y[~mask[:, 0]] == 0).all(), step
    for a, b in zip(state(masked), state(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("counting", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_too_few_values_move_neither_statistics_nor_counter(counting, momentum, groups):
    bn = nn.BatchNorm1d(3, momentum=momentum, groups=groups)
    bn(draw((6, 3)))
    before = state(bn)
    mask = np.zeros((6, 1))
    mask[:counting] = 1
    y = bn(draw((6, 3), 1), mask)
    assert (y.numpy() == bn.bias.numpy()).all()
    for a, b in zip(state(bn), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_group_with_enough_values_counts_as_a_batch():
    bn = nn.BatchNorm1d(3, groups=2, momentum=1.0, dtype="float64")
    x, mask = draw((6, 3)), np.array([[1], [1], [1], [0], [0], [1]])
    bn(x, mask)
    assert bn.num_batches_tracked.item() == 1
    np.testing.assert_allclose(bn.running_var.numpy(), x[:3].var(axis=0, ddof=1), rtol=1e-12)


def test_counting_never_reads_the_counter(monkeypatch):
    # Reading it would make a GPU wait, in every step.
    def refuse(*_):
        raise AssertionError("the counter was read")

    for name in ("item", "__int__", "__index__", "__bool__", "__float__"):
        monkeypatch.setattr(tg.Tensor, name, refuse)
    for momentum in (0.1, None):
        bn = nn.BatchNorm1d(3, momentum=momentum)
        bn(draw((6, 3)))
        bn(draw((6, 3)), np.ones((6, 1)))
    monkeypatch.undo()
    assert bn.num_batches_tracked.item() == 2


def test_evaluation_pays_no_attention_to_a_mask():
    bn = nn.BatchNorm1d(3).eval()
    x = draw((6, 3))
    np.testing.assert_array_equal(bn(x, np.zeros((6, 1))).numpy(), bn(x).numpy())


def test_an_empty_batch_leaves_a_cumulative_average_alone():
    bn = nn.BatchNorm1d(3, momentum=None)
    bn(draw((6, 3)))
    before = state(bn)
    x = tg.zeros((0, 3), requires_grad=True)
    bn(x).sum().backward()
    assert x.grad.shape == (0, 3) and (bn.weight.grad.numpy() == 0).all()
    for a, b in zip(state(bn), before, strict=True):
        np.testing.assert_array_equal(a, b)


# --- groups ----------------------------------------------------------------------------------


def test_groups_are_normalized_by_themselves_and_make_one_step():
    bn = nn.BatchNorm2d(2, groups=3, momentum=0.25, dtype="float64")
    x = draw((6, 2, 4, 4))
    alone = nn.BatchNorm2d(2, dtype="float64")
    parts = np.split(x, 3)
    expected = np.concatenate([alone(part).numpy() for part in parts])
    np.testing.assert_allclose(bn(x).numpy(), expected, atol=1e-12)
    var = np.mean([part.var(axis=(0, 2, 3), ddof=1) for part in parts], axis=0)
    np.testing.assert_allclose(bn.running_var.numpy(), 0.75 + 0.25 * var, rtol=1e-12)
    assert bn.num_batches_tracked.item() == 1
    # Evaluation uses running statistics, so the size of its batches is free.
    assert bn.eval()(x[:1]).shape == (1, 2, 4, 4)
    assert "groups=3" in repr(bn)


def test_groups_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="groups=4 does not split axis 0"):
        nn.BatchNorm1d(3, groups=4)(draw((6, 3)))
    with pytest.raises(ValueError, match="BatchNorm1d: groups is 0"):
        nn.BatchNorm1d(3, groups=0)
