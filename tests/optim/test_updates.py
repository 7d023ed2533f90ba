"""Each optimizer's update against its formula, written out in float64, over several steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_bn as tg
from tinygrad_bn import nn, optim
from tinygrad_bn.backend import as_dtype
from tinygrad_bn.backend.kernels import use_kernels

RATES = st.floats(1e-3, 0.5)
DECAYS = st.sampled_from([0.0, 0.01, 0.3])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)


def exactly(p):
    return p


def sgd(p, gradients, lr, momentum, weight_decay, nesterov, rounded=exactly):
    velocity = None
    for g in gradients:
        g = g + weight_decay * p
        if momentum:
            velocity = g if velocity is None else momentum * velocity + g
            g = g + momentum * velocity if nesterov else velocity
        p = rounded(p - lr * g)
    return p


def adam(p, gradients, lr, betas, eps, weight_decay, decoupled, rounded=exactly):
    first = second = 0.0
    for t, g in enumerate(gradients, 1):
        if decoupled:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        first_hat, second_hat = first / (1 - betas[0] ** t), second / (1 - betas[1] ** t)
        p = rounded(p - lr * first_hat / (np.sqrt(second_hat) + eps))
    return p


def run(make, start, gradients, dtype="float64"):
    """Return a parameter after one step for each gradient, and the optimizer."""
    parameter = nn.Parameter(start, dtype=dtype)
    optimizer = make([parameter])
    for g in gradients:
        parameter.grad = tg.tensor(g, dtype=dtype)
        optimizer.step()
        np.testing.assert_array_equal(parameter.grad.numpy(), g.astype(dtype))
    return parameter.numpy(), optimizer


def draw(shape, steps=5, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=shape)), [
        np.asarray(rng.normal(size=shape)) for _ in range(steps)
    ]


@given(SHAPES, RATES, st.sampled_from([0.0, 0.5, 0.9]), DECAYS, st.booleans())
def test_sgd_is_its_formula(shape, lr, momentum, decay, nesterov):
    nesterov = nesterov and momentum > 0
    start, gradients = draw(shape)
    found, _ = run(
        lambda p: optim.SGD(p, lr, momentum, weight_decay=decay, nesterov=nesterov),
        start,
        gradients,
    )
    expected = sgd(start, gradients, lr, momentum, decay, nesterov)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(
    SHAPES, RATES, st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.5, 0.9)]), DECAYS, st.booleans()
)
def test_adam_and_adamw_are_their_formulas(shape, lr, betas, decay, decoupled):
    start, gradients = draw(shape)
    kind = optim.AdamW if decoupled else optim.Adam
    found, _ = run(lambda p: kind(p, lr, betas, 1e-8, decay), start, gradients)
    expected = adam(start, gradients, lr, betas, 1e-8, decay, decoupled)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_adams_eps_stands_outside_the_root():
    # With a tiny gradient, eps inside the root would make another step altogether.
    found, _ = run(lambda p: optim.Adam(p, 1.0, eps=1.0), np.zeros(1), [np.full(1, 1e-3)])
    assert found[0] == pytest.approx(-1e-3 / (1e-3 + 1), rel=1e-9)


MAKERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, 0.9),
    "nesterov": lambda p: optim.SGD(p, 0.1, 0.9, 0.01, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.1, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, 0.1),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_parameters_keep_their_dtype_and_state_is_float32_at_least(make, dtype):
    start, gradients = draw((4, 3))
    wide, _ = run(make, start.astype(dtype), [g.astype(dtype) for g in gradients])
    found, optimizer = run(make, start.astype(dtype), gradients, dtype)
    assert found.dtype == np.dtype(dtype)
    # One rounding of a parameter around 1 in each of five steps, and as much again for the rest.
    np.testing.assert_allclose(found, wide, atol=10 * 4 * np.finfo(dtype).eps)
    for kept in optimizer.state_dict()["state"].values():
        assert {v.dtype for v in kept.values() if isinstance(v, tg.Tensor)} <= {np.dtype("float32")}


IN_HALF = {
    "sgd": (lambda p: optim.SGD(p, 0.01), sgd, (0.01, 0.0, 0.0, False)),
    "momentum": (lambda p: optim.SGD(p, 0.01, 0.9), sgd, (0.01, 0.9, 0.0, False)),
    "nesterov": (
        lambda p: optim.SGD(p, 0.01, 0.9, 0.01, nesterov=True),
        sgd,
        (0.01, 0.9, 0.01, True),
    ),
    "adam": (
        lambda p: optim.Adam(p, 0.01, weight_decay=0.01),
        adam,
        (0.01, (0.9, 0.999), 1e-8, 0.01, False),
    ),
    "adamw": (
        lambda p: optim.AdamW(p, 0.01, weight_decay=0.1),
        adam,
        (0.01, (0.9, 0.999), 1e-8, 0.1, True),
    ),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", IN_HALF)
def test_half_precision_is_rounded_once_a_step(name, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    make, formula, options = IN_HALF[name]
    half = as_dtype(dtype)

    def rounded(p):
        return p.astype(half).astype("float64")

    start, gradients = draw(3000)
    start, gradients = rounded(start), [rounded(g) for g in gradients]
    found, _ = run(make, start.astype(half), [g.astype(half) for g in gradients], dtype)
    expected = formula(start, gradients, *options, rounded=rounded)
    # All but what lies so near the middle between two numbers that float32 takes the other one, a
    # thousandth here. A thirtieth is wrong where the change is rounded before it is added, and most
    # where the decay is, since 0.999 is 1 in bfloat16.
    assert np.mean(found.astype("float64") == expected) > 0.997


def test_adam_in_half_precision_survives_small_gradients():
    # Their squares, 10⁻¹⁰, are zero in float16, and the step would be infinite.
    found, _ = run(lambda p: optim.Adam(p, 0.125), np.zeros(3), [np.full(3, 1e-5)], "float16")
    np.testing.assert_allclose(found, -0.125, rtol=1e-2)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_updates_are_in_place_whatever_the_layout(make):
    start, gradients = draw((3, 4))
    expected, _ = run(make, start, gradients)
    memory = np.asfortranarray(start)
    parameter = tg.Tensor(memory, requires_grad=True)
    optimizer = make([parameter])
    for g in gradients:
        parameter.grad = tg.Tensor(np.repeat(g, 2, axis=1)[:, ::2])
        optimizer.step()
    assert parameter.data is memory
    np.testing.assert_array_equal(memory, expected)


def test_scratch_memory_is_shared_and_made_once():
    parameters = [nn.Parameter(np.ones(n)) for n in (3, 50, 7)]
    optimizer = optim.SGD(parameters, 0.1)
    for _ in range(2):
        for p in parameters:
            p.grad = tg.ones_like(p)
        with use_kernels("generic"):  # a compiled update that is there already takes no scratch
            optimizer.step()
        (block,) = optimizer._scratch.values()
        assert block.size == 50
    np.testing.assert_allclose(parameters[2].numpy(), 1 - 2 * 0.1, rtol=1e-15)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_quadratic_is_minimized(make):
    parameter = nn.Parameter(np.array([3.0, -2.0]))
    optimizer = make([parameter])
    for _ in range(300):
        optimizer.zero_grad()
        ((parameter - np.array([1.0, 0.5])) ** 2).sum().backward()
        optimizer.step()
    # Weight decay of 0.01 pulls the answer towards 0 by up to half a percent.
    np.testing.assert_allclose(parameter.numpy(), [1.0, 0.5], atol=2e-2)
