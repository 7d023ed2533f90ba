"""The CUDA kernels of convolution, run on the CPU, against the generic ops and their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.ops.images import convolutions, naive_conv2d
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import convolution, convolution_input_grad, convolution_weight_grad
from tinygrad_bn.kernels.cuda import convolutions as driver
from tinygrad_bn.ops.convolution import conv2d, conv2d_input_grad, conv2d_weight_grad
from tinygrad_bn.testing import check_double_grad, check_grad
from tinygrad_bn.windows import convolution_windows

pytestmark = pytest.mark.usefixtures("served")

#: Sums of at most some hundred products of size 1, in another order.
TOLERANCE = {"float32": 1e-4, "float64": 1e-12}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Cut small images into several blocks, and shares of one round of a warp."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "PIXELS", 2)
        patch.setattr(driver, "FEWEST_PIXELS", 32)
        patch.setattr(driver, "TOTAL_WARPS", 2)
        yield


def agree(got, want):
    assert got is not NotImplemented
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.flags.c_contiguous
    bar = TOLERANCE[want.dtype.name]
    np.testing.assert_allclose(got, want, rtol=bar, atol=bar)


def all_three(x, weight, bias, y, **options):
    """Return forward and both gradients by the kernels, and by the generic form."""
    view = convolution_windows(x.shape, weight.shape, **options)
    result = convolution.forward(x, weight, bias, **options)
    assert result.residuals == {"view": view}
    got = (
        result.out,
        convolution_input_grad.forward(y, weight, view=view),
        convolution_weight_grad.forward(x, y, view=view),
    )
    with use_kernels("generic"):
        want = (
            conv2d(x, weight, bias, **options),
            conv2d_input_grad(y, weight, view=view),
            conv2d_weight_grad(x, y, view=view),
        )
    return got, want


@given(data=st.data(), dtype=st.sampled_from(list(TOLERANCE)))
def test_the_kernels_agree_with_the_generic_ops(data, dtype):
    case = data.draw(convolutions(dtype=dtype, most_groups=1, most=6))
    got, want = all_three(case.x, case.weight, case.bias, case.y, **case.options)
    for a, b in zip(got, want, strict=True):
        agree(a, b)
    agree(got[0], naive_conv2d(case.x, case.weight, case.bias, **case.options).astype(dtype))


#: Output channels -> warps: few, several of four and of eight, a rest, several tiles of them.
@pytest.mark.parametrize("outputs", [1, 4, 5, 20, 32, 33, 50, 67])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_kind_of_block(outputs, layout):
    rng = np.random.default_rng(outputs)
    shape = (3, 3, 7, 6) if layout == "NCHW" else (3, 7, 6, 3)
    x, weight = rng.normal(size=shape), rng.normal(size=(outputs, 3, 2, 3))
    options = {"padding": (1, 0), "dilation": (2, 1), "layout": layout}
    y = rng.normal(size=convolution_windows(shape, weight.shape, **options).out_shape(outputs))
    arrays = [a.astype("f") for a in (x, weight, rng.normal(size=outputs), y)]
    for a, b in zip(*all_three(*arrays, **options), strict=True):
        agree(a, b)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 33), (7, 9), (8, 8)])
def test_shares_cross_rows_and_images_of_any_size(size, layout):
    rng = np.random.default_rng(0)
    shape = (23, 2, *size) if layout == "NCHW" else (23, *size, 2)
    x, y = rng.normal(size=(2, *shape)).astype("f")
    weight = rng.normal(size=(2, 2, 3, 3)).astype("f")
    for a, b in zip(*all_three(x, weight, None, y, padding=1, layout=layout), strict=True):
        agree(a, b)


def test_as_many_taps_as_are_served_and_one_more():
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "MOST_TAPS", 135)
        arrays = [rng.normal(size=s) for s in ((2, 15, 4, 4), (3, 15, 3, 3), (2, 3, 2, 2))]
        x, weight, y = (a.astype("f") for a in arrays)
        got, want = all_three(x, weight, None, y)
        for a, b in zip(got, want, strict=True):
            agree(a, b)
        assert convolution.forward(x[:, :14], weight[:, :14]) is not NotImplemented
        patch.setattr(driver, "MOST_TAPS", 134)
        assert convolution.forward(x, weight) is NotImplemented


def test_gradients_of_the_op_through_the_kernels(served):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in ((2, 2, 5, 4), (3, 2, 2, 3), (3,))]
    before = len(served.launched)
    for options in ({"stride": 2, "padding": 1}, {"dilation": (2, 1)}):
        run = lambda *a, o=options: tg.functional.conv2d(*a, **o)  # noqa: E731
        check_grad(run, *arrays)
        check_double_grad(run, *arrays)
    names = {name for name, *_ in served.launched[before:]}
    assert names == {"convolve", "weight_sums", "weight_total"}


def test_arrays_of_any_strides_are_served():
    rng = np.random.default_rng(0)
    shapes = (3, 4, 5, 6), (4, 4, 3, 2), (3, 4, 3, 5)
    x, weight, y = (rng.normal(size=s).astype("f") for s in shapes)
    right, _ = all_three(x, weight, None, y)
    for change in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]):
        again, _ = all_three(change(x), change(weight), None, change(y))
        for a, b in zip(again, right, strict=True):
            np.testing.assert_array_equal(a, b)


def test_nan_reaches_the_windows_that_hold_it_and_no_other():
    x, weight = np.ones((2, 2, 6, 6), "f"), np.ones((3, 2, 3, 3), "f")
    x[1, 0, 0, 0] = np.nan
    y = convolution.forward(x, weight).out
    assert np.isnan(y[1, :, 0, 0]).all() and np.isnan(y).sum() == 3


def test_sums_in_shares_are_as_exact_as_float32_allows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 1, 16, 16)).astype("f")
    y = rng.normal(size=(40, 1, 16, 16)).astype("f")
    view = convolution_windows(x.shape, (1, 1, 1, 1))
    got = convolution_weight_grad.forward(x, y, view=view)
    wide = x.astype("d") * y
    # 10,240 products: shares of some hundred are added up in float32, their sums in float64.
    assert abs(got.item() - wide.sum()) < 1e-6 * np.abs(wide).sum()


def test_what_the_kernels_leave_to_the_generic_ops():
    x, w = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 2, 2, 2), np.float32)
    forward = convolution.forward
    assert forward(x, w) is not NotImplemented
    assert forward(x.astype(np.float16), w.astype(np.float16)) is NotImplemented
    assert forward(x.astype(np.int64), w.astype(np.int64)) is NotImplemented
    assert forward(x.astype(np.float64), w) is NotImplemented  # promotion is the generic op's
    assert forward(x, w, np.ones(2)) is NotImplemented
    assert forward(x, w[:, :1], groups=2) is NotImplemented
    assert forward(x[:0], w) is NotImplemented
    view = convolution_windows(x.shape, w.shape)
    y = np.ones(view.out_shape(2), np.float32)
    assert convolution_input_grad.forward(y[:0], w, view=view) is NotImplemented
    assert convolution_input_grad.forward(y.astype(float), w, view=view) is NotImplemented
    assert convolution_weight_grad.forward(x, y.astype(float), view=view) is NotImplemented
    assert convolution_weight_grad.forward(x, y[:, :, :1], view=view) is NotImplemented
