"""The CUDA kernels of batch norm, run on the CPU, against the formula and the generic form."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.ops.batch_norm_cases import cases, reference
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import batch_norm as kernel
from tinygrad_bn.kernels.cuda import batch_norm_given as given_kernel
from tinygrad_bn.ops.batch_norm import batch_norm, batch_norm_given

pytestmark = pytest.mark.usefixtures("small")

(rule,) = (r.function for r in batch_norm.rules)
(given_rule,) = (r.function for r in batch_norm_given.rules)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: On the scales of docs/batch_norm.md. float32: the bar of the library. float64: some hundred
#: roundings, for means up to 1000 times the spread. Half precision: one rounding of the result.
BARS = {"float32": 1e-5, "float64": 1e-11, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def laid_out(array, order, unaligned=False):
    """Return a copy of an array that lies in memory in this order of axes."""
    shape = [array.shape[i] for i in order]
    memory = np.empty(array.size + unaligned, array.dtype)[int(unaligned) :].reshape(shape)
    memory[...] = array.transpose(order)
    return memory.transpose(np.argsort(order))


def together(order, axis):
    first = order.index(axis[0])
    return tuple(order[first : first + len(axis)]) == axis


@st.composite
def arranged(draw, dtype, max_offset):
    """Draw a case of a dtype whose x lies in memory in any order, at an even address or not."""
    case = draw(cases(np.float64 if dtype == "float64" else np.float32, max_offset))
    for name in ("x", "g"):
        setattr(
            case,
            name,
            getattr(case, name).astype(np.dtype(BFLOAT16 if dtype == "bfloat16" else dtype)),
        )
    order = draw(st.permutations(range(case.x.ndim)), label="order in memory")
    unaligned = draw(st.booleans(), label="unaligned")
    case.x = laid_out(case.x, order, unaligned)
    return case, order


@pytest.mark.parametrize(
    ("dtype", "max_offset"),
    [("float32", 1e6), ("float64", 1e3), ("float16", 1.0), ("bfloat16", 1.0)],
)
def test_kernel_matches_the_formula_for_any_axes_and_order_in_memory(dtype, max_offset):
    @given(drawn=arranged(dtype, max_offset))
    def check(drawn):
        case, order = drawn
        result = kernel.forward(case.x, case.weight, case.bias, axis=case.axis, eps=case.eps)
        if result is NotImplemented:
            assert not together(order, case.axis) or 1 in case.x.shape
            return
        saved = result.residuals
        options = {"axis": case.axis, "eps": case.eps, "groups": 1, "needs": (True, True, True)}
        statistics = saved["mean"], saved["var"]
        grads = kernel.vjp(case.g, case.x, case.weight, case.bias, None, *statistics, **options)
        got = dict(zip(("gx", "gweight", "gbias"), grads, strict=True))
        found = reference(case).errors(y=result.out, **got)
        assert max(found.values()) < BARS[dtype]
        assert result.out.dtype == grads[0].dtype == case.x.dtype
        assert grads[1].shape == grads[2].shape == tuple(case.x.shape[i] for i in case.axis)

    check()


# --- against the generic form --------------------------------------------------------------------


def batch(shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)


@st.composite
def batches(draw, masked=False, groups=False):
    """Draw x, g, weight, bias, axis and options for batch norm with a mask, or in groups."""
    ndim = draw(st.integers(2, 4))
    axis = (draw(st.integers(1, ndim - 1)),)
    many = draw(st.sampled_from([1, 2, 3] if groups else [1]))
    shape = [draw(st.integers(2, 5)) * many, *(draw(st.integers(1, 5)) for _ in range(ndim - 1))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, g = rng.standard_normal((2, *shape)).astype(draw(st.sampled_from(["float32", "float64"])))
    c = shape[axis[0]]
    weight = rng.standard_normal(c).astype(draw(st.sampled_from(["float32", "float64"])))
    bias = None if draw(st.booleans()) else rng.standard_normal(c).astype("float32")
    mask = None
    if masked:
        whole = [1 if i == axis[0] else n for i, n in enumerate(shape)]
        sizes = [draw(st.sampled_from([1, n])) for n in whole]
        mask = rng.integers(0, 3, sizes).astype(draw(st.sampled_from(["float32", "int64", "bool"])))
        x[np.broadcast_to(mask, whole).astype(bool).repeat(c, axis[0]) == 0] = np.nan
    return x, g, weight, bias, mask, {"axis": axis, "eps": 1e-3, "groups": many}


def close(got, want, scale=1.0):
    """Assert that arrays agree up to some float32 roundings of numbers as large as `scale`, which
    cancel, or of their largest entry."""
    assert got.shape == want.shape
    bar = 2e-6 * max(scale, np.nanmax(np.abs(want), initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=bar, equal_nan=True)


@given(drawn=st.one_of(batches(masked=True), batches(groups=True), batches(True, True)))
def test_masks_and_groups_are_those_of_the_generic_form(drawn):
    x, g, weight, bias, mask, options = drawn
    count = (x.size // x.shape[options["axis"][0]]) // options["groups"]
    if mask is None and count < 2:
        return
    with use_kernels("generic"):
        want, saved = batch_norm.call_with_residuals(x, weight, bias, mask, **options)
    result = kernel.forward(x, weight, bias, mask, **options)
    close(result.out, want)
    for name in ("mean", "var", "count"):
        found = result.residuals[name]
        assert np.shape(found) == np.shape(saved[name])
        np.testing.assert_allclose(found, saved[name], rtol=1e-7, atol=1e-9)
    statistics = saved["mean"], saved["var"]
    call = (g, x, weight, bias, mask, *statistics)
    needs = (True, True, True, False)
    grads = kernel.vjp(*call, **options, needs=needs)
    steepest = np.abs(weight).max() / np.sqrt(saved["var"].min() + options["eps"])
    for got, right in zip(grads[:3], rule(*call, **options, needs=needs)[:3], strict=True):
        close(got, right, x.size + steepest * np.abs(g).max())
    assert grads[3] is None


@given(drawn=batches(), seed=st.integers(0, 99), wants=st.tuples(*[st.booleans()] * 5))
def test_given_statistics_are_those_of_the_generic_form(drawn, seed, wants):
    x, g, weight, bias, _, options = drawn
    options = {"axis": options["axis"], "eps": options["eps"]}
    rng = np.random.default_rng(seed)
    mean, var = rng.standard_normal(weight.shape), rng.uniform(0.1, 4, weight.shape)
    inputs = (x, mean.astype("float32"), var, weight, bias)
    with use_kernels("generic"):
        want = batch_norm_given(*inputs, **options)
    close(given_kernel.forward(*inputs, **options), want)
    grads = given_kernel.vjp(g, *inputs, **options, needs=wants)
    right = given_rule(g, *inputs, **options, needs=(True,) * 5)
    for needed, got, correct in zip(wants, grads, right, strict=True):
        assert (got is not None) == needed
        if needed:
            close(got, correct, x.size)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", BFLOAT16])
@given(drawn=batches(masked=True, groups=True), with_residual=st.booleans(), masked=st.booleans())
def test_relu_and_residual_are_those_of_separate_steps(dtype, drawn, with_residual, masked):
    x, g, weight, bias, mask, options = drawn
    if not masked:
        x, mask = np.nan_to_num(x, nan=1.0), None
        if x.size // weight.size // options["groups"] < 2:
            return
    x, g = x.astype(dtype), g.astype(dtype)
    residual = batch(x.shape, dtype, seed=7)[0] if with_residual else None
    plain = kernel.normalized(x, weight, bias, mask, **options)
    fused = kernel.normalized(x, weight, bias, mask, residual, **options, relu=True)
    wide = np.float64 if dtype == "float64" else np.float32
    y = plain.out.astype(wide) if residual is None else plain.out.astype(wide) + residual
    if dtype in ("float32", "float64") or residual is None:  # else y was rounded in between
        close(fused.out.astype(wide), np.where(y < 0, 0, y).astype(dtype).astype(wide))
    statistics = fused.residuals["mean"], fused.residuals["var"]
    through = np.where(fused.out > 0, g, g.dtype.type(0))
    needs = (True, True, True)
    want = kernel.vjp(through, x, weight, bias, mask, *statistics, **options, needs=needs)
    out = fused.out if with_residual else None
    call = (g, x, weight, bias, mask, *statistics, out)
    got = kernel.gradients(*call, **options, needs=needs, relu=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_functions_of_the_library_are_served_and_agree(small):
    """Forward, gradients and running statistics of F, by the kernels and by the generic forms."""
    x, g = batch((12, 4, 8))
    weight, bias = batch((2, 4), seed=3)[0]

    def run(function, training):
        tensors = [tg.tensor(a, requires_grad=True) for a in (x, weight, bias)]
        running = np.zeros(4, np.float32), np.ones(4, np.float32)
        y = function(tensors[0], *running, tensors[1], tensors[2], training)
        y.backward(g)
        return [y.numpy(), *(t.grad.numpy() for t in tensors), *running]

    for function in (F.batch_norm, F.batch_norm_relu):
        for training in (True, False):
            small.launched.clear()
            got = run(function, training)
            assert len(small.launched) >= 2
            with use_kernels("generic"):
                want = run(function, training)
            for a, b in zip(got, want, strict=True):
                close(a, b, x.size / 4)


# --- properties ----------------------------------------------------------------------------------


def gradients(x, g, axis=(1,), needs=(True, True, True), **options):
    result = kernel.forward(x, axis=axis, eps=1e-5, **options)
    saved = result.residuals["mean"], result.residuals["var"]
    call = (g, x, None, None, None, *saved)
    return result.out, kernel.vjp(*call, axis=axis, eps=1e-5, groups=1, needs=needs)


@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16, "float64"])
@pytest.mark.parametrize("shape", [(40, 3), (6, 3, 5), (8, 3, 2, 8)])
def test_a_constant_channel_is_exactly_beta(dtype, shape):
    x, _ = batch(shape, dtype)
    x[:, 1] = np.float64(1 / 3).astype(dtype) * np.asarray(1e4, dtype)
    bias = np.array([0.1, 0.2, 0.3], np.float32)
    result = kernel.forward(x, None, bias, axis=(1,), eps=1e-5)
    assert (result.out[:, 1] == bias[1].astype(dtype)).all()
    assert result.residuals["var"].ravel()[1] == 0
    assert result.residuals["mean"].ravel()[1] == np.float64(x[0, 1].flat[0])


@pytest.mark.parametrize("power", [-100, -126, 100, 120])
def test_deviations_at_the_ends_of_float32_lose_no_digits(power):
    x, g = batch((64, 3))
    far, eps = np.ldexp(x, power), float(np.ldexp(1e-5, 2 * power))
    near = kernel.forward(x, axis=(1,), eps=1e-5)
    result = kernel.forward(far, axis=(1,), eps=eps)
    np.testing.assert_allclose(result.out, near.out, rtol=0, atol=2e-6)
    saved = result.residuals["mean"], result.residuals["var"]
    g = np.ldexp(g, power)  # so that the gradient is an ordinary number
    call = (g, far, None, None, None, *saved)
    gx, *_ = kernel.vjp(*call, axis=(1,), eps=eps, groups=1, needs=(True, False, False))
    want = gradients(x, np.ldexp(g, -power))[1][0]
    np.testing.assert_allclose(gx, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_an_outlier_in_the_place_of_the_shift_costs_no_digits():
    x, _ = batch((4000, 2))
    x[0] = 1e6
    result = kernel.forward(x, axis=(1,), eps=1e-5)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(result.residuals["var"][0], wide.var(axis=0), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4)])
def test_nan_stays_in_its_channel_and_fills_it(bad, shape):
    x, g = batch(shape)
    x[2, 1] = bad
    y, (gx, gweight, _) = gradients(x, g)
    for result in (y, gx):
        assert np.isnan(result[:, 1]).all() and np.isfinite(result[:, ::2]).all()
    assert np.isnan(gweight[1]) and np.isfinite(gweight[::2]).all()


def test_inputs_are_not_written_and_what_is_not_needed_is_left_out():
    x, g = batch((8, 3, 5))
    kept = x.copy(), g.copy()
    _, grads = gradients(x, g, needs=(False, True, False))
    assert grads[0] is None and grads[2] is None and grads[1].shape == (3,)
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(g, kept[1])


def test_an_array_with_gaps_is_served():
    x, g = batch((8, 6, 6))
    gaps = gradients(x[:, ::2, ::3], g[:, ::2, ::3])
    whole = gradients(x[:, ::2, ::3].copy(), g[:, ::2, ::3].copy())
    np.testing.assert_array_equal(gaps[0], whole[0])
    np.testing.assert_array_equal(gaps[1][0], whole[1][0])


def test_statistics_of_any_dtype_are_read_as_what_they_are():
    x, g = batch((12, 4, 8))
    saved = kernel.forward(x, axis=(1,), eps=1e-5).residuals
    options = {"axis": (1,), "eps": 1e-5, "groups": 1, "needs": (True, True, True)}
    want, got = (
        kernel.vjp(
            g, x, None, None, None, *(saved[k].astype(dtype) for k in ("mean", "var")), **options
        )
        for dtype in ("float64", "float32")
    )
    for a, b in zip(got, want, strict=True):
        close(a, b, 10)


def test_what_the_kernels_do_not_serve_is_declined():
    x, g = batch((4, 3, 2, 5))
    for array, axis in ((x, (0, 2)), (x[:0], (1,)), (x.astype(np.longdouble), (1,))):
        assert kernel.forward(array, axis=axis, eps=1e-5) is NotImplemented
    outer = x.transpose(1, 0, 2, 3)  # the groups' axis is not the outermost in memory
    assert kernel.forward(outer, axis=(2,), eps=1e-5, groups=3) is NotImplemented
    one = np.ones(3)
    call = (g.astype(np.float64), x, None, None, None, one, one)
    options = {"axis": (1,), "eps": 1e-5, "groups": 1, "needs": (True, False, False)}
    assert kernel.vjp(*call, **options) is NotImplemented
