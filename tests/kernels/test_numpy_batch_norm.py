"""The NumPy kernels of batch norm against the generic form, which is the definition."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.ops.batch_norm_cases import Case, cases, reference
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import channel_blocks, numpy_batch_norm, numpy_batch_norm_given
from tinygrad_bn.ops.batch_norm import batch_norm, batch_norm_given

(rule,) = (r.function for r in batch_norm.rules)


@pytest.fixture(autouse=True, scope="module")
def tiny_blocks():
    """Make every case span several blocks, column ranges and a tail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_batch_norm, "SMALLEST", 0)
        patch.setattr(channel_blocks, "BLOCK", 16)
        patch.setattr(channel_blocks, "SHORTEST_ROW", 4)
        patch.setattr(channel_blocks, "WIDEST", 8)
        yield patch


@given(case=cases(dtype=np.float32, max_offset=1e3), order=st.permutations(range(5)))
def test_kernel_matches_the_formula_for_any_axes_and_order_in_memory(case, order):
    order = [i for i in order if i < case.x.ndim]
    inverse = np.argsort(order)
    x = np.ascontiguousarray(case.x.transpose(order)).transpose(inverse)
    result = numpy_batch_norm.forward(x, case.weight, case.bias, axis=case.axis, eps=case.eps)
    if result is NotImplemented:
        # Only for channel axes that lie apart or in another order (or whose size 1 hides where).
        assert not _together(order, case.axis) or 1 in case.x.shape
        return
    saved = result.residuals
    gx, gweight, gbias, _ = numpy_batch_norm.vjp(
        case.g,
        x,
        case.weight,
        case.bias,
        saved["mean"],
        saved["var"],
        case.axis,
        case.eps,
        1,
        (1, 1, 1),
    )
    found = reference(case).errors(y=result.out, gx=gx, gweight=gweight, gbias=gbias)
    assert max(found.values()) < 1e-5
    assert result.out.dtype == gx.dtype == np.float32
    assert gweight.shape == gbias.shape == tuple(case.x.shape[i] for i in case.axis)


def _together(order, axis):
    first = order.index(axis[0])
    return tuple(order[first : first + len(axis)]) == axis


@given(case=cases(dtype=np.float64, max_offset=10.0))
def test_kernel_residuals_are_those_of_the_generic_form(case):
    assume(_together(list(range(case.x.ndim)), case.axis))
    with use_kernels("generic"):
        _, expected = batch_norm.call_with_residuals(case.x, axis=case.axis, eps=case.eps)
    result = numpy_batch_norm.forward(case.x, axis=case.axis, eps=case.eps)
    for name in ("mean", "var"):
        assert result.residuals[name].shape == expected[name].shape
        assert result.residuals[name].dtype == np.float64
        np.testing.assert_allclose(result.residuals[name], expected[name], rtol=1e-12, atol=1e-300)


@given(case=cases(dtype=np.float32))
def test_evaluation_kernel_matches_the_generic_form(case):
    assume(_together(list(range(case.x.ndim)), case.axis))
    channels = tuple(case.x.shape[i] for i in case.axis)
    rng = np.random.default_rng(1)
    mean, var = rng.standard_normal(channels), rng.uniform(0.1, 4, channels)
    arguments = (case.x, mean.astype(np.float32), var, case.weight, case.bias)
    with use_kernels("generic"):
        expected = batch_norm_given(*arguments, axis=case.axis, eps=case.eps)
    got = numpy_batch_norm_given.forward(*arguments, axis=case.axis, eps=case.eps)
    gamma = 1 if case.weight is None else np.abs(case.weight)
    scale = gamma * (np.abs(case.x).max(axis=case.reduced) + np.abs(mean)) / np.sqrt(var + case.eps)
    assert (np.abs(got - expected) <= 1e-6 * case.along(scale + 1)).all()


@given(case=cases(dtype=np.float32, max_offset=100.0), given_offset=st.floats(-100, 100))
def test_evaluation_gradients_match_the_generic_form(case, given_offset):
    assume(_together(list(range(case.x.ndim)), case.axis))
    channels = tuple(case.x.shape[i] for i in case.axis)
    rng = np.random.default_rng(1)
    weight = np.ones(channels, np.float32) if case.weight is None else case.weight
    mean, var = rng.standard_normal(channels) + given_offset, rng.uniform(0.1, 4, channels)
    arguments = (case.g, case.x, mean.astype(np.float32), var.astype(np.float32), weight, None)
    got = numpy_batch_norm_given.vjp(*arguments, case.axis, case.eps, (True,) * 5)
    (generic,) = batch_norm_given.rules
    expected = generic.function(*arguments, case.axis, case.eps, (True,) * 5)
    s = 1 / np.sqrt(var.astype(np.float32) + case.eps)
    deviation = np.abs(case.x - case.along(mean.astype(np.float32)))
    g_sum = np.abs(case.g).sum(axis=case.reduced)
    gd_sum = (np.abs(case.g) * deviation).sum(axis=case.reduced)
    scales = (
        case.along(np.abs(weight) * s) * np.abs(case.g),
        np.abs(weight) * s * g_sum,
        np.abs(weight) * s**3 * gd_sum,
        s * gd_sum,
        g_sum,
    )
    for a, b, scale in zip(got, expected, scales, strict=True):
        assert a.shape == b.shape and (np.abs(a - b) <= 1e-6 * scale + 1e-30).all()
    assert (
        numpy_batch_norm_given.vjp(
            *arguments, case.axis, case.eps, (True, False, False, False, False)
        )[1:]
        == (None,) * 4
    )


@given(case=cases(dtype=np.float32, max_offset=1e3), groups=st.sampled_from([1, 2, 3]))
def test_groups_are_batches_of_their_own(case, groups):
    assume(0 not in case.axis and _together(list(range(case.x.ndim)), case.axis))
    x, g = (np.concatenate([a, a[::-1] * 2, a + 1][:groups]) for a in (case.x, case.g))
    got = numpy_batch_norm.forward(
        x, case.weight, case.bias, axis=case.axis, eps=case.eps, groups=groups
    )
    saved = got.residuals
    arguments = (case.axis, case.eps, groups, (1, 1, 1))
    grads = numpy_batch_norm.vjp(
        g, x, case.weight, case.bias, saved["mean"], saved["var"], *arguments
    )
    with use_kernels("generic"):
        _, expected = batch_norm.call_with_residuals(x, axis=case.axis, eps=case.eps, groups=groups)
    assert saved["mean"].shape == expected["mean"].shape and saved["count"] == expected["count"]
    sums = np.zeros((2, *grads[1].shape))
    n = len(case.x)
    for i in range(groups):
        part = slice(i * n, (i + 1) * n)
        one = Case(x[part], case.weight, case.bias, g[part], case.axis, case.eps)
        right = reference(one)
        found = right.errors(y=got.out[part], gx=grads[0][part])
        assert max(found.values()) < 1e-5
        sums += right.gweight, right.gbias
    scale = np.abs(g).sum(axis=case.reduced) * np.sqrt(n * groups)
    assert (np.abs(grads[1:3] - sums) <= 1e-5 * scale).all()


def test_a_stray_first_value_does_not_spoil_the_variance():
    # The shift is then far from the data, and sums of squares about it cancel.
    x = np.random.default_rng(0).standard_normal((100_000, 2)).astype(np.float32)
    x[0] = 1e5
    blocks = numpy_batch_norm.blocks_for(x, (1,))
    mean, var = numpy_batch_norm._statistics(blocks, blocks.lay(x))
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(var, x.var(axis=0, dtype=np.float64), rtol=1e-5)


def test_inputs_are_not_written_and_gx_is_left_out_when_not_needed():
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 8, 3, 5)).astype(np.float32)
    kept = x.copy(), g.copy()
    saved = numpy_batch_norm.forward(x, axis=(1,), eps=1e-5).residuals
    grads = numpy_batch_norm.vjp(
        g, x, None, None, saved["mean"], saved["var"], (1,), 1e-5, 1, (False, True, False)
    )
    assert grads[0] is None and grads[2] is None and grads[1].shape == (3,)
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(g, kept[1])


def test_what_float32_cannot_hold_is_declined():
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    forward = numpy_batch_norm.forward
    assert forward(x * np.float32(1e30), axis=(1,), eps=1e-5) is NotImplemented
    assert forward(x * np.float32(1e-30), axis=(1,), eps=1e-60) is NotImplemented
    assert forward(x[:, ::2], axis=(1,), eps=1e-5) is NotImplemented  # not contiguous
    assert forward(x.astype(np.longdouble), axis=(1,), eps=1e-5) is NotImplemented


def test_small_tensors_are_left_to_the_generic_form(tiny_blocks):
    tiny_blocks.undo()  # the last test of this module
    x = np.zeros((4, 3), np.float32)
    assert numpy_batch_norm.forward(x, axis=(1,), eps=1e-5) is NotImplemented
