"""The CUDA kernels of pools, run on the CPU, against the generic ops, which are the definition."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.ops.images import pools
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import avg_pool, avg_pool_input_grad, images, max_pool
from tinygrad_bn.kernels.cuda import scatter_windows as scatter_kernel
from tinygrad_bn.ops.pooling import (
    avg_pool2d,
    avg_pool2d_input_grad,
    max_pool2d,
    scatter_windows,
)
from tinygrad_bn.testing import check_double_grad, check_grad
from tinygrad_bn.windows import pool_windows

pytestmark = pytest.mark.usefixtures("served")

DTYPES = st.sampled_from(["float32", "float64", "float16", ml_dtypes.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def several_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "THREADS", 64)
        yield


@pytest.fixture(scope="module", params=[images.FEW, 0], ids=["32 bits", "64 bits"])
def index_bits(request):
    """Number entries in 32 bits, or, as if there were more, in 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "FEW", request.param)
        yield


def equal(got, want):
    """Assert that arrays agree to the bit: the kernels add up in the order of the generic form."""
    assert got is not NotImplemented
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.usefixtures("index_bits")
@given(data=st.data(), dtype=DTYPES, nan=st.booleans())
def test_max_pools_are_those_of_the_generic_form(data, dtype, nan):
    values = [0.0, 1.0, 2.0, -np.inf, *([np.nan, np.inf] if nan else [])]
    case = data.draw(pools(dtype=dtype, values=values, most=5))
    # ml_dtypes warns of comparisons with NaN.
    with use_kernels("generic"), np.errstate(invalid="ignore"):
        y, saved = max_pool2d.call_with_residuals(case.x, **case.options)
        gx = scatter_windows(case.y, saved["places"], view=saved["view"])
    result = max_pool.forward(case.x, **case.options)
    equal(result.out, y)
    np.testing.assert_array_equal(result.residuals["places"], saved["places"])
    assert result.residuals["view"] == saved["view"]
    assert result.residuals["places"].dtype == np.uint8
    equal(scatter_kernel.forward(case.y, saved["places"], view=saved["view"]), gx)


@pytest.mark.usefixtures("index_bits")
@given(data=st.data(), dtype=DTYPES, with_padding=st.booleans())
def test_average_pools_are_those_of_the_generic_form(data, dtype, with_padding):
    case = data.draw(pools(dtype=dtype, most=5))
    options = {**case.options, "count_include_pad": with_padding}
    with use_kernels("generic"):
        y, saved = avg_pool2d.call_with_residuals(case.x, **options)
        given_ = {"view": saved["view"], "count_include_pad": with_padding}
        gx = avg_pool2d_input_grad(case.y, **given_)
    result = avg_pool.forward(case.x, **options)
    equal(result.out, y)
    assert result.residuals["view"] == saved["view"]
    equal(avg_pool_input_grad.forward(case.y, **given_), gx)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gradients_through_the_ops(served, layout):
    x = np.random.default_rng(0).permutation(np.arange(60.0)).reshape(2, 5, 2, 3)
    before = len(served.launched)
    for pool in (tg.functional.max_pool2d, tg.functional.avg_pool2d):
        run = lambda t, pool=pool: pool(t, (2, 1), 1, (1, 0), layout=layout)  # noqa: E731
        check_grad(run, x)
        check_double_grad(run, x)
    names = {name for name, *_ in served.launched[before:]}
    assert names == {"max_pool", "scatter_windows", "average_pool", "spread_windows"}


def test_images_of_any_strides_are_served():
    x = np.random.default_rng(0).normal(size=(4, 6, 5, 3)).astype("f")
    right = max_pool.forward(x.copy(), kernel_size=2)
    for strided in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1].copy()[::-1]):
        equal(max_pool.forward(strided, kernel_size=2).out, right.out)
        equal(avg_pool.forward(strided, kernel_size=2).out, avg_pool.forward(x, kernel_size=2).out)
    g, places = right.out, right.residuals["places"]
    view = right.residuals["view"]
    want = scatter_kernel.forward(g, places, view=view)
    equal(scatter_kernel.forward(np.asfortranarray(g), places[...], view=view), want)


def test_what_the_kernels_leave_to_the_generic_ops():
    x = np.ones((1, 2, 4, 4), np.float32)
    assert max_pool.forward(x.astype(np.int64), kernel_size=2) is NotImplemented
    assert max_pool.forward(x[:0], kernel_size=2) is NotImplemented
    assert max_pool.forward(np.ones((1, 1, 20, 20)), kernel_size=17) is NotImplemented
    assert avg_pool.forward(x.astype(np.int64), kernel_size=2) is NotImplemented
    view = pool_windows("pool", x.shape, 2)
    g, places = np.ones((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2, 2), np.uint8)
    assert scatter_kernel.forward(g, places.astype(int), view=view) is NotImplemented
    assert scatter_kernel.forward(g[:, :1], places, view=view) is NotImplemented
    assert avg_pool_input_grad.forward(g[:, :1], view=view) is NotImplemented
