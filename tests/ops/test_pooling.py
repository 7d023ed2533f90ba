"""Pools: by definition, at ties, NaN and -inf, as adjoints, in any layout, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given

import tinygrad_bn as tg
from tests.ops.images import pools, to_nchw, windows_of
from tinygrad_bn import testing
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import numba_pooling, numba_scatter_windows
from tinygrad_bn.kernels.cpu import pools as pools_module
from tinygrad_bn.ops.pooling import (
    avg_pool2d,
    avg_pool2d_input_grad,
    max_pool2d,
    scatter_windows,
    take_windows,
)
from tinygrad_bn.windows import pool_windows

# Few values, so that most windows hold equals, and the two that compare with nothing else.
TRICKY = [0.0, -0.0, 1.0, -np.inf, np.inf, np.nan]


@pytest.fixture(autouse=True, params=["generic", "numpy", "numba"])
def family(request, monkeypatch):
    if request.param == "numba":
        pytest.importorskip("numba")
        monkeypatch.setattr(pools_module, "SMALLEST", 1)
        for kernel in (numba_pooling, numba_scatter_windows):
            monkeypatch.setattr(kernel, "FEWEST_CHANNELS", 1)
    with use_kernels(request.param):
        yield request.param


def first_largest(entries):
    """Return the (index, value) that a pool must choose: the first NaN, or the first largest."""
    best = entries[0]
    for entry in entries[1:]:
        if not np.isnan(best[1]) and (np.isnan(entry[1]) or entry[1] > best[1]):
            best = entry
    return best


def check_max_pool(case):
    y, saved = max_pool2d.call_with_residuals(case.x, **case.options)
    gx = scatter_windows(case.y, saved["places"], view=saved["view"])
    layout = case.options["layout"]
    expected, expected_gx = np.zeros(to_nchw(y, layout).shape), np.zeros(to_nchw(gx, layout).shape)
    for out, entries in windows_of(case.x, **case.options):
        chosen, expected[out] = first_largest(entries)
        expected_gx[chosen] += to_nchw(case.y, layout)[out]
    np.testing.assert_array_equal(to_nchw(y, layout), expected)
    np.testing.assert_allclose(to_nchw(gx, layout), expected_gx, rtol=1e-5, atol=1e-5)
    assert saved["places"].dtype == np.uint8
    assert y.flags.c_contiguous and gx.flags.c_contiguous
    assert y.dtype == gx.dtype == case.x.dtype


@given(case=pools())
def test_max_pool_takes_the_largest_and_gives_it_the_gradient(case):
    check_max_pool(case)


@given(case=pools(values=TRICKY, dtype=np.float32))
def test_the_first_of_equals_and_the_first_nan_win_and_padding_never(case):
    check_max_pool(case)


@given(case=pools(values=[3, -7, 3], dtype=np.int8))
def test_integers_are_pooled_too(case):
    y = to_nchw(max_pool2d(case.x, **case.options), case.options["layout"])
    assert y.dtype == np.int8
    for out, entries in windows_of(case.x, **case.options):
        assert y[out] == max(value for _, value in entries)


def test_a_large_window_has_places_of_a_wider_dtype():
    x = np.zeros((1, 1, 20, 20), np.float32)
    x[0, 0, 19, 18] = 1
    _, saved = max_pool2d.call_with_residuals(x, kernel_size=20)
    assert saved["places"].dtype == np.uint16
    assert saved["places"].item() == 19 * 20 + 18


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_cotangent_that_is_not_finite_stays_where_it_belongs(layout, value):
    x = tg.Tensor(np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1), requires_grad=True)
    images = x if layout == "NHWC" else x.transpose((0, 3, 1, 2))
    y = max_pool2d(images, kernel_size=2, layout=layout)
    g = np.zeros(y.shape, np.float32)
    g.flat[0] = value
    y.backward(g)
    assert np.flatnonzero(x.grad.data).tolist() == [5]  # 0 in all other places, not NaN


@given(case=pools())
def test_avg_pool_is_the_mean_with_and_without_padding(case):
    layout, size = case.options["layout"], np.prod(case.options["kernel_size"])
    with_padding = to_nchw(avg_pool2d(case.x, **case.options), layout)
    without = to_nchw(avg_pool2d(case.x, **case.options, count_include_pad=False), layout)
    for out, entries in windows_of(case.x, **case.options):
        values = [value for _, value in entries]
        np.testing.assert_allclose(with_padding[out], np.sum(values) / size, atol=1e-12)
        np.testing.assert_allclose(without[out], np.mean(values), atol=1e-6, rtol=1e-6)


@given(case=pools())
def test_the_pairs_are_adjoint(case):
    view = pool_windows("pool", case.x.shape, **case.options)
    rng = np.random.default_rng(0)
    places = rng.integers(0, np.prod(view.kernel), case.y.shape).astype(np.uint8)
    taken = (take_windows(case.x, places, view=view) * case.y).sum()
    scattered = (scatter_windows(case.y, places, view=view) * case.x).sum()
    np.testing.assert_allclose(taken, scattered, rtol=1e-10, atol=1e-10)
    for include in (True, False):
        mean = (avg_pool2d(case.x, **case.options, count_include_pad=include) * case.y).sum()
        spread = avg_pool2d_input_grad(case.y, view=view, count_include_pad=include)
        np.testing.assert_allclose((spread * case.x).sum(), mean, rtol=1e-10, atol=1e-10)


@given(case=pools(most=2))
def test_first_and_second_order_agree_with_differences(case):
    # Squared, since a pool of x alone has no second derivative.
    for pool in (max_pool2d, avg_pool2d):
        fn = lambda x, pool=pool: pool(x * x, **case.options)  # noqa: E731
        x = np.abs(case.x) + 0.5  # equals are as rare as in x, and x * x keeps the order
        testing.check_grad(fn, x)
        testing.check_double_grad(fn, x)


@given(case=pools())
def test_layouts_agree(case):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[case.options["layout"]]
    order = (0, 2, 3, 1) if other == "NHWC" else (0, 3, 1, 2)
    for pool in (max_pool2d, avg_pool2d):
        y = pool(case.x, **case.options)
        swapped = pool(case.x.transpose(order), **{**case.options, "layout": other})
        np.testing.assert_allclose(swapped, y.transpose(order), rtol=1e-12, atol=1e-12)


@given(case=pools(dtype=np.float16))
def test_float16_stays_and_is_summed_in_float32(case):
    y = max_pool2d(case.x, **case.options)
    wide = case.x.astype(np.float32)
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, max_pool2d(wide, **case.options))
    mean = avg_pool2d(case.x, **case.options)
    assert mean.dtype == np.float16
    np.testing.assert_array_equal(mean, avg_pool2d(wide, **case.options).astype(np.float16))


@pytest.mark.parametrize("pool", [max_pool2d, avg_pool2d])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_an_empty_batch_gives_an_empty_output(pool, layout):
    x = tg.Tensor(np.ones((0, 4, 4, 4)), requires_grad=True)
    y = pool(x, kernel_size=2, layout=layout)
    assert y.shape == ((0, 4, 2, 2) if layout == "NCHW" else (0, 2, 2, 4))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("pool", [max_pool2d, avg_pool2d])
@pytest.mark.parametrize(
    ("shape", "options", "parts"),
    [
        ((4, 4), {"kernel_size": 2}, ["(4, 4)", "expected 4"]),
        ((1, 1, 4, 4), {"kernel_size": 5}, ["(5, 5)", "(4, 4)"]),
        ((1, 1, 4, 4), {"kernel_size": 2, "padding": 2}, ["padding (2, 2)", "(2, 2)", "pad x"]),
        ((1, 1, 4, 4), {"kernel_size": 0}, ["the kernel size is 0"]),
        ((1, 1, 4, 4), {"kernel_size": 2, "stride": (1, 0)}, ["stride is (1, 0)"]),
        ((1, 1, 4, 4), {"kernel_size": 2, "layout": "HWC"}, ["'HWC'", "'NHWC'"]),
    ],
)
def test_errors_say_what_came_and_what_was_expected(pool, shape, options, parts):
    with pytest.raises(ValueError, match=rf"^{pool.name}: ") as caught:
        pool(np.ones(shape), **options)
    for part in parts:
        assert part in str(caught.value)


def test_places_of_another_shape_are_refused():
    view = pool_windows("pool", (1, 1, 4, 4), 2)
    x, right, wrong = np.ones((1, 1, 4, 4)), np.ones((1, 1, 2, 2)), np.zeros((1, 1, 3, 3), int)
    with pytest.raises(ValueError, match=r"take_windows: places.*\(1, 1, 3, 3\).*\(1, 1, 2, 2\)"):
        take_windows(x, wrong, view=view)
    with pytest.raises(ValueError, match=r"scatter_windows: places.*\(1, 1, 3, 3\)"):
        scatter_windows(right, wrong, view=view)
