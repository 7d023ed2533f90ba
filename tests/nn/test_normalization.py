"""The layers that normalize each sample by itself: parameters, statistics, modes, text."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn import nn, optim


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape).astype("float32")


@pytest.mark.parametrize(
    ("layer", "shape", "by_hand", "text"),
    [
        (
            nn.LayerNorm(4),
            (2, 3, 4),
            lambda x, m: F.layer_norm(x, 4, m.weight, m.bias),
            "LayerNorm((4,), eps=1e-05, elementwise_affine=True)",
        ),
        (
            nn.LayerNorm((3, 4), 1e-3, bias=False),
            (2, 3, 4),
            lambda x, m: F.layer_norm(x, (3, 4), m.weight, None, 1e-3),
            "LayerNorm((3, 4), eps=0.001, elementwise_affine=True, bias=False)",
        ),
        (
            nn.LayerNorm(4, elementwise_affine=False),
            (2, 3, 4),
            lambda x, m: F.layer_norm(x, 4),
            "LayerNorm((4,), eps=1e-05, elementwise_affine=False)",
        ),
        (
            nn.RMSNorm(4),
            (2, 3, 4),
            lambda x, m: F.rms_norm(x, 4, m.weight),
            "RMSNorm((4,), eps=None, elementwise_affine=True)",
        ),
        (
            nn.RMSNorm([3, 4], 0.1, False),
            (2, 3, 4),
            lambda x, m: F.rms_norm(x, (3, 4), None, 0.1),
            "RMSNorm((3, 4), eps=0.1, elementwise_affine=False)",
        ),
        (
            nn.GroupNorm(2, 4),
            (2, 4, 3, 3),
            lambda x, m: F.group_norm(x, 2, m.weight, m.bias),
            "GroupNorm(2, 4, eps=1e-05, affine=True)",
        ),
        (
            nn.GroupNorm(2, 4, 0.1, False, axis=-1),
            (2, 3, 3, 4),
            lambda x, m: F.group_norm(x, 2, eps=0.1, axis=-1),
            "GroupNorm(2, 4, eps=0.1, affine=False, axis=-1)",
        ),
        (
            nn.InstanceNorm2d(4),
            (2, 4, 3, 3),
            lambda x, m: F.instance_norm(x),
            "InstanceNorm2d(4, eps=1e-05, affine=False, track_running_stats=False)",
        ),
        (
            nn.InstanceNorm(4, 0.1, affine=True, axis=-1),
            (2, 3, 3, 4),
            lambda x, m: F.instance_norm(x, weight=m.weight, bias=m.bias, eps=0.1, axis=-1),
            "InstanceNorm(4, eps=0.1, affine=True, track_running_stats=False, axis=-1)",
        ),
    ],
)
def test_a_layer_is_its_function_in_either_mode(layer, shape, by_hand, text):
    for i, p in enumerate(layer.parameters()):
        assert (p.numpy() == [1, 0][i]).all()
        p.data[...] = draw(p.shape, i)
    x = draw(shape)
    for mode in (True, False):
        y = layer.train(mode)(x)
        z = by_hand(x, layer)
        np.testing.assert_array_equal(tg.Tensor(y).numpy(), tg.Tensor(z).numpy())
    assert repr(layer) == text
    assert list(layer.buffers()) == []


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, lambda n, **k: nn.GroupNorm(1, n, **k)])
def test_parameters_are_never_narrower_than_float32_and_results_have_the_dtype_of_x(make):
    layer = make(4, dtype="float16")
    assert layer.weight.dtype == np.float32
    assert layer.astype("float16").weight.dtype == np.float32
    assert make(4, dtype="float64").weight.dtype == np.float64
    assert layer(draw((2, 4)).astype("float16")).dtype == np.float16


def test_layers_train():
    tg.manual_seed(0)
    x = draw((16, 4, 3))
    model = nn.Sequential(
        nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm(3), nn.RMSNorm((4, 3))
    )
    sgd = optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = ((model(x) - 0.5) ** 2).mean()
        sgd.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        sgd.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_tracked_instances_move_in_training_and_serve_in_evaluation():
    layer = nn.InstanceNorm2d(3, momentum=0.25, track_running_stats=True, dtype="float64")
    x = draw((2, 3, 4, 5)).astype("float64")
    layer(x)
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.25 * x.mean((0, 2, 3)), rtol=1e-12)
    var = x.var(axis=(2, 3), ddof=1).mean(axis=0)
    np.testing.assert_allclose(layer.running_var.numpy(), 0.75 + 0.25 * var, rtol=1e-12)
    assert layer.num_batches_tracked.item() == 1
    layer(np.zeros((0, 3, 4, 5)))
    assert layer.num_batches_tracked.item() == 1
    y = layer.eval()(x)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var)
    np.testing.assert_array_equal(y.numpy(), expected.numpy())
    assert layer.num_batches_tracked.item() == 1
    assert "momentum=0.25 (weight of the new value)" in repr(layer)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.LayerNorm(()), r"LayerNorm: normalized_shape is \(\)"),
        (lambda: nn.LayerNorm(3, eps=-1.0), "LayerNorm: eps is -1"),
        (lambda: nn.RMSNorm(3, eps=-1.0), "RMSNorm: eps is -1"),
        (lambda: nn.GroupNorm(4, 6), "GroupNorm: num_groups=4 does not split 6"),
        (lambda: nn.GroupNorm(2, 6)(draw((2, 4, 3))), "GroupNorm: .*4 channels on axis 1"),
        (
            lambda: nn.InstanceNorm1d(3)(draw((2, 3))),
            "expected 3 dim.*nn.InstanceNorm",
        ),
        (lambda: nn.InstanceNorm2d(3)(draw((2, 4, 3, 3))), "InstanceNorm2d: .*4 channels"),
        (lambda: nn.InstanceNorm3d(3, momentum=2.0), "InstanceNorm3d: momentum is 2.0, .*new"),
        (lambda: nn.InstanceNorm1d(3, eps=float("nan")), "InstanceNorm1d: eps is nan"),
    ],
)
def test_errors_name_the_layer(make, words):
    with pytest.raises(ValueError, match=words):
        make()
