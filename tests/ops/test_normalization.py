"""Layer norm and RMS norm: the rules against the formulas, the tape, and the laws they obey."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import testing
from tinygrad_bn.ops.batch_norm import batch_norm
from tinygrad_bn.ops.normalization import layer_norm, rms_norm


@dataclass
class Case:
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    g: np.ndarray
    axis: tuple
    channels: tuple
    eps: float

    @property
    def reduced(self):
        return tuple(i for i in range(self.x.ndim) if i not in self.axis)

    @property
    def options(self):
        return {"axis": self.axis, "channels": self.channels, "eps": self.eps}

    def along(self, vector):
        shape = [n if i in self.channels else 1 for i, n in enumerate(self.x.shape)]
        return vector.reshape(shape)


#: Shape, kept axes, axes of weight and bias: layer, group and instance norm, either layout.
LAYOUTS = [
    ((5, 6), (0,), (1,)),
    ((3, 4, 5), (0, 1), (2,)),
    ((3, 4, 5), (0,), (1, 2)),
    ((2, 3, 2, 5), (0, 1), (1, 2)),
    ((2, 5, 3, 2), (0, 2), (2, 3)),
    ((3, 4, 5), (0, 1), (1,)),
    ((3, 5, 4), (0, 2), (2,)),
    ((7,), (), (0,)),
]


@st.composite
def cases(draw, dtype=np.float64, max_offset=1.0):
    """Draw values whose offset and spread differ from sample to sample, with zeros in gamma."""
    shape, axis, channels = draw(st.sampled_from(LAYOUTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    kept = [n if i in axis else 1 for i, n in enumerate(shape)]
    spread = 10.0 ** rng.uniform(-2, 2, kept)
    x = rng.standard_normal(shape) * spread + spread * max_offset * rng.uniform(-1, 1, kept)
    sizes = [shape[i] for i in channels]
    weight = rng.standard_normal(sizes) * rng.integers(0, 2, sizes)
    bias, g = rng.standard_normal(sizes), rng.standard_normal(shape)
    eps = draw(st.sampled_from([1e-5, 1e-12, 1e-1, 10.0]), label="eps")
    return Case(*(a.astype(dtype) for a in (x, weight, bias, g)), axis, channels, eps)


def run(op, case):
    """Return y and the gradients of the inputs, as arrays."""
    arrays = [case.x, case.weight] + ([case.bias] if op is layer_norm else [])
    inputs = [tg.Tensor(a, requires_grad=True) for a in arrays]
    y = op(*inputs, **case.options)
    return [t.numpy() for t in (y, *tg.grad(y, inputs, case.g))]


def reference(op, case):
    """Return (right answer in longdouble, scale of its error) for each result of `run`."""
    wide = np.longdouble
    x, g = case.x.astype(wide), case.g.astype(wide)
    gamma, beta = (case.along(v).astype(wide) for v in (case.weight, case.bias))
    over = {"axis": case.reduced, "keepdims": True}
    rest = tuple(i for i in range(x.ndim) if i not in case.channels)
    centred = x - x.mean(**over) if op is layer_norm else x
    s = 1 / np.sqrt((centred**2).mean(**over) + wide(case.eps))
    x_hat, h = centred * s, gamma * g
    y = gamma * x_hat + (beta if op is layer_norm else 0)
    gx = s * (h - x_hat * (h * x_hat).mean(**over))
    if op is layer_norm:
        gx = gx - s * h.mean(**over)
    size = np.abs(gamma).max() * np.abs(x_hat).max(**over)
    results = [
        (y, size + np.abs(beta).max()),
        (gx, np.abs(gamma).max() * s * np.abs(g).max(**over)),
        # Not Σ|g x̂|: of few terms, x̂ may be near 0, and is known relative to the sample's largest.
        ((g * x_hat).sum(axis=rest), (np.abs(g) * np.abs(x_hat).max(**over)).sum(axis=rest)),
    ]
    return results + ([(g.sum(axis=rest), np.abs(g).sum(axis=rest))] if op is layer_norm else [])


def worst(op, case):
    found = []
    for got, (want, scale) in zip(run(op, case), reference(op, case), strict=True):
        error = np.abs(got.astype(np.longdouble) - want)
        found.append(float((error / np.maximum(scale, 1e-300)).max()))
    return found


BOTH = pytest.mark.parametrize("op", [layer_norm, rms_norm], ids=lambda op: op.name)


@BOTH
@given(case=cases())
def test_float64_matches_the_formula_in_longdouble(op, case):
    assert max(worst(op, case)) < 1e-14  # a few roundings


@BOTH
@given(case=cases(dtype=np.float32, max_offset=1e6))
def test_float32_is_right_when_the_mean_is_a_million_times_the_spread(op, case):
    assert max(worst(op, case)) < 1e-6  # rounded once


@BOTH
@given(case=cases(dtype=np.float16, max_offset=10.0))
def test_float16_is_rounded_once(op, case):
    y, gx, *_ = worst(op, case)
    # Half an ulp of float16 is 2⁻¹¹ = 4.9e-4 of the value; y is at most its scale, gx some times it
    assert y < 5.5e-4 and gx < 3e-3


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_squares_that_leave_the_dtype_are_right(dtype):
    big = 3e4 if dtype is np.float16 else 1e30
    x = np.array([[big, -big, big, -big], [0.0, 0.0, big, big]], dtype)
    for op, want in (
        (layer_norm, [[1, -1, 1, -1], [-1, -1, 1, 1]]),
        (rms_norm, [[1, -1, 1, -1], [0, 0, 2**0.5, 2**0.5]]),
    ):
        y = op(x, axis=(0,), channels=(1,), eps=1e-5)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, np.array(want).astype(dtype), rtol=1e-6)


# --- against the tape ------------------------------------------------------------------------


def composite(op, case):
    def by_tape(x, weight, bias=None):
        over = {"axis": case.reduced, "keepdims": True}
        centred = x - x.mean(**over) if op is layer_norm else x
        x_hat = centred / ((centred * centred).mean(**over) + case.eps).sqrt()
        y = x_hat * weight.reshape(case.along(case.weight).shape)
        return y if bias is None else y + bias.reshape(case.along(case.bias).shape)

    return by_tape


@BOTH
@given(case=cases(), data=st.data())
def test_rule_agrees_with_the_tape_to_third_order(op, case, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    case.eps = 0.1
    case.x = case.x / np.abs(case.x).max()
    u, v, w = rng.standard_normal((3, *case.x.shape))
    arrays = [case.x, case.weight] + ([case.bias] if op is layer_norm else [])

    def derivatives(function):
        inputs = [tg.Tensor(a, requires_grad=True) for a in arrays]
        g = tg.Tensor(case.g, requires_grad=True)
        y = function(*inputs)
        first = tg.grad(y, inputs, g, create_graph=True)
        mixed = (first[0] * u).sum() + (first[1] ** 2).sum()
        second = tg.grad(mixed, [inputs[0], inputs[1], g], create_graph=True)
        third = tg.grad((second[0] * v).sum() + (second[2] * w).sum(), [*inputs[:2], g])
        return [t.numpy() for t in (y, *first, *second, *third)]

    rule = derivatives(lambda *inputs: op(*inputs, **case.options))
    for a, b in zip(rule, derivatives(composite(op, case)), strict=True):
        # s is at most 1/√0.1: terms of third order are some hundreds in size, and cancel.
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("missing", [(), (1,), (2,), (1, 2)])
def test_gradients_agree_with_differences_whatever_is_left_out(op, missing):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in ((3, 5), 5, 5)][: len(op.inputs)]
    arrays = [None if i in missing else a for i, a in enumerate(arrays)]

    def fn(*inputs):
        return op(*inputs, axis=(0,), channels=(1,), eps=1e-3)

    testing.check_grad(fn, *arrays)
    testing.check_double_grad(fn, *arrays)


# --- laws ------------------------------------------------------------------------------------


@given(case=cases())
def test_layer_norm_does_not_see_the_mean_and_its_gradient_has_none(case):
    _, gx, *_ = run(layer_norm, case)
    scale = np.abs(gx).sum(axis=case.reduced) + float(reference(layer_norm, case)[1][1].max())
    assert (np.abs(gx.sum(axis=case.reduced)) <= 1e-13 * scale).all()


@BOTH
@given(case=cases(), k=st.integers(-8, 8))
def test_scaling_x_by_a_power_of_two_is_exact(op, case, k):
    y, gx, *rest = run(op, case)
    case.x, case.eps = case.x * 2.0**k, case.eps * 4.0**k
    scaled_y, scaled_gx, *scaled_rest = run(op, case)
    np.testing.assert_array_equal(scaled_y, y)
    np.testing.assert_array_equal(scaled_gx, gx / 2.0**k)
    for a, b in zip(rest, scaled_rest, strict=True):
        np.testing.assert_array_equal(a, b)


@BOTH
@given(case=cases())
def test_each_sample_is_by_itself(op, case):
    if 0 not in case.axis:
        return
    whole = op(case.x, case.weight, **case.options)
    for i in range(len(case.x)):
        one = op(case.x[i : i + 1], case.weight, **case.options)
        np.testing.assert_allclose(one, whole[i : i + 1], rtol=1e-13, atol=1e-15)


@given(case=cases())
def test_where_gamma_goes_with_the_kept_axes_it_is_batch_norm(case):
    weight = np.full_like(case.weight, 2.0)
    y = layer_norm(case.x, weight, None, **case.options)
    twice = 2 * batch_norm(case.x, axis=case.axis, eps=case.eps) if case.axis else y
    np.testing.assert_allclose(y, twice, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("constant", [0.1, 1e4, 1e7, 1e10])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_sample_gives_exactly_beta_and_a_finite_gradient(constant, dtype):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 3, 50)).astype(dtype)
    weight, bias = rng.standard_normal((2, 50)).astype(dtype)
    x[1] = constant
    case = Case(x, weight, bias, g, (0,), (1,), 1e-5)
    y, gx, *_ = run(layer_norm, case)
    assert (y[1] == bias).all()
    h = (weight * g[1]).astype(np.float64)
    np.testing.assert_allclose(gx[1], (h - h.mean()) / np.sqrt(1e-5), rtol=1e-4, atol=1e-4)


@BOTH
def test_nan_stays_in_its_sample(op):
    rng = np.random.default_rng(0)
    case = Case(*rng.standard_normal((2, 4, 6)), *rng.standard_normal((2, 6)), (0,), (1,), 1e-5)
    case.x, case.weight, case.bias, case.g = case.x, case.bias, case.g, case.weight
    case.x[2, 3] = np.nan
    y, gx, *_ = run(op, case)
    for values in (y, gx):
        assert np.isnan(values[2]).all() and np.isfinite(values[[0, 1, 3]]).all()


@BOTH
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_gives_nothing_and_zero_gradients(op, shape):
    x = tg.zeros(shape, requires_grad=True)
    weight = tg.ones(shape[1], requires_grad=True)
    y = op(x, weight, axis=(0,), channels=(1,), eps=1e-5)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert (weight.grad.numpy() == 0).all()
