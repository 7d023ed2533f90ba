"""The CPU kernels of batch norm with a mask, against the formula in longdouble."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.ops.batch_norm_cases import Case, cases
from tinygrad_bn.backend import kernels
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import (
    channel_blocks,
    channels,
    numba_masked_batch_norm,
    numpy_batch_norm,
    numpy_masked_batch_norm,
    threads,
)
from tinygrad_bn.ops.batch_norm import batch_norm
from tinygrad_bn.testing.batch_norm_reference import expected
from tinygrad_bn.testing.hard_cases import least_rounding

#: What an error may be, as a share of its scale: roundings in the dtype, and few of them.
BOUND = {
    ml_dtypes.bfloat16: 2 * 2.0**-7,
    np.float16: 2 * 2.0**-10,
    np.float32: 1e-5,
    np.float64: 1e-12,
}

#: A (group of a) mask: in how many of its places it has one value for all, and what the values are.
MASKS = {
    "booleans": lambda rng, shape: rng.random(shape) < 0.6,
    "frequencies": lambda rng, shape: rng.integers(0, 4, shape),
    "fractions": lambda rng, shape: rng.integers(0, 2, shape) * rng.random(shape),
    "all": lambda rng, shape: np.ones(shape, np.float32),
    "one": lambda rng, shape: np.arange(np.prod(shape)).reshape(shape) == 0,
    "none": lambda rng, shape: np.zeros(shape),
}


@pytest.fixture(scope="module", params=["numpy", "numba"])
def kernel(request):
    """Return the module; small arrays are served too, in blocks and shares to match."""
    reason = kernels.unusable_because(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_batch_norm, "SMALLEST", 0)
        patch.setattr(channel_blocks, "BLOCK", 16)
        patch.setattr(channel_blocks, "SHORTEST_ROW", 4)
        patch.setattr(channel_blocks, "WIDEST", 8)
        patch.setattr(channels, "SMALLEST", 0)
        patch.setattr(channels, "SMALLEST_SHARE", 1)
        patch.setattr(threads, "_count", 3)
        modules = {"numpy": numpy_masked_batch_norm, "numba": numba_masked_batch_norm}
        yield modules[request.param]


@st.composite
def masks(draw, case, groups=1):
    """Draw a mask for a case; each group's has a kind of its own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="mask"))
    shape = [1 if i in case.axis else n for i, n in enumerate(case.x.shape)]
    shape = [n if draw(st.booleans(), label="full") else 1 for n in shape]
    if groups > 1:
        shape[0] = len(case.x) // groups
    kinds = [draw(st.sampled_from(list(MASKS)), label="kind") for _ in range(groups)]
    return np.concatenate([np.asarray(MASKS[kind](rng, shape), np.float64) for kind in kinds])


def run(kernel, case, mask, groups=1, x=None, g=None, needs=(1, 1, 1, 0)):
    """Return y and the gradients by name, and the residuals; x, g: other arrays of the same."""
    x, g = case.x if x is None else x, case.g if g is None else g
    options = {"axis": case.axis, "eps": case.eps, "groups": groups}
    result = kernel.forward(x, case.weight, case.bias, mask, **options)
    if result is NotImplemented:
        return NotImplemented, None
    saved = result.residuals
    grads = kernel.vjp(
        g, x, case.weight, case.bias, mask, saved["mean"], saved["var"], needs=needs, **options
    )
    return dict(zip(("y", "gx", "gweight", "gbias"), (result.out, *grads), strict=False)), saved


def errors(found, case, mask, groups=1):
    """Return the largest error of each result as a share of its scale."""
    order = (*case.reduced, *case.axis)
    C = int(np.prod([case.x.shape[i] for i in case.axis]))

    def flat(a):
        return np.broadcast_to(a, case.x.shape).transpose(order).reshape(groups, -1, C)

    weight, bias = (v if v is None else v.reshape(-1) for v in (case.weight, case.bias))
    want = [
        expected(x, weight, bias, g, eps=case.eps, axis=1, frequency=often[:, :1])
        for x, g, often in zip(flat(case.x), flat(case.g), flat(mask), strict=True)
    ]
    result = {}
    for name in ("y", "gx"):
        got = flat(found[name]).astype(np.longdouble)
        pairs = zip(got, want, strict=True)
        least = least_rounding(found[name].dtype)
        # What does not count has an error of 0, and where nothing does the scale is 0 as well.
        result[name] = max(
            (
                np.maximum(np.abs(a - getattr(w, name)) - least, 0)
                / np.maximum(w.scales[name], 1e-30)
            ).max()
            for a, w in pairs
        )
    for name in ("gweight", "gbias"):
        error = np.abs(found[name].reshape(-1) - sum(getattr(w, name) for w in want))
        scale = np.maximum(sum(w.scales[name] for w in want), 1e-30)
        result[name] = (error / scale).max()
    return result


def together(case, order=None):
    """Return whether the NumPy kernel serves these channel axes: they lie together in memory."""
    order = list(range(case.x.ndim)) if order is None else order
    first = order.index(case.axis[0])
    return tuple(order[first : first + len(case.axis)]) == case.axis


def off(case, mask):
    return ~np.broadcast_to(mask > 0, case.x.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data(), order=st.permutations(range(5)))
def test_kernel_matches_the_formula_for_any_axes_and_order_in_memory(kernel, dtype, data, order):
    case = data.draw(cases(dtype=dtype, max_offset=1e3 if dtype == np.float32 else 10.0))
    mask = data.draw(masks(case))
    order = [i for i in order if i < case.x.ndim]
    x = np.ascontiguousarray(case.x.transpose(order)).transpose(np.argsort(order))
    found, _ = run(kernel, case, mask, x=x)
    if found is NotImplemented:
        assert kernel is numpy_masked_batch_norm
        assert not together(case, order) or 1 in case.x.shape
        return
    assert max(errors(found, case, mask).values()) < BOUND[dtype]
    assert found["y"].dtype == found["gx"].dtype == dtype
    assert found["gweight"].shape == found["gbias"].shape == tuple(x.shape[i] for i in case.axis)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@given(data=st.data())
def test_half_precision_is_computed_in_float32(kernel, dtype, data):
    case = data.draw(cases(dtype=np.float32))
    assume(together(case))
    case.x, case.g = case.x.astype(dtype), case.g.astype(dtype)
    mask = data.draw(masks(case))
    found, _ = run(kernel, case, mask)
    found_errors = errors(found, case, mask)
    assert max(found_errors["y"], found_errors["gx"]) <= BOUND[dtype]
    # The parameters' gradients are not rounded to half precision.
    assert max(found_errors["gweight"], found_errors["gbias"]) < 1e-5
    assert found["y"].dtype == found["gx"].dtype == dtype


@pytest.mark.parametrize("groups", [2, 3])
@given(data=st.data())
def test_groups_are_batches_of_their_own(kernel, groups, data):
    case = data.draw(cases(dtype=np.float32, max_offset=1e3))
    assume(0 not in case.axis and together(case))
    case.x, case.g = (np.concatenate([a, a[::-1] * 2, a + 1][:groups]) for a in (case.x, case.g))
    mask = data.draw(masks(case, groups))
    found, _ = run(kernel, case, mask, groups)
    assert max(errors(found, case, mask, groups).values()) < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_mask_may_be_the_same_for_all_samples_or_lie_in_another_order(kernel, groups):
    x, g = np.random.default_rng(0).standard_normal((2, 4, 3, 5, 2)).astype(np.float32)
    case = Case(x, None, None, g, (1,), 1e-5)
    for shape in ((1, 1, 5, 1), (1, 1, 5, 2), (4, 1, 5, 1), (4, 1, 1, 2), (4, 1, 5, 2)):
        mask = np.random.default_rng(1).integers(0, 4, shape)
        want, _ = run(kernel, case, np.broadcast_to(mask, (4, 1, 5, 2)).copy(), groups)
        for given_mask in (mask, np.asfortranarray(mask), mask[::-1].copy()[::-1]):
            found, _ = run(kernel, case, given_mask, groups)
            for name in want:
                np.testing.assert_array_equal(found[name], want[name])


@pytest.mark.parametrize("groups", [1, 2])
@given(data=st.data())
def test_residuals_are_those_of_the_generic_form(kernel, groups, data):
    case = data.draw(cases(dtype=np.float64, max_offset=10.0))
    assume(groups == 1 or 0 not in case.axis)
    assume(together(case))
    case.x = np.concatenate([case.x] * groups)
    case.g = np.concatenate([case.g] * groups)
    mask = data.draw(masks(case, groups))
    options = {"axis": case.axis, "eps": case.eps, "groups": groups}
    with use_kernels("generic"):
        _, want = batch_norm.call_with_residuals(case.x, None, None, mask, **options)
    _, found = run(kernel, case, mask, groups)
    for name in ("mean", "var", "count"):
        assert found[name].shape == want[name].shape and found[name].dtype == np.float64
        # A mean near 0 is the sum of larger terms.
        np.testing.assert_allclose(found[name], want[name], rtol=1e-10, atol=1e-11)


@given(data=st.data(), filling=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_what_does_not_count_is_not_looked_at(kernel, data, filling):
    case = data.draw(cases(dtype=np.float32))
    assume(together(case))
    mask = data.draw(masks(case))
    nowhere = off(case, mask)
    found, saved = run(kernel, case, mask)
    filled, other = run(kernel, case, mask, x=np.where(nowhere, np.float32(filling), case.x))
    for name in ("y", "gx", "gweight", "gbias"):
        np.testing.assert_array_equal(found[name], filled[name])
    for name in ("mean", "var", "count"):
        np.testing.assert_array_equal(saved[name], other[name])
    bias = 0 if case.bias is None else case.along(case.bias)
    assert (found["y"] == bias)[nowhere].all() and (found["gx"][nowhere] == 0).all()
    # A cotangent that falls on it goes to β alone.
    g = np.where(nowhere, np.float32(filling), case.g)
    with np.errstate(over="ignore", invalid="ignore"):
        filled, _ = run(kernel, case, mask, g=g)
        sums = g.sum(axis=case.reduced, dtype=np.float64)
    np.testing.assert_array_equal(found["gx"], filled["gx"])
    np.testing.assert_array_equal(found["gweight"], filled["gweight"])
    np.testing.assert_allclose(filled["gbias"], sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["strided", "read-only", "broadcast mask"])
@given(data=st.data())
def test_arrays_of_any_layout_are_served_and_not_written(kernel, layout, data):
    case = data.draw(cases(dtype=np.float32))
    assume(together(case))
    mask, x, g = data.draw(masks(case)), case.x, case.g
    if layout == "strided":
        x, g = (np.repeat(a, 2, axis=-1)[..., ::2] for a in (x, g))
    elif layout == "read-only":
        for array in (x, g, mask):
            array.flags.writeable = False
    else:
        mask = np.broadcast_to(mask, [1 if i in case.axis else n for i, n in enumerate(x.shape)])
    before = x.copy(), g.copy(), mask.copy()
    found, _ = run(kernel, case, mask, x=x, g=g)
    if found is NotImplemented:
        assert layout == "strided" and kernel is numpy_masked_batch_norm
        return
    assert max(errors(found, case, mask).values()) < 1e-5
    for array, kept in zip((x, g, mask), before, strict=True):
        np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.float16, np.float32, np.longdouble])
def test_a_mask_of_any_dtype_says_the_same(kernel, dtype):
    x = np.random.default_rng(0).standard_normal((8, 3, 5)).astype(np.float32)
    case = Case(x, None, None, x[::-1].copy(), (1,), 1e-5)
    mask = np.random.default_rng(1).integers(0, 2, (8, 1, 5))
    want, _ = run(kernel, case, mask.astype(np.float64))
    found, _ = run(kernel, case, mask.astype(dtype))
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("stray", [0, 1e-3])
def test_a_mean_far_larger_than_the_spread_and_a_stray_value_cost_nothing(kernel, offset, stray):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 3)) + offset).astype(np.float32)
    mask = rng.integers(1, 4, (4000, 1)).astype(np.float64)
    x[0] += 1000 * (offset == 0)  # the first, and the one with the largest share
    x[7] += 1000 * (offset == 0)
    mask[0], mask[7] = stray, 5
    case = Case(x, None, None, rng.standard_normal((4000, 3)).astype(np.float32), (1,), 1e-5)
    found, _ = run(kernel, case, mask)
    assert max(errors(found, case, mask).values()) < 2e-6


def test_a_constant_channel_gives_beta_exactly(kernel):
    x = np.full((300, 3, 5), [[0.1], [1e7], [-3e-5]], np.float32)
    mask = np.random.default_rng(0).random((300, 1, 5))
    mask[::3] = 0
    x[::3] = 5
    case = Case(x, np.float32([1, 2, 3]), np.float32([0.3, -2, 0]), x, (1,), 1e-5)
    found, saved = run(kernel, case, mask)
    np.testing.assert_array_equal(found["y"], np.broadcast_to(case.bias[:, None], x.shape))
    np.testing.assert_array_equal(saved["var"], np.zeros((1, 3, 1)))
    np.testing.assert_array_equal(found["gweight"], np.zeros(3))


def test_only_what_is_needed_is_returned(kernel):
    x = np.random.default_rng(0).standard_normal((8, 3, 5)).astype(np.float32)
    case, mask = Case(x, None, None, x, (1,), 1e-5), np.ones((8, 1, 1))
    found, _ = run(kernel, case, mask, needs=(0, 1, 0, 0))
    assert found["gx"] is None and found["gbias"] is None and found["gweight"].shape == (3,)


def test_what_float32_cannot_hold_is_declined(kernel):
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    mask, options = np.ones((64, 1)), {"axis": (1,), "eps": 1e-5}
    forward = kernel.forward
    assert forward(x, None, None, mask, **options) is not NotImplemented
    for frequency in (np.inf, 5e-324):
        mask[3] = frequency
        assert forward(x, None, None, mask, **options) is NotImplemented
    mask[3] = 0
    assert forward(x * np.float32(1e30), None, None, mask, **options) is NotImplemented
    tiny = x * np.float32(1e-30)
    assert forward(tiny, None, None, mask, axis=(1,), eps=1e-60) is NotImplemented
    assert forward(x, np.full(3, 1e300), None, mask, **options) is NotImplemented
    x[5, 1] = np.nan
    assert forward(x, None, None, mask, **options) is NotImplemented
    g = np.full_like(x, np.inf)
    zeros, ones, needs = np.zeros(3), np.ones(3), (1, 1, 1, 0)
    found = kernel.vjp(g, g, None, None, mask, zeros, ones, (1,), 1e-5, 1, needs)
    assert found is NotImplemented


def test_without_a_mask_the_other_kernel_serves(kernel):
    x = np.random.default_rng(0).standard_normal((8, 3, 5)).astype(np.float32)
    case = Case(x, None, None, x[::-1].copy(), (1,), 1e-5)
    found, saved = run(kernel, case, None)
    assert saved["count"] == 40
    assert max(errors(found, case, np.ones(1)).values()) < 1e-5


def test_small_tensors_are_left_to_the_generic_form(monkeypatch):
    for module in (numpy_batch_norm, channels):
        monkeypatch.setattr(module, "SMALLEST", 4096)
    x, mask = np.zeros((4, 3), np.float32), np.ones((4, 1))
    for module in (numpy_masked_batch_norm, numba_masked_batch_norm):
        assert module.forward(x, None, None, mask, axis=(1,), eps=1e-5) is NotImplemented
