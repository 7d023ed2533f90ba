"""Derivatives up to the fourth, against Cauchy's integral of the formula in complex numbers.

φ(t) = Σ g · y(inputs + t · directions) is analytic around t = 0, so that its k-th derivative there
is k! / rᵏ times the mean of φ(r e^{iθ}) e^{-ikθ} over a circle. The mean over equally spaced θ
converges faster than any power of their number: no step to choose, no digits cancelled. The formula
below shares nothing with the library, whose derivatives are its own rules, differentiated.
"""

import math

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.ops import batch_norm as ops

ORDERS = (1, 2, 3, 4)
NODES, RADIUS = 64, 0.05
EPS = 0.1


def formula(x, weight, bias, mean=None, var=None, *, frequency=None, groups=1):
    """Return y for x (N, C, S), in real or complex numbers; a NaN of frequency 0 counts nowhere."""
    frequency = np.ones(x.shape) if frequency is None else np.broadcast_to(frequency, x.shape)
    y = np.empty(x.shape, x.dtype)
    n = len(x) // groups
    for rows in (slice(i * n, (i + 1) * n) for i in range(groups)):
        for c in range(x.shape[1]):
            often = frequency[rows, c]
            counts = often > 0
            values = np.where(counts, x[rows, c], 0)
            if mean is None:
                m = (often * values).sum() / often.sum()
                v = (often * (values - m) ** 2).sum() / often.sum()
            else:
                m, v = mean[c], var[c]
            x_hat = np.where(counts, (values - m) / np.sqrt(v + EPS), 0)
            y[rows, c] = weight[c] * x_hat + bias[c]
    return y


def by_cauchy(function, inputs, directions, g):
    """Return the derivatives of Σ g · y along the directions, of all ORDERS."""
    angles = 2j * np.pi * np.arange(NODES) / NODES
    pairs = list(zip(inputs, directions, strict=True))
    points = ([a + RADIUS * np.exp(t) * v for a, v in pairs] for t in angles)
    values = np.array([(g * function(*point)).sum() for point in points])
    return [
        math.factorial(k) / RADIUS**k * (values * np.exp(-k * angles)).mean().real for k in ORDERS
    ]


def by_grad(function, inputs, directions, g):
    """Return the same from nested calls of `tg.grad`."""
    inputs = [tg.Tensor(a, requires_grad=True) for a in inputs]
    along = (function(*inputs) * g).sum()
    found = []
    for _ in ORDERS:
        grads = tg.grad(along, inputs, create_graph=True, allow_unused=True)  # β is linear
        pairs = zip(grads, directions, strict=True)
        along = sum((a * v).sum() for a, v in pairs if a is not None)
        found.append(along.item())
    return found


SHAPE = (6, 3, 4)
FREQUENCY = np.random.default_rng(9).integers(0, 3, (6, 1, 4)).astype(float)


def draw(given=False, gamma=(0.7, 0.0, -1.3)):
    """Return inputs, directions and g."""
    rng = np.random.default_rng(8)
    inputs = [rng.standard_normal(SHAPE) + 0.5, np.array(gamma), rng.standard_normal(3)]
    if given:
        inputs += [rng.standard_normal(3), rng.uniform(0.5, 2, 3)]
    return inputs, [rng.standard_normal(a.shape) for a in inputs], rng.standard_normal(SHAPE)


def train(**options):
    return lambda x, w, b: F.batch_norm(x, weight=w, bias=b, training=True, eps=EPS, **options)


MODES = {
    "training": (train(), {}),
    "a mask": (train(mask=FREQUENCY > 0), {"frequency": FREQUENCY > 0}),
    "frequencies": (train(mask=FREQUENCY), {"frequency": FREQUENCY}),
    "groups": (train(groups=3), {"groups": 3}),
    "frequencies and groups": (
        train(mask=FREQUENCY, groups=2),
        {"frequency": FREQUENCY, "groups": 2},
    ),
    "evaluation": (lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=EPS), {}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", [(0.7, 2.0, -1.3), (0.0, 0.0, 0.0)], ids=["γ", "γ = 0"])
def test_derivatives_up_to_the_fourth_are_those_of_the_formula(mode, gamma):
    ours, options = MODES[mode]
    inputs, directions, g = draw(given=mode == "evaluation", gamma=gamma)
    expected = by_cauchy(lambda *a: formula(*a, **options), inputs, directions, g)
    found = by_grad(ours, inputs, directions, g)
    # The integral is good to k! / rᵏ roundings of a φ of about 10: 4e-8 for the fourth.
    for k, a, b in zip(ORDERS, found, expected, strict=True):
        assert abs(a - b) < math.factorial(k) / RADIUS**k * 1e-13 + 1e-10 * abs(b), k
    assert min(map(abs, found[1:])) > 0.01  # or there was nothing to be right about


def test_a_nan_behind_the_mask_reaches_no_derivative():
    inputs, directions, g = draw()
    ours, options = MODES["frequencies"]
    right = by_cauchy(lambda *a: formula(*a, **options), inputs, directions, g)
    inputs[0] = np.where(FREQUENCY == 0, np.nan, inputs[0])
    found = by_grad(ours, inputs, directions, g)
    np.testing.assert_allclose(found, right, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("frequency", [None, FREQUENCY], ids=["all count", "frequencies"])
def test_mixed_third_derivatives_agree_with_the_tape(groups, frequency):
    # In three directions that differ, by the rule and by the tape on the composite definition.
    inputs, _, g = draw()
    v = np.random.default_rng(1).standard_normal((3, *SHAPE))
    options = {"axis": (1,), "eps": EPS, "groups": groups}

    def third(op):
        x, w, b = (tg.Tensor(a, requires_grad=True) for a in inputs)
        (a,) = tg.grad(op(x, w, b, frequency, **options), x, g * v[0], create_graph=True)
        (a,) = tg.grad(a, x, v[1], create_graph=True)
        return [t.numpy() for t in tg.grad(a, [x, w], v[2])]

    for a, b in zip(third(ops.batch_norm), third(ops.batch_norm_composite), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        assert np.abs(a).max() > 0.01


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_derivatives_of_sample_norms_up_to_the_fourth(name):
    rng = np.random.default_rng(2)
    x, g, v = rng.standard_normal((3, 3, 4, 5)) + 0.3
    size = (4, 5) if name in ("layer_norm", "rms_norm") else (4,)
    weight, u = rng.standard_normal((2, *size))
    axes = {"group_norm": None, "instance_norm": (2,)}.get(name, (1, 2))

    def normal(x, weight):
        grouped = x.reshape(3, 2, 10) if axes is None else x
        over = 2 if axes is None else axes
        centre = 0 if name == "rms_norm" else grouped.mean(axis=over, keepdims=True)
        square = ((grouped - centre) ** 2).mean(axis=over, keepdims=True)
        x_hat = ((grouped - centre) / np.sqrt(square + EPS)).reshape(x.shape)
        return x_hat * (weight if weight.ndim == 2 else weight[:, None])

    ours = {
        "layer_norm": lambda x, w: F.layer_norm(x, (4, 5), w, eps=EPS),
        "rms_norm": lambda x, w: F.rms_norm(x, (4, 5), w, eps=EPS),
        "group_norm": lambda x, w: F.group_norm(x, 2, w, eps=EPS),
        "instance_norm": lambda x, w: F.instance_norm(x, weight=w, eps=EPS),
    }[name]
    expected = by_cauchy(normal, (x, weight), (v, u), g)
    found = by_grad(ours, (x, weight), (v, u), g)
    for k, a, b in zip(ORDERS, found, expected, strict=True):
        assert abs(a - b) < math.factorial(k) / RADIUS**k * 1e-13 + 1e-10 * abs(b), k
