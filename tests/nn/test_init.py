"""Initial values: their bounds and moments, and one seed for every device and dtype."""

import math

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray
from tinygrad_bn import nn
from tinygrad_bn.nn import init

SHAPE = (60, 10, 5, 5)  # fan-in 250, fan-out 1500, 15000 entries


@pytest.mark.parametrize(
    ("fill", "deviation"),
    [
        (lambda t: init.uniform_(t, -1, 1), 1 / math.sqrt(3)),
        (lambda t: init.normal_(t, 0, 0.01), 0.01),
        (lambda t: init.kaiming_uniform_(t, nonlinearity="relu"), math.sqrt(2 / 250)),
        (lambda t: init.kaiming_uniform_(t, a=math.sqrt(5)), math.sqrt(1 / 3 / 250)),
        (lambda t: init.kaiming_normal_(t, nonlinearity="linear"), math.sqrt(1 / 250)),
        (lambda t: init.kaiming_normal_(t, mode="fan_out"), math.sqrt(2 / 1500)),
        (lambda t: init.xavier_uniform_(t), math.sqrt(2 / 1750)),
        (lambda t: init.xavier_normal_(t, gain=2.0), 2 * math.sqrt(2 / 1750)),
    ],
)
def test_moments(fill, deviation):
    tg.manual_seed(0)
    t = tg.empty(SHAPE)
    assert fill(t) is t
    # Five standard errors, 1 / √n of the mean and at most 1 / √(2 n) of the deviation.
    assert abs(t.numpy().mean()) < 5 * deviation / math.sqrt(15_000)
    assert t.numpy().std() == pytest.approx(deviation, rel=5 / math.sqrt(30_000))


@pytest.mark.parametrize(
    ("layer", "bound"),
    [(lambda: nn.Conv2d(8, 60, 5, groups=2), 0.1), (lambda: nn.Linear(100, 50), 0.1)],
)
def test_layers_start_as_pytorchs_do(layer, bound):
    made = layer()
    for parameter in (made.weight, made.bias):
        values = np.abs(parameter.numpy())
        assert values.max() <= bound * (1 + 1e-6)
        assert values.max() > 0.9 * bound  # of 50 or more uniform numbers, but for 1 in 200
        assert parameter.requires_grad


def test_bounds_use_the_fan_in():
    tg.manual_seed(0)
    assert np.abs(init.kaiming_uniform_(tg.empty(2000, 6)).numpy()).max() == pytest.approx(
        1.0, rel=1e-3
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3, 3)])
def test_empty_weights_are_no_error(shape):
    assert init.kaiming_normal_(tg.empty(shape)).shape == shape
    assert nn.Linear(0, 3).bias.shape == (3,)


def test_one_seed_gives_the_same_parameters_on_every_device_and_dtype(strict_gpu):  # noqa: F811
    def parameters(**options):
        tg.manual_seed(5)
        layers = nn.Conv2d(2, 3, 3, **options), nn.Linear(4, 5, **options)
        return [p for layer in layers for p in layer.parameters()]

    first, again, gpu = parameters(), parameters(), parameters(device="cuda")
    wide = parameters(dtype="float64")
    with tg.default_device("cuda"):
        default = parameters()
    for a, b, c, d, e in zip(first, again, gpu, default, wide, strict=True):
        assert type(c.data) is type(d.data) is StrictArray
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        np.testing.assert_array_equal(a.numpy(), c.numpy())
        np.testing.assert_array_equal(a.numpy(), d.numpy())
        np.testing.assert_array_equal(a.numpy(), e.numpy().astype("float32"))


def test_filling_in_place_bumps_the_version():
    x = tg.ones(2, 2, requires_grad=True)
    for fill in (init.zeros_, init.ones_, init.normal_, init.uniform_, init.xavier_normal_):
        loss = (x * x).sum()
        fill(x)
        with pytest.raises(RuntimeError, match="in place"):
            loss.backward()


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (lambda: init.kaiming_uniform_(tg.empty(3)), r"shape \(3,\) has no fan-in"),
        (lambda: init.kaiming_normal_(tg.empty(3, 2), mode="fan"), "mode is 'fan'"),
        (lambda: init.kaiming_normal_(tg.empty(3, 2), nonlinearity="selu"), "is 'selu', expected"),
        (lambda: init.normal_(tg.empty(3), std=-1), "std is -1"),
    ],
)
def test_errors(fill, words):
    with pytest.raises(ValueError, match=words):
        fill()
