"""NumPy kernels of convolution and pooling against the generic ops, which are the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.images import convolutions, pools
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import (
    columns,
    numpy_avg_pool,
    numpy_avg_pool_input_grad,
    numpy_convolution,
    numpy_convolution_input_grad,
    numpy_convolution_weight_grad,
    numpy_pooling,
    numpy_scatter_windows,
    planes,
    threads,
)
from tinygrad_bn.ops.convolution import conv2d, conv2d_input_grad, conv2d_weight_grad
from tinygrad_bn.ops.pooling import (
    avg_pool2d,
    avg_pool2d_input_grad,
    max_pool2d,
    scatter_windows,
)
from tinygrad_bn.windows import convolution_windows, pool_windows

DTYPES = st.sampled_from([np.float32, np.float64])
#: Sums of at most some hundred terms of size 1, in another order.
TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-12}


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def many_threads(request, monkeypatch):
    monkeypatch.setattr(threads, "_count", request.param)


@pytest.fixture(params=[1, 400, 2**19], ids=["rows", "images", "all at once"])
def chunk_bytes(request, monkeypatch):
    """Chunks of a single row of an image, of few images, and of all."""
    for module in (columns, planes):
        monkeypatch.setattr(module, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(numpy_convolution_weight_grad, "JOINED_BYTES", request.param // 8)


def agree(kernel, generic):
    assert kernel is not NotImplemented
    assert kernel.shape == generic.shape
    assert kernel.dtype == generic.dtype
    assert kernel.flags.c_contiguous
    tolerance = TOLERANCE[generic.dtype]
    np.testing.assert_allclose(kernel, generic, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("chunk_bytes")
@given(data=st.data(), dtype=DTYPES)
def test_convolution_kernels_agree_with_the_generic_ops(data, dtype):
    case = data.draw(convolutions(dtype=dtype, most_groups=1, most=5))
    arrays = case.x, case.weight, case.bias
    view = convolution_windows(case.x.shape, case.weight.shape, **case.options)
    with use_kernels("generic"):
        y = conv2d(*arrays, **case.options)
        gx = conv2d_input_grad(case.y, case.weight, view=view)
        gw = conv2d_weight_grad(case.x, case.y, view=view)
    result = numpy_convolution.forward(*arrays, **case.options)
    assert result.residuals == {"view": view}
    agree(result.out, y)
    agree(numpy_convolution_input_grad.forward(case.y, case.weight, view=view), gx)
    agree(numpy_convolution_weight_grad.forward(case.x, case.y, view=view), gw)


@pytest.mark.usefixtures("chunk_bytes")
@given(data=st.data(), dtype=DTYPES, nan=st.booleans())
def test_pooling_kernels_agree_with_the_generic_ops(data, dtype, nan):
    values = [0.0, 1.0, 2.0, -np.inf, *([np.nan, np.inf] if nan else [])]
    case = data.draw(pools(dtype=dtype, values=values, most=5))
    with use_kernels("generic"):
        y, saved = max_pool2d.call_with_residuals(case.x, **case.options)
        gx = scatter_windows(case.y, saved["places"], view=saved["view"])
    result = numpy_pooling.forward(case.x, **case.options)
    agree(result.out, y)
    np.testing.assert_array_equal(result.residuals["places"], saved["places"])
    assert result.residuals["view"] == saved["view"]
    kernel = numpy_scatter_windows.forward(case.y, saved["places"], view=saved["view"])
    agree(kernel, gx)


@pytest.mark.usefixtures("chunk_bytes")
@given(case=pools(dtype=np.float32), whole=st.booleans(), with_padding=st.booleans())
def test_mean_pool_kernels_serve_few_windows_as_the_generic_ops_do(case, whole, with_padding):
    x, options = case.x, dict(case.options)
    if whole:
        size = x.shape[2:] if options["layout"] == "NCHW" else x.shape[1:3]
        options = {"kernel_size": size, "layout": options["layout"]}
    view = pool_windows("pool", x.shape, **options)
    y = np.random.default_rng(0).normal(size=view.out_shape(view.channels)).astype(np.float32)
    options["count_include_pad"] = with_padding
    backward = {"view": view, "count_include_pad": with_padding}
    found = numpy_avg_pool.forward(x, **options)
    gx = numpy_avg_pool_input_grad.forward(y, **backward)
    if np.prod(view.out) >= np.prod(view.kernel):
        assert found is gx is NotImplemented
        return
    with use_kernels("generic"):
        agree(found.out, avg_pool2d(x, **options))
        agree(gx, avg_pool2d_input_grad(y, **backward))
    assert numpy_avg_pool.forward(x.astype(np.float16), **options) is NotImplemented
    assert numpy_avg_pool.forward(x[:0], **options) is NotImplemented
    assert numpy_avg_pool_input_grad.forward(y.astype(np.float16), **backward) is NotImplemented
    assert numpy_avg_pool_input_grad.forward(y[1:], **backward) is NotImplemented


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_same_result_to_the_bit_every_time(layout):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 8, 8)).astype(np.float32)
    w = rng.normal(size=(8, 8, 3, 3)).astype(np.float32)
    view = convolution_windows(x.shape, w.shape, padding=1, layout=layout)
    first = conv2d_weight_grad(x, x, view=view)
    for _ in range(20):
        np.testing.assert_array_equal(conv2d_weight_grad(x, x, view=view), first)


def test_what_the_kernels_leave_to_the_generic_ops():
    x, w = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 2, 2, 2), np.float32)
    forward = numpy_convolution.forward
    assert forward(x, w) is not NotImplemented
    assert forward(x.astype(np.float16), w.astype(np.float16)) is NotImplemented
    assert forward(x.astype(np.int64), w.astype(np.int64)) is NotImplemented
    assert forward(x.astype(np.float64), w) is NotImplemented  # promotion is the generic op's
    assert forward(x.astype(">f4"), w.astype(">f4")) is NotImplemented
    assert forward(x, w[:, :1], groups=2) is NotImplemented
    assert forward(x[:0], w) is NotImplemented
    view = convolution_windows(x.shape, w.shape)
    y = np.ones(view.out_shape(2), np.float32)
    assert numpy_convolution_input_grad.forward(y[:0], w, view=view) is NotImplemented
    assert numpy_convolution_weight_grad.forward(x, y.astype(float), view=view) is NotImplemented
    pool = numpy_pooling.forward
    assert pool(x.astype(np.float16), kernel_size=2) is NotImplemented
    assert pool(np.ones((1, 1, 20, 20)), kernel_size=17) is NotImplemented  # places over 255
    pooled = pool_windows("pool", x.shape, 2)
    g = np.ones((1, 2, 2, 2), np.float32)
    places = np.zeros(g.shape, int)  # not the dtype that the pool hands out
    assert numpy_scatter_windows.forward(g, places, view=pooled) is NotImplemented


def test_a_large_image_is_worked_on_in_rows(monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_BYTES", 2**19)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 70, 64, 32)).astype(np.float32)
    w = rng.normal(size=(4, 32, 3, 3)).astype(np.float32)
    view = convolution_windows(x.shape, w.shape, padding=1, stride=2, layout="NHWC")
    parts = columns.chunks(view, columns.Columns(x, view).row_bytes())
    assert len(parts) > 1
    assert [p.top for p in parts[1:]] == [p.bottom for p in parts[:-1]]
    options = {"padding": 1, "stride": 2, "layout": "NHWC"}
    with use_kernels("generic"):
        y = conv2d(x, w, **options)
        gx, gw = conv2d_input_grad(y, w, view=view), conv2d_weight_grad(x, y, view=view)
    scale = {"rtol": 1e-4, "atol": 1e-3}  # sums of up to 1,120 products, each near 10 in size
    np.testing.assert_allclose(numpy_convolution.forward(x, w, **options).out, y, **scale)
    kernel = numpy_convolution_input_grad.forward(y, w, view=view)
    np.testing.assert_allclose(kernel, gx, **scale)
    kernel = numpy_convolution_weight_grad.forward(x, y, view=view)
    np.testing.assert_allclose(kernel, gw, rtol=1e-4, atol=1e-2)
