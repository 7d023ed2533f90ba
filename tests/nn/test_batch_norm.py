"""The batch norm layer's state: what training moves, what evaluation leaves alone, and how."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import nn

#: Layer, and the shape of an x with 3 channels.
LAYERS = [
    (lambda **k: nn.BatchNorm1d(3, **k), (6, 3), 1),
    (lambda **k: nn.BatchNorm1d(3, **k), (6, 3, 4), 1),
    (lambda **k: nn.BatchNorm2d(3, **k), (2, 3, 4, 5), 1),
    (lambda **k: nn.BatchNorm2d(3, axis=-1, **k), (2, 4, 5, 3), 3),
    (lambda **k: nn.BatchNorm3d(3, **k), (2, 3, 2, 2, 2), 1),
    (lambda **k: nn.BatchNorm(3, axis=0, **k), (3, 5), 0),
    (lambda **k: nn.BatchNorm(3, **k), (2, 3, 2, 1, 2, 2), 1),
]


def statistics(x, axis, correction=0):
    """Return mean and variance per channel, in float64."""
    rest = tuple(a for a in range(x.ndim) if a != axis)
    x = x.astype("float64")
    return x.mean(axis=rest), x.var(axis=rest, ddof=correction)


def along(vector, ndim, axis):
    return vector.reshape([-1 if a == axis else 1 for a in range(ndim)])


def batches(shape, count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(3, 2, size=shape).astype("float32") for _ in range(count)]


@pytest.mark.parametrize(("make", "shape", "axis"), LAYERS)
def test_training_normalizes_by_the_batch_and_moves_the_statistics(make, shape, axis):
    bn = make()
    (x,) = batches(shape, 1)
    bn.weight.data[...] = [0.5, -2, 0]
    bn.bias.data[...] = [1, 2, 3]
    mean, var = statistics(x, axis)
    x_hat = (x - along(mean, x.ndim, axis)) / np.sqrt(along(var, x.ndim, axis) + 1e-5)
    expected = x_hat * along(bn.weight.numpy(), x.ndim, axis) + along(bn.bias.numpy(), x.ndim, axis)
    # float32 results of a formula in float64: one rounding.
    np.testing.assert_allclose(bn(tg.Tensor(x)).numpy(), expected, rtol=1e-6, atol=1e-6)
    _, unbiased = statistics(x, axis, correction=1)
    np.testing.assert_allclose(bn.running_mean.numpy(), 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(bn.running_var.numpy(), 0.9 + 0.1 * unbiased, rtol=1e-6)
    assert bn.num_batches_tracked.item() == 1


@pytest.mark.parametrize(("make", "shape", "axis"), LAYERS)
def test_evaluation_normalizes_by_the_running_statistics_and_leaves_them_alone(make, shape, axis):
    bn = make()
    bn.running_mean.data[...] = [1, 2, 3]
    bn.running_var.data[...] = [4, 0.25, 1]
    before = copy.deepcopy(bn.state_dict())
    (x,) = batches(shape, 1)
    y = bn.eval()(tg.Tensor(x)).numpy()
    mean, var = (along(before[k].numpy(), x.ndim, axis) for k in ("running_mean", "running_var"))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-6, atol=1e-6)
    for name, t in bn.state_dict().items():
        np.testing.assert_array_equal(t.numpy(), before[name].numpy())


def test_evaluation_takes_a_batch_of_one():
    assert nn.BatchNorm1d(3).eval()(tg.ones(1, 3)).shape == (1, 3)


@given(st.floats(0, 1), st.sampled_from([0, 1]), st.integers(1, 4))
def test_momentum_weights_the_new_value(momentum, correction, count):
    bn = nn.BatchNorm1d(3, momentum=momentum, correction=correction)
    mean, var = np.zeros(3), np.ones(3)
    for x in batches((7, 3), count):
        bn(x)
        new_mean, new_var = statistics(x, 1, correction)
        mean = (1 - momentum) * mean + momentum * new_mean
        var = (1 - momentum) * var + momentum * new_var
    # The buffers are float32, and rounded once a step.
    np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bn.running_var.numpy(), var, rtol=1e-6)


@given(st.integers(1, 8), st.sampled_from([0, 1]), st.integers(0, 2**31))
def test_without_momentum_the_statistics_are_the_mean_over_all_batches(count, correction, seed):
    bn = nn.BatchNorm1d(3, momentum=None, correction=correction)
    drawn = batches((5, 3), count, seed)
    for x in drawn:
        bn(x)
    mean, var = np.mean([statistics(x, 1, correction) for x in drawn], axis=0)
    np.testing.assert_allclose(bn.running_mean.numpy(), mean, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(bn.running_var.numpy(), var, rtol=2e-6)
    assert bn.num_batches_tracked.item() == count


def test_correction_divides_the_running_variance_by_n_or_by_n_minus_one():
    (x,) = batches((2, 3, 4, 5), 1)
    biased, unbiased = (nn.BatchNorm2d(3, momentum=1.0, correction=c) for c in (0, 1))
    np.testing.assert_array_equal(biased(x).numpy(), unbiased(x).numpy())
    ratio = unbiased.running_var.numpy().astype("float64") / biased.running_var.numpy()
    np.testing.assert_allclose(ratio, 40 / 39, rtol=1e-6)


def test_without_tracking_the_batch_serves_in_evaluation_too():
    bn = nn.BatchNorm1d(3, track_running_stats=False)
    (x,) = batches((6, 3), 1)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None
    assert set(bn.state_dict()) == {"weight", "bias"}
    np.testing.assert_array_equal(bn(x).numpy(), bn.eval()(x).numpy())
    bn.reset_running_stats()


def test_without_affine_there_are_no_parameters():
    bn = nn.BatchNorm1d(3, affine=False)
    assert bn.weight is bn.bias is None
    assert list(bn.parameters()) == []
    assert bn(np.eye(3)).shape == (3, 3)


def test_reset_running_stats():
    bn = nn.BatchNorm1d(3)
    bn(batches((6, 3), 1)[0])
    bn.reset_running_stats()
    assert bn.running_mean.tolist() == [0, 0, 0]
    assert bn.running_var.tolist() == [1, 1, 1]
    assert bn.num_batches_tracked.item() == 0


def test_an_empty_batch_says_nothing_about_the_statistics():
    bn = nn.BatchNorm2d(3)
    assert bn(tg.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)
    assert bn.num_batches_tracked.item() == 0
    assert bn.running_var.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_statistics_stay_float32_and_the_result_has_the_dtype_of_x(dtype):
    bn = nn.BatchNorm1d(3, dtype="float16")
    assert bn.running_mean.dtype == bn.running_var.dtype == bn.weight.dtype == np.float32
    assert bn(tg.Tensor(batches((6, 3), 1)[0]).astype(dtype)).dtype.name == dtype
    assert bn.running_mean.dtype == np.float32
    assert nn.BatchNorm1d(3, dtype="float64").running_var.dtype == np.float64


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_network_in_half_precision_trains_evaluates_and_is_saved(dtype, tmp_path):
    tg.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).astype(dtype)
    x = tg.Tensor(batches((64, 4), 1)[0]).astype(dtype)
    y = model(x)
    y.backward(tg.Tensor(batches((64, 3), 1)[0]).astype(dtype))
    assert y.dtype == model[0].weight.dtype == model[0].weight.grad.dtype == x.dtype
    assert all(p.dtype == p.grad.dtype == np.float32 for p in model[1].parameters())
    # The running statistics are those of what came in, to the digits of float32.
    z = model[0](x).numpy().astype(np.float64)
    np.testing.assert_allclose(model[1].running_mean.numpy(), 0.1 * z.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        model[1].running_var.numpy(), 0.9 + 0.1 * z.var(axis=0, ddof=1), rtol=1e-6
    )
    nn.save(model, tmp_path / "model.safetensors")
    again = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).astype(dtype)
    again.load_state_dict(nn.load(tmp_path / "model.safetensors"))
    out = model.eval()(x)
    assert out.dtype == x.dtype and bool((again.eval()(x) == out).min())


def test_several_axes_are_kept_in_the_order_of_x():
    bn = nn.BatchNorm((3, 4), axis=(1, 3))
    assert bn.weight.shape == bn.running_mean.shape == (3, 4)
    (x,) = batches((5, 3, 2, 4), 1)
    y = bn(x).numpy()
    # Means of ten values around 0 that are about 1, each rounded to float32.
    np.testing.assert_allclose(y.mean(axis=(0, 2)), 0, atol=5e-7)
    np.testing.assert_allclose(bn.running_mean.numpy(), 0.1 * x.mean(axis=(0, 2)), rtol=1e-5)


def test_statistics_change_without_the_tape_and_backward_still_works():
    bn = nn.BatchNorm1d(3)
    x = tg.randn(5, 3, requires_grad=True)
    loss = (bn(x) ** 3).sum()
    assert not bn.running_mean.requires_grad
    bn(x)  # training goes on: the first graph holds nothing that this has changed
    loss.backward()
    assert bn.weight.grad is not None


def test_evaluation_notices_statistics_that_change_before_backward():
    bn = nn.BatchNorm1d(3).eval()
    x = tg.randn(5, 3, requires_grad=True)
    loss = bn(x).sum()
    bn.train()(x)
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


@pytest.mark.parametrize(
    ("bn", "shape", "words"),
    [
        (nn.BatchNorm2d(3), (2, 4, 5, 5), r"BatchNorm2d: .*4 channels on axis 1; .*num_features=3"),
        (nn.BatchNorm2d(3, axis=-1), (2, 3, 5, 5), "5 channels on axis -1"),
        (nn.BatchNorm1d(3), (2, 3, 5, 5), "BatchNorm1d: .*expected 2 or 3 dimensions"),
        (nn.BatchNorm2d(3), (2, 3), "expected 4 dimensions"),
        (nn.BatchNorm3d(3), (2, 3, 4, 4), "expected 5 dimensions"),
        (nn.BatchNorm(3), (3,), "expected at least 2 dimensions"),
        (nn.BatchNorm(3, axis=4), (2, 3), "axis 4"),
        (nn.BatchNorm1d(3), (1, 3), "one value per channel"),
        (nn.BatchNorm2d(3), (1, 3, 1, 1), "one value per channel"),
    ],
)
def test_a_wrong_input_is_named_and_leaves_no_trace(bn, shape, words):
    with pytest.raises(ValueError, match=words):
        bn(np.ones(shape))
    assert bn.num_batches_tracked.item() == 0
    assert bn.running_mean.tolist() == [0, 0, 0]


def test_integers_and_lists_are_refused():
    with pytest.raises(TypeError, match="BatchNorm1d: x is int64"):
        nn.BatchNorm1d(3)(np.ones((4, 3), int))
    with pytest.raises(TypeError, match="BatchNorm: x is a list"):
        nn.BatchNorm(3)([[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"axis": (1, 2)}, r"num_features is 3 and axis \(1, 2\)"),
        ({"groups": 0}, "groups is 0, expected an integer, at least 1"),
        ({"groups": 2.5}, "groups is 2.5, expected an integer, at least 1"),
        ({"correction": -1}, "correction is -1, expected a number >= 0"),
        ({"correction": float("nan")}, "correction is nan"),
    ],
)
def test_options_are_checked_at_once(options, words):
    with pytest.raises(ValueError, match=f"BatchNorm2d: {words}"):
        nn.BatchNorm2d(3, **options)


def test_repr_says_what_momentum_means():
    assert repr(nn.BatchNorm2d(3, axis=-1)) == (
        "BatchNorm2d(3, eps=1e-05, momentum=0.1 (weight of the new value), affine=True, "
        "track_running_stats=True, axis=-1)"
    )
    assert "None (average of all batches)" in repr(nn.BatchNorm1d(3, momentum=None))
    for correction, words in (
        (0, "correction=0 (running_var is biased)"),
        (2, "correction=2 (running_var is divided by m - correction)"),
    ):
        assert words in repr(nn.BatchNorm1d(3, correction=correction))
