"""Batch norm: the analytic rule against the tape and the formula, and the laws it must obey."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.ops.batch_norm_cases import Case, cases, reference
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import numpy_batch_norm


@pytest.fixture(params=["generic", "numpy"], scope="module")
def family(request):
    """Run the test by the definition, and by the kernels with their lower size limit lifted."""
    with pytest.MonkeyPatch.context() as patch, use_kernels(request.param):
        patch.setattr(numpy_batch_norm, "SMALLEST", 0)
        yield request.param


def run(case, create_graph=False):
    """Return y and the gradients of x, weight and bias (absent ones are given as 1 and 0)."""
    channels = tuple(case.x.shape[i] for i in case.axis)
    weight = np.ones(channels, case.x.dtype) if case.weight is None else case.weight
    bias = np.zeros(channels, case.x.dtype) if case.bias is None else case.bias
    inputs = [tg.Tensor(a, requires_grad=True) for a in (case.x, weight, bias)]
    x, w, b = inputs
    y = F.batch_norm(x, weight=w, bias=b, training=True, eps=case.eps, axis=case.axis)
    return y, tg.grad(y, inputs, case.g, create_graph=create_graph)


def errors(case):
    y, (gx, gw, gb) = run(case)
    return reference(case).errors(y=y.numpy(), gx=gx.numpy(), gweight=gw.numpy(), gbias=gb.numpy())


def batch(shape, seed=0, offset=0.0, spread=1.0, dtype=np.float64, axis=(1,), eps=1e-5):
    rng = np.random.default_rng(seed)
    channels = [shape[i] for i in axis]
    x = (rng.standard_normal(shape) * spread + offset).astype(dtype)
    weight, bias = rng.standard_normal((2, *channels)).astype(dtype)
    return Case(x, weight, bias, rng.standard_normal(shape).astype(dtype), axis, eps)


# --- against the formula ---------------------------------------------------------------------


@given(case=cases())
def test_float64_matches_the_formula_in_longdouble(family, case):
    # A few roundings of float64; the offset, at most the spread, costs nothing.
    assert max(errors(case).values()) < 1e-14


@given(case=cases(dtype=np.float32, max_offset=1e6))
def test_float32_is_right_when_the_mean_is_a_million_times_the_spread(family, case):
    # The stated bar. Two-pass float32 misses it by a factor of 1000 and more.
    assert max(errors(case).values()) < 1e-5


@given(case=cases(dtype=np.float16, max_offset=10.0))
def test_float16_is_rounded_once(family, case):
    y, (gx, _, _) = run(case)
    found = reference(case).errors(y=y.numpy(), gx=gx.numpy())
    # Half an ulp of float16 is 2⁻¹¹ = 4.9e-4 of the value, itself at most the scale (gx: twice it).
    assert found["y"] < 5.5e-4 and found["gx"] < 1.5e-3


@pytest.mark.parametrize("constant", [0.1, 1e4, 1e7, 1e10])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_channel_gives_exactly_beta(family, constant, dtype):
    case = batch((64, 3, 5, 7), dtype=dtype)
    case.x[:, 1] = constant
    y, (gx, gw, _) = run(case)
    assert (y.numpy()[:, 1] == case.bias[1]).all()
    assert gw.numpy()[1] == 0
    # γ (g - ḡ) / √ε: the variance is exactly 0
    g = case.g[:, 1].astype(np.float64)
    expected = case.weight[1] * (g - g.mean()) / np.sqrt(case.eps)
    np.testing.assert_allclose(gx.numpy()[:, 1], expected, rtol=1e-4, atol=1e-4)


def test_twenty_million_rows_do_not_lose_the_mean():
    # NumPy adds along axis 0 one by one: its float32 mean of these ones is 0.84.
    x = np.ones((20_000_000, 2), np.float32)
    x[::2, 1] = 3
    y = F.batch_norm(x, training=True, eps=0.5)
    assert (y[:, 0] == 0).all()
    np.testing.assert_allclose(y[:2, 1], [1 / np.sqrt(1.5), -1 / np.sqrt(1.5)], rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_magnitudes_whose_squares_leave_float32_are_right(family, magnitude):
    case = batch((256, 3, 4, 4), dtype=np.float32)
    case.x *= np.float32(magnitude)
    case.g *= np.float32(min(magnitude, 1.0))
    if magnitude < 1:
        case.eps = 1e-60  # or it would hide the variance
    found = errors(case)
    assert max(found.values()) < 1e-5


def test_nan_stays_in_its_channel(family):
    case = batch((8, 3, 16, 16), dtype=np.float32)
    case.x[3, 1, 0, 0] = np.nan
    y, (gx, gw, gb) = run(case)
    for values in (y.numpy(), gx.numpy()):
        assert np.isnan(values[:, 1]).all() and np.isfinite(values[:, [0, 2]]).all()
    assert np.isnan(gw.numpy()[1]) and np.isfinite(gw.numpy()[[0, 2]]).all()
    assert np.isfinite(gb.numpy()).all()


# --- against the tape ------------------------------------------------------------------------


@given(case=cases(), data=st.data())
def test_rule_agrees_with_the_tape_on_the_composite_at_first_and_second_order(case, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    channels = tuple(case.x.shape[i] for i in case.axis)
    weight = rng.standard_normal(channels) * rng.integers(0, 2, channels)
    bias = rng.standard_normal(channels)
    directions = [rng.standard_normal(a.shape) for a in (case.x, weight, bias)]

    def derivatives(function):
        inputs = [tg.Tensor(a, requires_grad=True) for a in (case.x, weight, bias)]
        g = tg.Tensor(case.g, requires_grad=True)
        first = tg.grad(function(*inputs), inputs, g, create_graph=True)
        along = sum((a * v).sum() for a, v in zip(first, directions, strict=True))
        return [a.numpy() for a in (*first, *tg.grad(along, [inputs[0], inputs[1], g]))]

    rule = derivatives(
        lambda x, w, b: F.batch_norm(
            x, weight=w, bias=b, training=True, eps=case.eps, axis=case.axis
        )
    )
    tape = derivatives(lambda x, w, b: F.batch_norm_composite(x, w, b, case.eps, axis=case.axis))
    s = 1 / np.sqrt(case.x.var(axis=case.reduced) + case.eps)
    # A second derivative is of the size of s²; summands of that size cancel in both ways of
    # computing it, so the bound is on that scale, with a thousand roundings to spare.
    for a, b in zip(rule, tape, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * (1 + s.max()) ** 2)


def test_third_order_agrees_with_the_tape_also_where_gamma_is_zero():
    case = batch((5, 3, 2), seed=3)
    case.weight[1] = 0
    v = np.random.default_rng(4).standard_normal((3, *case.x.shape))

    def third(function):
        x, w = (tg.Tensor(a, requires_grad=True) for a in (case.x, case.weight))
        (a,) = tg.grad(function(x, w), x, v[0], create_graph=True)
        (b,) = tg.grad(a, x, v[1], create_graph=True)
        return [t.numpy() for t in tg.grad(b, [x, w], v[2])]

    rule = third(lambda x, w: F.batch_norm(x, weight=w, training=True))
    tape = third(lambda x, w: F.batch_norm_composite(x, w))
    for a, b in zip(rule, tape, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
        assert np.isfinite(a).all()


@given(case=cases())
def test_evaluation_agrees_with_ordinary_ops_at_first_and_second_order(case):
    rng = np.random.default_rng(7)
    channels = tuple(case.x.shape[i] for i in case.axis)
    arrays = [case.x, *rng.standard_normal((2, *channels)), np.ones(channels), np.zeros(channels)]
    arrays[2] = np.abs(arrays[2]) + 0.1
    directions = [rng.standard_normal(a.shape) for a in arrays]

    def by_op(x, mean, var, w, b):
        return F.batch_norm(x, mean, var, w, b, eps=case.eps, axis=case.axis)

    def by_tape(x, mean, var, w, b):
        mean, var, w, b = (v.reshape(case.along(v.numpy()).shape) for v in (mean, var, w, b))
        return (x - mean) / (var + case.eps).sqrt() * w + b

    results = []
    for function in (by_op, by_tape):
        inputs = [tg.Tensor(a, requires_grad=True) for a in arrays]
        y = function(*inputs)
        first = tg.grad(y, inputs, case.g, create_graph=True)
        along = sum((a * v).sum() for a, v in zip(first, directions, strict=True))
        second = tg.grad(along, inputs, allow_unused=True)
        results.append([y, *first, *(s for s in second if s is not None)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-9)


# --- laws ------------------------------------------------------------------------------------


@given(case=cases())
def test_the_gradient_of_x_sums_to_zero_over_a_channel(case):
    _, (gx, _, _) = run(case)
    scale = np.abs(gx.numpy()).sum(axis=case.reduced) + reference(case).scales["gx"].max()
    assert (np.abs(gx.numpy().sum(axis=case.reduced)) <= 1e-13 * scale).all()


@given(case=cases())
def test_the_gradient_of_x_keeps_of_x_hat_only_the_share_of_eps(case):
    # ⟨gx, x̂⟩ = γ s ⟨g, x̂⟩ ε / (v + ε)
    case.bias = None
    _, (gx, gw, _) = run(case)
    x = case.x.astype(np.longdouble)
    var = x.var(axis=case.reduced)
    s = 1 / np.sqrt(var + case.eps)
    x_hat = (x - case.along(x.mean(axis=case.reduced))) * case.along(s)
    gamma = 1 if case.weight is None else case.weight
    left = (gx.numpy() * x_hat).sum(axis=case.reduced)
    right = gamma * s * gw.numpy() * case.eps / (var + case.eps)
    scale = np.abs(gamma) * s * np.abs(case.g * x_hat).sum(axis=case.reduced)
    assert (np.abs(left - right) <= 1e-13 * scale + 1e-300).all()


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_the_backward_is_its_own_transpose(case, seed):
    # ⟨u, G(v)⟩ = ⟨v, G(u)⟩
    other = Case(case.x, case.weight, case.bias, None, case.axis, case.eps)
    other.g = np.random.default_rng(seed).standard_normal(case.x.shape)
    (_, (gv, _, _)), (_, (gu, _, _)) = run(case), run(other)
    left, right = (other.g * gv.numpy()).sum(), (case.g * gu.numpy()).sum()
    scale = np.abs(other.g * gv.numpy()).sum() + np.abs(case.g * gu.numpy()).sum()
    assert abs(left - right) <= 1e-12 * scale + 1e-12 * reference(case).scales["gx"].max()


@given(case=cases(), k=st.integers(-8, 8))
def test_scaling_x_by_a_power_of_two_is_exact(case, k):
    y, (gx, gw, gb) = run(case)
    case.x, case.eps = case.x * 2.0**k, case.eps * 4.0**k
    scaled_y, (scaled_gx, scaled_gw, scaled_gb) = run(case)
    assert (scaled_y.numpy() == y.numpy()).all()
    assert (scaled_gx.numpy() * 2.0**k == gx.numpy()).all()
    assert (scaled_gw.numpy() == gw.numpy()).all() and (scaled_gb.numpy() == gb.numpy()).all()


@given(case=cases())
def test_negating_x_is_exact_without_beta(case):
    case.bias = None
    y, (gx, gw, _) = run(case)
    case.x, case.g = -case.x, -case.g
    negated_y, (negated_gx, negated_gw, _) = run(case)
    assert (negated_y.numpy() == -y.numpy()).all()
    assert (negated_gx.numpy() == -gx.numpy()).all()
    assert (negated_gw.numpy() == gw.numpy()).all()


@given(case=cases(), k=st.integers(-8, 8))
def test_the_backward_is_linear_in_g_and_gamma(case, k):
    _, before = run(case)
    case.g = case.g * 2.0**k
    _, after = run(case)
    assert all((a.numpy() == b.numpy() * 2.0**k).all() for a, b in zip(after, before, strict=True))
    case.weight = np.full([case.x.shape[i] for i in case.axis], 2.0**k)
    _, (weighted, _, _) = run(case)
    case.weight = None
    _, (plain, _, _) = run(case)
    assert (weighted.numpy() == plain.numpy() * 2.0**k).all()


@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_permuting_the_batch_permutes_the_results(case, seed):
    (first, *_) = case.reduced
    order = np.random.default_rng(seed).permutation(case.x.shape[first])
    y, (gx, _, _) = run(case)
    scales = reference(case).scales
    case.x, case.g = case.x.take(order, first), case.g.take(order, first)
    permuted_y, (permuted_gx, _, _) = run(case)
    for name, a, b in (("y", permuted_y, y), ("gx", permuted_gx, gx)):
        # The order of a sum changes its rounding, no more.
        assert (np.abs(a.numpy() - b.numpy().take(order, first)) <= 1e-13 * scales[name]).all()


@given(case=cases())
def test_a_duplicated_batch_doubles_the_sums_and_leaves_gx(case):
    (first, *_) = case.reduced
    y, (gx, gw, gb) = run(case)
    scales = reference(case).scales
    case.x, case.g = (np.concatenate([a, a], first) for a in (case.x, case.g))
    double_y, (double_gx, double_gw, double_gb) = run(case)
    n = y.shape[first]
    for name, a, b in (("y", double_y, y), ("gx", double_gx, gx)):
        assert (np.abs(a.numpy().take(range(n), first) - b.numpy()) <= 1e-13 * scales[name]).all()
    assert (np.abs(double_gw.numpy() - 2 * gw.numpy()) <= 1e-13 * 2 * scales["gweight"]).all()
    assert (np.abs(double_gb.numpy() - 2 * gb.numpy()) <= 1e-13 * 2 * scales["gbias"]).all()


def test_channels_do_not_see_each_other(family):
    case = batch((16, 4, 5, 5))
    y, grads = run(case)
    case.x[:, 2], case.g[:, 2] = case.x[:, 2] ** 3, -7 * case.g[:, 2]
    other_y, others = run(case)
    kept = [0, 1, 3]
    assert (other_y.numpy()[:, kept] == y.numpy()[:, kept]).all()
    assert (others[0].numpy()[:, kept] == grads[0].numpy()[:, kept]).all()
    assert (others[1].numpy()[kept] == grads[1].numpy()[kept]).all()
    assert not (other_y.numpy()[:, 2] == y.numpy()[:, 2]).all()


@given(case=cases())
def test_euler_relation_of_gamma_and_beta(case):
    # y is linear in (γ, β), so ⟨g, y⟩ = γ gγ + β gβ in every channel
    y, (_, gw, gb) = run(case)
    left = (case.g * y.numpy()).sum(axis=case.reduced)
    gamma = 1 if case.weight is None else case.weight
    beta = 0 if case.bias is None else case.bias
    scale = np.abs(case.g * y.numpy()).sum(axis=case.reduced) + np.abs(beta * gb.numpy())
    scale = scale + np.abs(gamma) * reference(case).scales["gweight"]
    assert (np.abs(left - gamma * gw.numpy() - beta * gb.numpy()) <= 1e-13 * scale + 1e-300).all()


@given(case=cases())
def test_x_hat_has_mean_zero_and_mean_square_v_over_v_plus_eps(case):
    case.weight = case.bias = None
    y, _ = run(case)
    var = case.x.astype(np.longdouble).var(axis=case.reduced)
    assert (np.abs(y.numpy().mean(axis=case.reduced)) < 1e-13).all()
    np.testing.assert_allclose(
        (y.numpy() ** 2).mean(axis=case.reduced), (var / (var + case.eps)).astype(float), rtol=1e-12
    )


def test_evaluation_treats_every_sample_alone_and_is_affine():
    case = batch((6, 3, 4))
    mean, var = np.array([0.5, -1.0, 2.0]), np.array([0.1, 1.0, 4.0])

    def evaluate(x):
        return F.batch_norm(x, mean, var, case.weight, case.bias)

    whole = evaluate(case.x)
    assert all((evaluate(case.x[i : i + 1]) == whole[i : i + 1]).all() for i in range(6))
    x0, x1 = case.x[:3], case.x[3:]
    middle = evaluate((x0 + x1) / 2)
    np.testing.assert_allclose(middle, (evaluate(x0) + evaluate(x1)) / 2, rtol=1e-12, atol=1e-12)
    assert (mean == [0.5, -1.0, 2.0]).all() and (var == [0.1, 1.0, 4.0]).all()
