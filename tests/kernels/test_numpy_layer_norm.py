"""The NumPy kernels of layer, group, instance and RMS norm against the generic form."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn.kernels.cpu import (
    channel_blocks,
    numpy_batch_norm,
    numpy_layer_norm,
    numpy_rms_norm,
    rows,
)
from tinygrad_bn.ops.normalization import layer_norm, rms_norm

#: Shape, kept axes and the axes of γ; `b` stands for a batch of any size.
PLACES = {
    "layer": ((5, 12), (0,), (1,)),
    "layer of (N, T, D)": ((3, 2, 9), (0, 1), (2,)),
    "layer of images": ((4, 3, 2, 3), (0,), (1, 2, 3)),
    "group": ((4, 3, 2, 5), (0, 1), (1, 2)),
    "instance": ((3, 4, 7), (0, 1), (1,)),
    "instance, channels last": ((3, 5, 2, 4), (0, 3), (3,)),
    "γ on the last axis of a sample": ((4, 2, 3, 5), (0,), (3,)),
    "γ on the first axis of a sample": ((4, 2, 3, 5), (0,), (1,)),
    "one row": ((1, 40), (0,), (1,)),
}


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    """Make every case span several blocks and pieces."""
    for module, name, value in (
        (rows, "SMALLEST", 0),
        (rows, "BLOCK", 24),
        (rows, "PIECE", 4),
        (numpy_batch_norm, "SMALLEST", 0),
        (channel_blocks, "BLOCK", 16),
    ):
        monkeypatch.setattr(module, name, value)


def draw(place, dtype, offset, spread=1.0, seed=0, vectors=(True, True)):
    shape, axis, channels = PLACES[place]
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * spread + offset).astype(dtype)
    sizes = [shape[i] for i in channels]
    weight, bias = (rng.standard_normal(sizes).astype(np.float32) if v else None for v in vectors)
    return x, weight, bias, rng.standard_normal(shape).astype(dtype), axis, channels


def check(op, kernel, x, vectors, g, axis, channels, eps, bound):
    """Compare output, residuals and gradients, errors measured against the largest entry.

    Of y and gx that is per row; they are sums of terms that may be as large as those of the row.
    """
    options = {"axis": axis, "channels": channels, "eps": eps}
    wide = x.astype(np.float64)
    right = op.forward(wide, *vectors, **options)
    got = kernel.forward(x, *vectors, **options)
    assert got is not NotImplemented and got.out.dtype == x.dtype
    close(got.out, right.out, axis, bound)
    for name, value in right.residuals.items():
        assert got.residuals[name].shape == value.shape
        assert got.residuals[name].dtype == np.float64
        # One rounding to float32 of the largest summand.
        atol = 1e-7 * np.abs(wide).max()
        np.testing.assert_allclose(got.residuals[name], value, rtol=1e-5, atol=atol)
    names = [*right.residuals]
    saved = [right.residuals[name] for name in names]
    needs = (True,) * (1 + len(vectors))
    (rule,) = (r.function for r in op.rules)
    weight = vectors[0]
    expected = rule(g.astype(np.float64), wide, weight, *saved, axis, channels, eps, needs)
    found = kernel.vjp(g, x, weight, *saved, axis, channels, eps, needs)
    assert found is not NotImplemented and found[0].dtype == x.dtype
    close(found[0], expected[0], axis, bound)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * (np.abs(b).max() + np.abs(g).max()))
    for i in range(len(needs)):
        alone = tuple(i == j for j in range(len(needs)))
        partial = kernel.vjp(g, x, weight, *saved, axis, channels, eps, alone)
        assert [v is not None for v in partial] == list(alone)
        np.testing.assert_array_equal(partial[i], found[i])


def close(got, right, axis, bound):
    reduced = tuple(i for i in range(got.ndim) if i not in axis)
    scale = np.abs(right).max(axis=reduced, keepdims=True)
    assert (np.abs(got.astype(np.float64) - right) <= bound * scale + 1e-30).all()


#: float32: some roundings; half precision: one rounding of its own, to within half a unit.
BOUNDS = {np.float32: 2e-6, np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7, np.float64: 1e-12}


@given(
    place=st.sampled_from([*PLACES]),
    dtype=st.sampled_from([*BOUNDS]),
    offset=st.sampled_from([0.0, 1.0, 50.0]),
    eps=st.sampled_from([1e-5, 1e-2]),
    seed=st.integers(0, 2**32 - 1),
    vectors=st.tuples(st.booleans(), st.booleans()),
)
def test_layer_norm_matches_the_generic_form(place, dtype, offset, eps, seed, vectors):
    x, weight, bias, g, axis, channels = draw(place, dtype, offset, 1.0, seed, vectors)
    check(layer_norm, numpy_layer_norm, x, (weight, bias), g, axis, channels, eps, BOUNDS[dtype])


@given(
    place=st.sampled_from([p for p in PLACES if "last" not in p or "γ" in p]),
    dtype=st.sampled_from([*BOUNDS]),
    offset=st.sampled_from([0.0, 50.0]),
    seed=st.integers(0, 2**32 - 1),
    weighted=st.booleans(),
)
def test_rms_norm_matches_the_generic_form(place, dtype, offset, seed, weighted):
    x, weight, _, g, axis, channels = draw(place, dtype, offset, 1.0, seed, (weighted, False))
    # With the mean left in, x̂ is nearly 1 and what is left of g after the projection is small:
    # the error is measured against what was projected, some ten times that.
    check(rms_norm, numpy_rms_norm, x, (weight,), g, axis, channels, 1e-5, 20 * BOUNDS[dtype])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_a_mean_far_larger_than_the_spread_costs_no_digits(place, offset):
    x, weight, bias, g, axis, channels = draw(place, np.float32, offset)
    check(layer_norm, numpy_layer_norm, x, (weight, bias), g, axis, channels, 1e-5, 1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("constant", [0.1, 1e4, 1e10])
def test_constant_rows_give_exactly_the_bias(place, constant):
    x, weight, bias, _, axis, channels = draw(place, np.float32, constant, spread=0.0)
    found = numpy_layer_norm.forward(x, weight, bias, axis=axis, channels=channels, eps=1e-5)
    along = tuple(n if i in channels else 1 for i, n in enumerate(x.shape))
    assert (found.out == np.broadcast_to(bias.reshape(along), x.shape)).all()
    assert (found.residuals["var"] == 0).all()


def test_a_long_row_is_summed_in_pieces(monkeypatch):
    monkeypatch.undo()
    x = np.full((2, 3_000_000), 0.1, np.float32)
    x[1] = np.random.default_rng(0).standard_normal(x.shape[1]) + 1e5
    mean = numpy_layer_norm.forward(x, axis=(0,), channels=(1,), eps=1e-5).residuals["mean"]
    assert mean[0, 0] == np.float32(0.1)
    assert abs(mean[1, 0] - math.fsum(x[1].tolist()) / x.shape[1]) < 1e-6


@pytest.mark.parametrize("width", [2, 7, 300])
def test_sums_over_many_short_rows_keep_their_digits(monkeypatch, width):
    monkeypatch.undo()
    rows = 2_000_000 // width
    x = np.random.default_rng(0).random((rows, width), dtype=np.float32)
    g = np.full_like(x, 1 / 3)  # of one sign: roundings of a running sum have one, too
    saved = numpy_layer_norm.forward(x, axis=(0,), channels=(1,), eps=1e-5).residuals
    weight, needs = np.ones(width, np.float32), (False, True, True)
    sums = numpy_layer_norm.vjp(
        g, x, weight, saved["mean"], saved["var"], (0,), (1,), 1e-5, needs
    )  # fmt: skip
    # 1e-6: the bound is 1e-5 of Σ|g|, and a sum of 2^17 terms in float32 was off by 2e-4.
    np.testing.assert_allclose(sums[2], rows * np.float64(g[0, 0]), rtol=1e-6)
    x_hat = (x - saved["mean"]) / np.sqrt(saved["var"] + 1e-5)
    scale = (g * np.abs(x_hat)).sum(axis=0)
    np.testing.assert_array_less(np.abs(sums[1] - (g * x_hat).sum(axis=0)), 1e-6 * scale)


@pytest.mark.parametrize(
    ("size_of_gamma", "size_of_g", "spread", "eps"),
    [(1e30, 1e10, 1e11, 1e-5), (1e30, 1e8, 1.0, 1e-5), (1e-25, 1e-18, 1e-11, 1e-24)],
)
def test_products_of_gamma_and_g_that_leave_float32_are_declined(
    size_of_gamma, size_of_g, spread, eps
):
    x, weight, bias, g, axis, channels = draw("layer", np.float32, 0.0, spread)
    weight, g = weight * np.float32(size_of_gamma), g * np.float32(size_of_g)
    needs = (True, False, False)
    for kernel, statistics, op in (
        (numpy_layer_norm, ("mean", "var"), layer_norm),
        (numpy_rms_norm, ("square",), rms_norm),
    ):
        vectors = (weight, bias)[: len(statistics)]
        saved = kernel.forward(x, *vectors, axis=axis, channels=channels, eps=eps).residuals
        rest = (weight, *(saved[name] for name in statistics), axis, channels, eps)
        found = kernel.vjp(g, x, *rest, needs[: 1 + len(vectors)])
        assert found is NotImplemented, op.name


def test_what_float32_cannot_hold_and_what_does_not_lie_in_rows_is_declined():
    x, _, _, _, axis, channels = draw("layer", np.float32, 0.0)

    def forward(x, axis=axis, channels=channels, eps=1e-5):
        return numpy_layer_norm.forward(x, axis=axis, channels=channels, eps=eps)

    for wrong in (x * np.float32(1e30), x[:, ::2], x.astype(np.longdouble), np.asfortranarray(x)):
        assert forward(wrong) is NotImplemented
    assert forward(x * np.float32(1e-30), eps=1e-60) is NotImplemented
    # Squares are lost, although ε is not.
    assert forward(x * np.float32(1e-30)) is NotImplemented
    nan = x.copy()
    nan[1, 3] = np.nan
    assert forward(nan) is NotImplemented
    grouped = np.zeros((2, 4, 3, 2), np.float32)  # group norm with channels last
    assert forward(grouped, axis=(0, 2), channels=(2, 3)) is NotImplemented
