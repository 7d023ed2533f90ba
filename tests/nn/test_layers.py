"""Layers against the functional face: shapes, parameters, layouts, and reprs."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn import nn


def test_linear_is_x_times_weight_transposed_plus_bias():
    layer = nn.Linear(3, 2)
    x = tg.randn(5, 4, 3)
    expected = x.numpy() @ layer.weight.numpy().T + layer.bias.numpy()
    np.testing.assert_allclose(layer(x).numpy(), expected, rtol=1e-6, atol=1e-6)
    assert nn.Linear(3, 2, bias=False).bias is None
    assert nn.Linear(3, 2, dtype="float64").weight.dtype == np.float64
    with pytest.raises(ValueError, match=r"linear: x has shape \(5, 4\)"):
        layer(tg.ones(5, 4))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_both_layouts_share_weights(groups):
    options = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": groups}
    first = nn.Conv2d(4, 6, (3, 2), **options)
    last = nn.Conv2d(4, 6, (3, 2), **options, layout="NHWC")
    last.load_state_dict(first.state_dict())
    assert first.weight.shape == (6, 4 // groups, 3, 2)
    x = tg.randn(2, 4, 7, 8)
    y = last(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    # Sums of at most 24 products around 1, in another order.
    np.testing.assert_allclose(first(x).numpy(), y.numpy(), atol=1e-5)


def test_pools_default_to_the_kernel_as_stride():
    x = tg.randn(2, 3, 6, 6)
    for layer, function in ((nn.MaxPool2d, F.max_pool2d), (nn.AvgPool2d, F.avg_pool2d)):
        assert layer(2)(x).shape == (2, 3, 3, 3)
        np.testing.assert_array_equal(layer(3, 1, 1)(x).numpy(), function(x, 3, 1, 1).numpy())
        assert layer((2, 3), layout="NHWC")(x).shape == (2, 1, 2, 6)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (nn.ReLU(), F.relu),
        (nn.Tanh(), F.tanh),
        (nn.Sigmoid(), F.sigmoid),
        (nn.Softmax(axis=0), lambda x: F.softmax(x, 0)),
        (nn.Flatten(), lambda x: F.flatten(x, 1)),
        (nn.Identity(), lambda x: x),
    ],
)
def test_layers_without_parameters(layer, function):
    x = tg.randn(2, 3, 4)
    np.testing.assert_array_equal(layer(x).numpy(), function(x).numpy())
    assert list(layer.parameters()) == []


def test_dropout_thins_out_in_training_only():
    layer, x = nn.Dropout(0.5), tg.ones(1000)
    assert set(layer(x).tolist()) == {0.0, 2.0}
    assert layer.eval()(x) is x


@pytest.mark.parametrize("integer", [np.uint8, np.int64])
def test_sizes_may_be_numpys_integers(integer):
    def layers(n):
        tg.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(n(4), n(200), n(3), n(1), n(1), n(1), n(4)),
            nn.BatchNorm2d(n(200), groups=n(2)), nn.ReLU(), nn.MaxPool2d(n(2)),
            nn.Conv2d(n(200), n(4), (n(1), n(1))), nn.BatchNorm2d(n(4)), nn.ReLU(),
            nn.MaxPool2d(n(2)), nn.Flatten(n(1)), nn.Linear(n(16), n(8)), nn.LayerNorm(n(8)),
        )  # fmt: skip

    x = tg.Tensor(np.random.default_rng(0).random((4, 4, 8, 8), np.float32))
    np.testing.assert_array_equal(layers(integer)(x).numpy(), layers(int)(x).numpy())


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: nn.Linear(3, 2, bias=False), "Linear(in_features=3, out_features=2, bias=False)"),
        (lambda: nn.Conv2d(1, 20, 5), "Conv2d(1, 20, kernel_size=(5, 5), stride=(1, 1))"),
        (
            lambda: nn.Conv2d(2, 4, 3, 2, 1, groups=2, bias=False, layout="NHWC"),
            "Conv2d(2, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, "
            "layout='NHWC', bias=False)",
        ),
        (lambda: nn.MaxPool2d(2), "MaxPool2d(kernel_size=2, stride=2, padding=0)"),
        (lambda: nn.Dropout(0.25), "Dropout(p=0.25)"),
        (lambda: nn.Softmax(), "Softmax(axis=-1)"),
    ],
)
def test_reprs(layer, text):
    assert repr(layer()) == text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups=2 must be a positive divisor"),
        (lambda: nn.Conv2d(3, 4, 3, layout="CHWN"), "layout is 'CHWN', expected 'NCHW' or 'NHWC'"),
        (lambda: nn.Conv2d(3, 4, (3, 3, 3)), r"Conv2d: kernel_size is \(3, 3, 3\); expected"),
        (lambda: nn.Conv2d(3, 4, 3, padding="same"), "Conv2d: padding is 'same'; expected"),
        (lambda: nn.MaxPool2d(2, layout="HW"), "MaxPool2d: layout is 'HW'"),
        (lambda: nn.Dropout(2.0), "Dropout: p is 2.0"),
    ],
)
def test_options_are_checked_at_once(make, words):
    with pytest.raises(ValueError, match=words):
        make()
