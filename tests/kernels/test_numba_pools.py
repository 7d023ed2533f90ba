"""The compiled kernels of pools: the bits of the generic form, which is the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.images import pools
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import (
    numba_avg_pool,
    numba_avg_pool_input_grad,
    numba_pooling,
    numba_scatter_windows,
    planes,
    threads,
)
from tinygrad_bn.kernels.cpu import pools as module
from tinygrad_bn.ops.pooling import (
    avg_pool2d,
    avg_pool2d_input_grad,
    max_pool2d,
    scatter_windows,
)
from tinygrad_bn.windows import pool_windows

pytest.importorskip("numba")

DTYPES = st.sampled_from([np.float32, np.float64])
#: Equals, zeros of either sign, and what is not a number.
TRICKY = [0.0, -0.0, 1.0, -1.0, -np.inf, np.inf, np.nan]


@pytest.fixture(autouse=True, params=[1, 400, 2**19], ids=["planes", "some", "all at once"])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 1)
    for kernel in (numba_pooling, numba_scatter_windows):
        monkeypatch.setattr(kernel, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(planes, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(threads, "_count", 3)


def same(ours, right):
    assert ours is not NotImplemented
    assert ours.dtype == right.dtype and ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, right)
    zeros = right == 0
    np.testing.assert_array_equal(np.signbit(ours[zeros]), np.signbit(right[zeros]))


def channels_last(case):
    """Return a case with its channels last."""
    if case.options["layout"] == "NHWC":
        return case
    x, y = (np.ascontiguousarray(array.transpose(0, 2, 3, 1)) for array in (case.x, case.y))
    return case._replace(x=x, y=y, options={**case.options, "layout": "NHWC"})


def check(x, y, options):
    view = pool_windows("pool", x.shape, **options)
    with use_kernels("generic"), np.errstate(invalid="ignore"):
        best, saved = max_pool2d.call_with_residuals(x, **options)
        places = saved["places"]
        given_back = scatter_windows(y, places, view=view)
        means = [avg_pool2d(x, **options, count_include_pad=pad) for pad in (True, False)]
        spread = [avg_pool2d_input_grad(y, view=view, count_include_pad=p) for p in (True, False)]
    if view.place_dtype == "uint8":
        found = numba_pooling.forward(x, **options)
        same(found.out, best)
        same(found.residuals["places"], places)
        assert found.residuals["view"] == view
        same(numba_scatter_windows.forward(y, places, view=view), given_back)
    for k, pad in enumerate((True, False)):
        same(numba_avg_pool.forward(x, **options, count_include_pad=pad).out, means[k])
        spread_back = numba_avg_pool_input_grad.forward(y, view=view, count_include_pad=pad)
        same(spread_back, spread[k])


@given(data=st.data(), dtype=DTYPES)
def test_pools_are_those_of_the_generic_form_to_the_bit(data, dtype):
    check(*channels_last(data.draw(pools(dtype=dtype))))


@given(data=st.data(), dtype=DTYPES)
def test_so_they_are_where_entries_are_equal_infinite_or_nan(data, dtype):
    check(*channels_last(data.draw(pools(values=TRICKY, dtype=dtype))))


@pytest.mark.parametrize("channels", [1, 18, 67])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (17, 20)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": (4, 5)},
        {"kernel_size": (2, 3), "stride": (1, 3), "padding": (1, 1)},
        "whole",
    ],
    ids=str,
)
def test_so_are_pools_of_many_channels(channels, size, options):
    options = {"kernel_size": size} if options == "whole" else options
    options = {**options, "layout": "NHWC"}
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (2, *size, channels)).astype(np.float32)  # equals in most windows
    view = pool_windows("pool", x.shape, **options)
    check(x, rng.standard_normal(view.out_shape(channels)).astype(np.float32), options)


@given(case=pools(dtype=np.float32))
def test_images_in_another_order_in_memory_are_served(case):
    x, _, options = channels_last(case)
    turned = np.asfortranarray(x)
    turned.flags.writeable = False
    right = numba_pooling.forward(x, **options).out
    np.testing.assert_array_equal(numba_pooling.forward(turned, **options).out, right)


def test_what_they_are_not_made_for_is_declined(monkeypatch):
    x = np.ones((2, 4, 4, 3), np.float32)
    options = {"kernel_size": 2, "layout": "NHWC"}
    view = pool_windows("pool", x.shape, **options)
    y, places = np.ones((2, 2, 2, 3), np.float32), np.zeros((2, 2, 2, 3), np.uint8)
    for wrong in (x.astype(np.float16), x.astype(np.int32), x.astype(">f4"), x[:0], x[0]):
        assert numba_pooling.forward(wrong, **options) is NotImplemented
        assert numba_avg_pool.forward(wrong, **options) is NotImplemented
    for pool in (numba_pooling, numba_avg_pool):
        assert pool.forward(x, kernel_size=2) is NotImplemented  # channels first
    wide = np.ones((1, 20, 20, 1), np.float32)
    found = numba_pooling.forward(wide, kernel_size=20, layout="NHWC")
    assert found is NotImplemented  # places beyond a byte
    scatter, spread = numba_scatter_windows.forward, numba_avg_pool_input_grad.forward
    assert scatter(y, places.astype(np.uint16), view=view) is NotImplemented
    assert scatter(y, places[:1], view=view) is NotImplemented
    assert scatter(y[:1], places, view=view) is NotImplemented
    assert spread(y[:1], view=view) is NotImplemented
    assert spread(y.astype(np.float16), view=view) is NotImplemented
    monkeypatch.setattr(numba_pooling, "FEWEST_CHANNELS", 4)
    assert numba_pooling.forward(x, **options) is NotImplemented
    monkeypatch.setattr(module, "SMALLEST", 1 << 12)
    assert numba_avg_pool.forward(x, **options) is NotImplemented
    assert scatter(y, places, view=view) is NotImplemented
