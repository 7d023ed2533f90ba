"""The compiled kernels of batch norm against the formula, and the generic form."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.ops.batch_norm_cases import Case, cases, reference
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import (
    channels,
    numba_batch_norm,
    numba_batch_norm_given,
    numba_batch_norm_relu,
    numba_masked_batch_norm,
    threads,
)
from tinygrad_bn.ops.batch_norm import batch_norm, batch_norm_given

pytest.importorskip("numba")

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
#: What an error may be, as a share of its scale: roundings in the dtype, and few of them.
BOUND = {np.float32: 1e-5, np.float64: 1e-12}


@pytest.fixture(autouse=True, scope="module")
def tiny_shares():
    """Serve small arrays, on several threads, with runs, spread rows and tails among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "SMALLEST", 0)
        patch.setattr(channels, "SMALLEST_SHARE", 1)
        patch.setattr(channels, "SHORTEST_RUN", 3)
        patch.setattr(channels, "SHORTEST_ROW", 12)
        patch.setattr(threads, "_count", 3)
        yield patch


def run(x, g, case, groups=1, relu=False, needs=(1, 1, 1, 0)):
    """Return what forward and vjp give, as keyword arguments of `Answer.errors`, and residuals."""
    options = {"axis": case.axis, "eps": case.eps, "groups": groups, "relu": relu}
    result = numba_batch_norm.forward(x, case.weight, case.bias, **options)
    saved = result.residuals
    grads = numba_batch_norm.vjp(
        g, x, case.weight, case.bias, saved["mean"], saved["var"], needs=needs, **options
    )
    names = ("gx", "gweight", "gbias")
    return {"y": result.out, **dict(zip(names, grads, strict=False))}, saved


@DTYPES
@given(data=st.data(), order=st.permutations(range(5)))
def test_kernel_matches_the_formula_for_any_axes_and_order_in_memory(dtype, data, order):
    case = data.draw(cases(dtype=dtype, max_offset=1e3 if dtype == np.float32 else 10.0))
    order = [i for i in order if i < case.x.ndim]
    x = np.ascontiguousarray(case.x.transpose(order)).transpose(np.argsort(order))
    found, _ = run(x, case.g, case)
    assert max(reference(case).errors(**found).values()) < BOUND[dtype]
    assert found["y"].dtype == found["gx"].dtype == dtype
    assert found["gweight"].shape == tuple(case.x.shape[i] for i in case.axis)


@pytest.mark.parametrize("layout", ["strided", "reversed", "read-only", "broadcast g"])
@given(case=cases(dtype=np.float32))
def test_arrays_that_are_not_dense_are_served_too(layout, case):
    x, g = case.x, case.g
    if layout == "strided":
        x, g = (np.repeat(a, 2, axis=-1)[..., ::2] for a in (x, g))
    elif layout == "reversed":
        x, g = (a[::-1].copy()[::-1] for a in (x, g))
    elif layout == "read-only":
        x.flags.writeable = g.flags.writeable = False
    else:
        g = np.broadcast_to(g[:1], g.shape)
        case.g = np.array(g)
    kept = x.copy(), g.copy()
    found, _ = run(x, g, case)
    # A cotangent that is the same along an axis may lie along it: the scale of gx is still |g|.
    assert max(reference(case).errors(**found).values()) < 1e-5
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(g, kept[1])


@DTYPES
@given(data=st.data())
def test_residuals_are_those_of_the_generic_form(dtype, data):
    case = data.draw(cases(dtype=dtype, max_offset=10.0))
    with use_kernels("generic"):
        _, expected = batch_norm.call_with_residuals(case.x, axis=case.axis, eps=case.eps)
    _, found = run(case.x, case.g, case)
    assert found["count"] == expected["count"]
    for name in ("mean", "var"):
        assert found[name].shape == expected[name].shape
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-300)


@given(case=cases(dtype=np.float32, max_offset=1e3), groups=st.sampled_from([2, 3]))
def test_groups_are_batches_of_their_own(case, groups):
    assume(0 not in case.axis)
    x, g = (np.concatenate([a, a[::-1] * 2, a + 1][:groups]) for a in (case.x, case.g))
    found, saved = run(x, g, case, groups)
    with use_kernels("generic"):
        _, expected = batch_norm.call_with_residuals(x, axis=case.axis, eps=case.eps, groups=groups)
    assert saved["mean"].shape == expected["mean"].shape and saved["count"] == expected["count"]
    sums, n = np.zeros((2, *found["gbias"].shape)), len(case.x)
    for i in range(groups):
        part = slice(i * n, (i + 1) * n)
        right = reference(Case(x[part], case.weight, case.bias, g[part], case.axis, case.eps))
        errors = right.errors(y=found["y"][part], gx=found["gx"][part])
        assert max(errors.values()) < 1e-5
        sums += right.gweight, right.gbias
    scale = np.abs(g).sum(axis=case.reduced) * np.sqrt(n * groups)
    assert (np.abs([found["gweight"], found["gbias"]] - sums) <= 1e-5 * scale).all()


@pytest.mark.parametrize("mask", [None, np.ones((6, 1, 1))])
def test_statistics_of_the_generic_form_are_taken_in_any_order_in_memory(mask):
    """As when forward declined, and x lies in memory batch last."""
    x, g = np.random.default_rng(0).standard_normal((2, 6, 4, 5)).astype(np.float32)
    mean, var = np.random.default_rng(1).uniform(1, 2, (2, 3, 1, 4, 1))
    vjp = numba_masked_batch_norm.vjp
    options = {"axis": (1,), "eps": 1e-5, "groups": 3, "needs": (1, 1, 1, 0)}
    expected = vjp(g, x, None, None, mask, mean, var, **options)
    turned = np.asfortranarray(mean), np.asfortranarray(var)
    for a, b in zip(vjp(g, x, None, None, mask, *turned, **options), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@DTYPES
@given(data=st.data())
def test_relu_is_that_of_the_output(dtype, data):
    case = data.draw(cases(dtype=dtype))
    plain, _ = run(case.x, case.g, case)
    found, _ = run(case.x, case.g, case, relu=True)
    np.testing.assert_array_equal(found["y"], np.maximum(plain["y"], 0))
    expected, _ = run(case.x, np.where(plain["y"] > 0, case.g, 0).astype(dtype), case)
    for name in ("gx", "gweight", "gbias"):
        # The same sums of the same numbers.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@given(data=st.data(), order=st.permutations(range(5)))
def test_half_precision_is_float32_work_rounded_once(dtype, data, order):
    case = data.draw(cases(dtype=np.float32, max_offset=10.0))
    order = [i for i in order if i < case.x.ndim]
    x, g = (
        np.ascontiguousarray(a.astype(dtype).transpose(order)).transpose(np.argsort(order))
        for a in (case.x, case.g)
    )
    case.x, case.g = x.astype(np.float32), g.astype(np.float32)
    found, saved = run(x, g, case)
    expected, kept = run(case.x, case.g, case)
    for name in ("y", "gx"):
        assert found[name].dtype == dtype
        # The same operations; but compilers may join a product and a sum in one loop and not in
        # the other, and then the last bits of float32 differ.
        wide = expected[name]
        slack = 1e-6 * (np.abs(wide) + np.abs(wide).max())
        low, high = (wide - slack).astype(dtype), (wide + slack).astype(dtype)
        assert ((low <= found[name]) & (found[name] <= high)).all()
    for name in ("gweight", "gbias"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("mean", "var"):
        np.testing.assert_array_equal(saved[name], kept[name])


def test_half_precision_overflows_to_infinity():
    x, g = np.random.default_rng(0).standard_normal((2, 64, 3)).astype(np.float16)
    case = Case(x, np.float32([1e6, 1, 1]), None, g, (1,), 1e-5)
    found, _ = run(x, case.g, case)
    assert np.isinf(found["y"][:, 0]).any() and np.isfinite(found["y"][:, 1:]).all()
    assert np.isinf(found["gx"][:, 0]).any() and np.isfinite(found["gx"][:, 1:]).all()


def test_a_relu_after_half_precision_is_left_to_the_rounded_output():
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float16)
    options = {"axis": (1,), "eps": 1e-5}
    assert numba_batch_norm_relu.forward(x, **options) is NotImplemented
    assert numba_batch_norm_relu.forward(x.astype(np.float32), **options) is not NotImplemented


def test_relu_keeps_nan_in_its_place():
    x = np.array([[1, np.nan], [-1, 1]], np.float32)
    vectors = np.array([[0, 0], [1, 1], [0, 0]], np.float32)
    y = np.empty(4, np.float32)
    for C, S in ((2, 1), (1, 2)):
        numba_batch_norm.normalize.of(x.dtype, x.dtype)(x.reshape(-1), vectors, C, S, True, y)
        np.testing.assert_array_equal(y, [1, np.nan, 0, 1])


@given(case=cases(dtype=np.float32))
def test_evaluation_kernel_matches_the_generic_form(case):
    shape = tuple(case.x.shape[i] for i in case.axis)
    rng = np.random.default_rng(1)
    mean, var = rng.standard_normal(shape), rng.uniform(0.1, 4, shape)
    arguments = (case.x, mean.astype(np.float32), var, case.weight, case.bias)
    with use_kernels("generic"):
        expected = batch_norm_given(*arguments, axis=case.axis, eps=case.eps)
    got = numba_batch_norm_given.forward(*arguments, axis=case.axis, eps=case.eps)
    gamma = 1 if case.weight is None else np.abs(case.weight)
    scale = gamma * (np.abs(case.x).max(axis=case.reduced) + np.abs(mean)) / np.sqrt(var + case.eps)
    assert (np.abs(got - expected) <= 1e-6 * case.along(scale + 1)).all()


def test_results_do_not_change_from_call_to_call():
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 64, 5, 7, 7)).astype(np.float32)
    case = Case(x, None, None, g, (1,), 1e-5)
    first, _ = run(x, g, case)
    for _ in range(20):
        again, _ = run(x, g, case)
        for name in first:
            np.testing.assert_array_equal(again[name], first[name])


def test_a_constant_channel_gives_beta_exactly():
    x = np.full((300, 3, 5), [[0.1], [1e7], [-3e-5]], np.float32)
    case = Case(x, np.float32([1, 2, 3]), np.float32([0.3, -2, 0]), x, (1,), 1e-5)
    found, saved = run(x, x, case)
    np.testing.assert_array_equal(found["y"], np.broadcast_to(case.bias[:, None], x.shape))
    np.testing.assert_array_equal(saved["var"], np.zeros((1, 3, 1)))
    np.testing.assert_array_equal(found["gweight"], np.zeros(3))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_a_mean_far_larger_than_the_spread_and_a_stray_first_value_cost_nothing(offset):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 3)) + offset).astype(np.float32)
    x[0] += 1000 * (offset == 0)
    case = Case(x, None, None, rng.standard_normal((4000, 3)).astype(np.float32), (1,), 1e-5)
    found, _ = run(x, case.g, case)
    assert max(reference(case).errors(**found).values()) < 1e-6


def test_only_what_is_needed_is_returned():
    x = np.random.default_rng(0).standard_normal((8, 3, 5)).astype(np.float32)
    case = Case(x, None, None, x, (1,), 1e-5)
    found, _ = run(x, x, case, needs=(0, 1, 0, 0))
    assert found["gx"] is None and found["gbias"] is None and found["gweight"].shape == (3,)


def test_what_float32_cannot_hold_is_declined():
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    forward = numba_batch_norm.forward
    options = {"axis": (1,), "eps": 1e-5}
    assert forward(x * np.float32(1e30), **options) is NotImplemented
    assert forward(x * np.float32(1e-30), axis=(1,), eps=1e-60) is NotImplemented
    assert forward(x, np.full(3, 1e300), **options) is NotImplemented
    x[3, 1] = np.nan
    assert forward(x, **options) is NotImplemented
    g = np.full_like(x, np.inf)
    grads = numba_batch_norm.vjp(
        g, g, None, None, np.zeros(3), np.ones(3), (1,), 1e-5, 1, (1, 1, 1, 0)
    )
    assert grads is NotImplemented


def test_dtypes_and_arrays_that_it_is_not_made_for_are_declined():
    x = np.ones((64, 3), np.float32)
    options = {"axis": (1,), "eps": 1e-5}
    assert numba_batch_norm.forward(x, **options) is not NotImplemented
    for dtype in (np.longdouble, ">f4", ">f2", np.int32):
        assert numba_batch_norm.forward(x.astype(dtype), **options) is NotImplemented
    shifted = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert numba_batch_norm.forward(shifted, **options) is NotImplemented
    by_sample = np.ones((3, 4, 64), np.float32).transpose(2, 0, 1)  # axis 0 is innermost
    assert numba_batch_norm.forward(by_sample, axis=(1,), eps=1e-5, groups=2) is NotImplemented


def test_small_tensors_are_left_to_numpy(tiny_shares):
    tiny_shares.undo()  # the last test of this module
    x = np.zeros((4, 3), np.float32)
    assert numba_batch_norm.forward(x, axis=(1,), eps=1e-5) is NotImplemented
