"""Masks, ghost batches, Batch Renorm and the fused ReLU of the functional batch norm."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.ops.batch_norm import batch_norm, batch_norm_composite


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


SAMPLES = [  # shape, axis, mask shape or None, groups
    ((8, 3, 4), (1,), (8, 1, 4), 1),
    ((8, 3, 4), (1,), (8, 1, 1), 1),
    ((8, 3, 4), (1,), (1, 1, 4), 2),
    ((8, 4, 3), (2,), (8, 4, 1), 4),
    ((8, 2, 3, 2), (1, 2), (8, 1, 1, 2), 2),
    ((6, 3), (1,), None, 3),
    ((9, 3, 2), (1,), None, 3),
]


@pytest.mark.parametrize(("shape", "axis", "mask_shape", "groups"), SAMPLES)
@given(seed=st.integers(0, 2**32 - 1))
def test_rule_agrees_with_the_tape_to_third_order(shape, axis, mask_shape, groups, seed):
    rng = np.random.default_rng(seed)
    channels = [shape[a] for a in axis]
    arrays = (
        rng.standard_normal(shape),
        rng.standard_normal(channels),
        rng.standard_normal(channels),
    )
    arrays[1][0] = 0
    mask = None if mask_shape is None else rng.integers(0, 3, mask_shape)
    g, u, v = rng.standard_normal((3, *shape))

    def derivatives(function):
        x, w, b = (tg.Tensor(a, requires_grad=True) for a in arrays)
        y = function(x, w, b, mask, axis=axis, eps=0.1, groups=groups)
        first = tg.grad(y, [x, w, b], g, create_graph=True)
        second = tg.grad((first[0] * u).sum() + (first[1] ** 2).sum(), [x, w], create_graph=True)
        third = tg.grad((second[0] * v).sum(), [x, w])
        return [t.numpy() for t in (y, *first, *second, *third)]

    for a, b in zip(derivatives(batch_norm), derivatives(batch_norm_composite), strict=True):
        # s is at most 1/√0.1, so terms of third order are at most some hundreds in size.
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_frequency_counts_as_so_many_copies(seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (rng.standard_normal(s) for s in ((7, 3), 3, 3))
    often = rng.integers(0, 4, (7, 1))
    often[:2] = 1  # enough to normalize by
    running = np.zeros(3), np.ones(3)
    y = F.batch_norm(x, *running, weight, bias, training=True, mask=often)
    copied = [np.zeros(3), np.ones(3)]
    copies = np.repeat(x, often[:, 0], axis=0)
    z = F.batch_norm(copies, *copied, weight, bias, training=True)
    np.testing.assert_allclose(np.repeat(y, often[:, 0], axis=0), z, atol=1e-12)
    np.testing.assert_allclose(running, copied, atol=1e-12)
    assert (y[often[:, 0] == 0] == bias).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_a_nan_that_does_not_count_leaks_nowhere(seed):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (8, 1, 5)).astype(bool)
    mask[0, 0, :2] = True
    x, v = rng.standard_normal((2, 8, 3, 5))
    results = []
    for filling in (np.nan, np.inf, 0.0):
        running = [np.zeros(3), np.ones(3)]
        filled = tg.Tensor(np.where(mask, x, filling), requires_grad=True)
        weight = tg.ones(3, dtype="float64", requires_grad=True)
        y = F.batch_norm(filled, *running, weight, training=True, mask=mask)
        first = tg.grad(y, [filled, weight], v, create_graph=True)
        second = tg.grad((first[0] * v).sum(), [filled, weight])
        results.append([*(t.numpy() for t in (y, *first, *second)), *running])
        assert (first[0].numpy()[~np.broadcast_to(mask, x.shape)] == 0).all()
    for values in zip(*results, strict=True):
        assert np.isfinite(values).all()
        assert (values[0] == values[2]).all() and (values[1] == values[2]).all()


@pytest.mark.parametrize("family", ["generic", "numpy", "numba"])
@pytest.mark.parametrize("rows", [6, 6000])
def test_a_weight_that_overflowed_does_not_reach_what_does_not_count(family, rows):
    x, weight, bias = draw((rows, 3)), np.array([np.inf, 1.0, -np.inf]), np.arange(3.0)
    off = np.arange(rows) % 3 == 0
    with use_kernels(family), np.errstate(invalid="ignore"):
        y = F.batch_norm(x, weight=weight, bias=bias, training=True, mask=~off[:, None])
    assert (y[off] == bias).all()


@pytest.mark.parametrize("counting", [0, 1])
def test_too_few_values_give_bias_no_gradient_and_leave_the_statistics(counting):
    x = tg.Tensor(draw((4, 3)), requires_grad=True)
    bias = tg.Tensor(draw(3, 1), requires_grad=True)
    mean, var = np.full(3, 0.5), np.full(3, 2.0)
    mask = np.zeros((4, 1))
    mask[:counting] = 1
    y = F.batch_norm(x, mean, var, bias=bias, training=True, mask=mask)
    y.backward(draw((4, 3), 2))
    assert (y.numpy() == bias.numpy()).all()
    assert (x.grad.numpy() == 0).all()
    np.testing.assert_allclose(bias.grad.numpy(), draw((4, 3), 2).sum(axis=0), rtol=1e-14)
    assert (mean == 0.5).all() and (var == 2.0).all()


@pytest.mark.parametrize("family", ["generic", "numpy", "numba"])
@pytest.mark.parametrize("rows", [6, 6000])
@pytest.mark.parametrize("groups", [1, 2])
def test_too_few_values_are_divided_by_nothing_even_without_eps(family, rows, groups):
    arrays = draw((rows, 3)), draw(3, 1), draw(3, 2)
    x, weight, bias = (tg.Tensor(a, requires_grad=True) for a in arrays)
    mask = np.ones((rows, 1))
    mask[rows // groups - rows :] = 0
    with use_kernels(family):
        options = {"training": True, "eps": 0.0, "mask": mask, "groups": groups}
        y = F.batch_norm(x, weight=weight, bias=bias, **options)
        first = tg.grad(y, [x, weight, bias], draw((rows, 3), 3), create_graph=True)
        second = tg.grad(sum((g * g).sum() for g in first), [x, weight])
    for values in (y, *first, *second):
        assert np.isfinite(values.numpy()).all()
    counting = mask[:, 0] > 0
    if groups == 1:
        assert (first[1].numpy() == 0).all()
    else:
        _, alone, _ = tg.grad(
            F.batch_norm(x[counting], weight=weight, bias=bias, training=True, eps=0.0),
            [x, weight, bias],
            draw((rows, 3), 3)[counting],
        )
        np.testing.assert_allclose(first[1].numpy(), alone.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 3, 0), (4, 0, 2)])
def test_an_empty_batch_has_zero_gradients_of_gradients(shape, groups, masked, eps):
    channels = shape[1]
    x, weight, bias = (tg.zeros(s, requires_grad=True) for s in (shape, channels, channels))
    mask = np.ones([1 if i == 1 else n for i, n in enumerate(shape)]) if masked else None
    options = {"training": True, "eps": eps, "mask": mask, "groups": groups}
    y = F.batch_norm(x, weight=weight, bias=bias, **options)
    first = tg.grad(y.sum(), [x, weight, bias], create_graph=True)
    second = tg.grad(sum((g * g).sum() for g in first), [x, weight, bias], allow_unused=True)
    for g, leaf in zip(first, (x, weight, bias), strict=True):
        assert g.shape == leaf.shape and (g.numpy() == 0).all()
    assert all(g is None or (g.numpy() == 0).all() for g in second)


def test_groups_are_batches_of_their_own_and_make_one_step_of_the_statistics():
    x = draw((12, 3, 2))
    running = [np.zeros(3), np.ones(3)]
    y = F.batch_norm(x, *running, training=True, groups=4, momentum=0.3)
    parts = np.split(x, 4)
    expected = np.concatenate([F.batch_norm(part, training=True) for part in parts])
    np.testing.assert_allclose(y, expected, atol=1e-13)
    mean = np.mean([p.mean(axis=(0, 2)) for p in parts], axis=0)
    var = np.mean([p.var(axis=(0, 2), ddof=1) for p in parts], axis=0)
    np.testing.assert_allclose(running, [0.3 * mean, 0.7 + 0.3 * var], atol=1e-13)


def test_groups_with_too_few_values_do_not_enter_the_average():
    x = draw((6, 3))
    mask = np.array([1, 1, 1, 1, 0, 0])[:, None]  # the last of two groups keeps one value
    running = [np.zeros(3), np.ones(3)]
    F.batch_norm(x, *running, training=True, groups=2, mask=mask, momentum=1.0)
    np.testing.assert_allclose(running[0], x[:3].mean(axis=0), atol=1e-14)
    np.testing.assert_allclose(running[1], x[:3].var(axis=0, ddof=1), atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": np.ones((4, 1))}, r"mask has shape \(4, 1\), expected as many dimensions as x"),
        ({"mask": np.ones((4, 3, 2))}, "1 along the channel axes"),
        ({"mask": np.ones((3, 1, 2))}, r"mask has shape \(3, 1, 2\)"),
        ({"groups": 3}, "groups=3 does not split axis 0"),
        ({"groups": 0}, "groups=0 does not split axis 0"),
        ({"groups": 2, "axis": 0}, "groups=2 does not split axis 0"),
        ({"groups": 2.0}, "groups is 2.0, expected an integer"),
        ({"mask": [[[1]]]}, "mask is list, expected an array or a Tensor of booleans or"),
        ({"mask": np.ones((4, 1, 1), complex)}, "mask is complex128, expected an array"),
    ],
)
def test_a_wrong_mask_or_number_of_groups_is_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        F.batch_norm(draw((4, 3, 2)), training=True, **arguments)


def test_one_value_per_channel_and_group_is_refused():
    with pytest.raises(ValueError, match="one value per channel and group"):
        F.batch_norm(draw((4, 3)), training=True, groups=4)


# --- Batch Renorm ----------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1))
def test_renorm_follows_the_paper(seed):
    rng = np.random.default_rng(seed)
    x, weight, bias, g = (rng.standard_normal(s) for s in ((9, 3, 2), 3, 3, (9, 3, 2)))
    mean, var = rng.standard_normal(3), rng.uniform(0.1, 4, 3)
    eps, r_max, d_max = 1e-3, 1.5, 0.5
    sigma, batch_sigma = np.sqrt(var + eps), np.sqrt(x.var((0, 2)) + eps)
    r = np.clip(batch_sigma / sigma, 1 / r_max, r_max)
    d = np.clip((x.mean((0, 2)) - mean) / sigma, -d_max, d_max)
    t = tg.Tensor(x, requires_grad=True)
    running = mean.copy(), var.copy()
    y = F.batch_renorm(t, *running, weight, bias, training=True, eps=eps, r_max=r_max, d_max=d_max)
    x_hat = F.batch_norm(x, training=True, eps=eps)
    expected = (x_hat * r[:, None] + d[:, None]) * weight[:, None] + bias[:, None]
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)
    # r and d are constants: the gradient is that of batch norm with weight · r
    y.backward(g)
    u = tg.Tensor(x, requires_grad=True)
    F.batch_norm(u, weight=weight * r, training=True, eps=eps).backward(g)
    np.testing.assert_allclose(t.grad.numpy(), u.grad.numpy(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(running[0], 0.9 * mean + 0.1 * x.mean((0, 2)), atol=1e-13)


def test_renorm_at_its_first_limits_is_batch_norm_and_without_limits_is_evaluation():
    x, mean, var = draw((20, 3)), draw(3, 1), np.array([0.5, 1.0, 2.0])
    first = F.batch_renorm(x, mean.copy(), var.copy(), training=True, r_max=1, d_max=0)
    np.testing.assert_allclose(first, F.batch_norm(x, training=True), atol=1e-12)
    unlimited = F.batch_renorm(x, mean.copy(), var.copy(), training=True, r_max=1e9, d_max=1e9)
    np.testing.assert_allclose(unlimited, F.batch_norm(x, mean, var), atol=1e-12)
    evaluated = F.batch_renorm(x, mean, var)
    np.testing.assert_array_equal(evaluated, F.batch_norm(x, mean, var))


def test_renorm_refuses_limits_that_exclude_batch_norm():
    with pytest.raises(ValueError, match="expected r_max >= 1 and d_max >= 0"):
        F.batch_renorm(draw((4, 3)), np.zeros(3), np.ones(3), training=True, r_max=0.5)


@pytest.mark.parametrize("running", [(None, None), (np.zeros(3), None), (None, np.ones(3))])
def test_renorm_in_training_asks_for_running_statistics(running):
    with pytest.raises(ValueError, match="running_mean or running_var is None, expected both"):
        F.batch_renorm(draw((4, 3)), *running, training=True)


# --- ReLU ------------------------------------------------------------------------------------


def test_batch_norm_relu_is_the_composition_and_passes_gradients_to_the_residual():
    x, residual, g = draw((3, 5, 4, 2))
    inputs = [tg.Tensor(a, requires_grad=True) for a in (x, residual)]
    y = F.batch_norm_relu(inputs[0], training=True, residual=inputs[1])
    z = F.relu(F.batch_norm(inputs[0], training=True) + inputs[1])
    assert (y.numpy() == z.numpy()).all() and (y.numpy() == 0).any()
    for a, b in zip(tg.grad(y, inputs, g), tg.grad(z, inputs, g), strict=True):
        assert (a.numpy() == b.numpy()).all()
    with pytest.raises(ValueError, match="residual has shape"):
        F.batch_norm_relu(inputs[0], training=True, residual=inputs[1][0])
    with pytest.raises(TypeError, match="residual is a float, expected an array or a Tensor"):
        F.batch_norm_relu(x, training=True, residual=1.0)
    with pytest.raises(TypeError, match="x is a list"):
        F.batch_norm_relu([[1.0]], training=True, residual=residual)
    wide = F.batch_norm_relu(x.astype("float32"), training=True, residual=residual)
    assert wide.dtype == np.float64


def test_two_values_are_enough():
    x, mean, var = draw((4, 3)), np.zeros(3), np.ones(3)
    mask = np.array([1, 0, 1, 0])[:, None]
    y = F.batch_norm(x, mean, var, training=True, momentum=1.0, eps=0.0, mask=mask)
    np.testing.assert_allclose(y[0], np.sign(x[0] - x[2]), rtol=1e-12)  # ±1, whatever they are
    np.testing.assert_allclose(mean, (x[0] + x[2]) / 2, rtol=1e-12)
    np.testing.assert_allclose(var, (x[0] - x[2]) ** 2 / 2, rtol=1e-12)


def test_renorm_of_an_empty_batch_gives_zero_gradients_and_leaves_the_statistics():
    mean, var = np.full(3, 0.5), np.full(3, 2.0)
    inputs = [tg.zeros(s, requires_grad=True) for s in ((0, 3), 3, 3)]
    y = F.batch_renorm(inputs[0], mean, var, *inputs[1:], training=True)
    for g, x in zip(tg.grad(y.sum(), inputs), inputs, strict=True):
        assert g.shape == x.shape and (g.numpy() == 0).all()
    assert (mean == 0.5).all() and (var == 2.0).all()
