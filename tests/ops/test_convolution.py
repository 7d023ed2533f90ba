"""conv2d and its transposes: by definition, as adjoints, in every layout, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.ops.images import convolutions, naive_conv2d
from tinygrad_bn import testing
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.ops.convolution import conv2d, conv2d_input_grad, conv2d_weight_grad
from tinygrad_bn.windows import convolution_windows


@pytest.fixture(autouse=True, params=["generic", "numpy"])
def family(request):
    with use_kernels(request.param):
        yield request.param


def view_of(case):
    return convolution_windows(case.x.shape, case.weight.shape, **case.options)


@given(case=convolutions())
def test_forward_is_the_sum_by_definition(case):
    expected = naive_conv2d(case.x, case.weight, case.bias, **case.options)
    y = conv2d(case.x, case.weight, case.bias, **case.options)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert y.flags.c_contiguous


@given(case=convolutions())
def test_the_transposes_are_adjoint(case):
    # <conv(x, w), y> = <x, input_grad(y, w)> = <w, weight_grad(x, y)>
    view = view_of(case)
    product = (conv2d(case.x, case.weight, **case.options) * case.y).sum()
    gx = conv2d_input_grad(case.y, case.weight, view=view)
    gw = conv2d_weight_grad(case.x, case.y, view=view)
    assert gx.shape == case.x.shape
    assert gw.shape == case.weight.shape
    assert gx.flags.c_contiguous and gw.flags.c_contiguous
    np.testing.assert_allclose((gx * case.x).sum(), product, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose((gw * case.weight).sum(), product, rtol=1e-10, atol=1e-10)


@given(case=convolutions(most=2))
def test_first_and_second_order_agree_with_differences(case):
    arrays = [case.x, case.weight] if case.bias is None else [case.x, case.weight, case.bias]
    fn = lambda *inputs: conv2d(*inputs, **case.options)  # noqa: E731
    testing.check_grad(fn, *arrays)
    testing.check_double_grad(fn, *arrays)


def test_third_order_is_that_of_the_trilinear_form():
    # d³<conv(x, w), y> / dx dw dy along (x', w', y') is <conv(x', w'), y'>.
    rng = np.random.default_rng(0)
    x, x_, y, y_ = (rng.normal(size=s) for s in [(2, 2, 4, 4)] * 2 + [(2, 3, 3, 3)] * 2)
    w, w_ = rng.normal(size=(2, 3, 2, 2, 2))
    x, w, y = (tg.Tensor(a, requires_grad=True) for a in (x, w, y))
    (gx,) = tg.grad((conv2d(x, w) * y).sum(), x, create_graph=True)
    (gw,) = tg.grad((gx * x_).sum(), w, create_graph=True)
    (gy,) = tg.grad((gw * w_).sum(), y)
    np.testing.assert_allclose((gy.data * y_).sum(), (conv2d(x_, w_) * y_).sum())


@given(case=convolutions())
def test_layouts_agree(case):
    other = {"NCHW": "NHWC", "NHWC": "NCHW"}[case.options["layout"]]
    order = (0, 2, 3, 1) if other == "NHWC" else (0, 3, 1, 2)
    y = conv2d(case.x, case.weight, case.bias, **case.options)
    # The other layout's input is here a view of this one's, not contiguous.
    swapped = conv2d(
        case.x.transpose(order), case.weight, case.bias, **{**case.options, "layout": other}
    )
    np.testing.assert_allclose(swapped, y.transpose(order), rtol=1e-12, atol=1e-12)


@given(case=convolutions(dtype=np.float16))
def test_float16_is_summed_in_float32_and_rounded_once(case):
    wide = [None if a is None else a.astype(np.float32) for a in case[:4]]
    view = view_of(case)
    pairs = [
        (conv2d(*case[:3], **case.options), conv2d(*wide[:3], **case.options)),
        (
            conv2d_input_grad(case.y, case.weight, view=view),
            conv2d_input_grad(wide[3], wide[1], view=view),
        ),
        (
            conv2d_weight_grad(case.x, case.y, view=view),
            conv2d_weight_grad(wide[0], wide[3], view=view),
        ),
    ]
    for narrow, exact in pairs:
        assert narrow.dtype == np.float16
        # Half a unit in the last place, and the rounding of float32 sums.
        np.testing.assert_allclose(narrow.astype(np.float32), exact, rtol=2**-11 * 1.01, atol=1e-6)


@given(case=convolutions(), data=st.data())
def test_inputs_in_any_memory_order_are_read_and_left_alone(case, data):
    def laid_out(array):
        order = data.draw(st.permutations(range(array.ndim)))
        array = np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))
        array.flags.writeable = False
        return array

    x, weight, y, view = laid_out(case.x), laid_out(case.weight), laid_out(case.y), view_of(case)
    same = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(
        conv2d(x, weight, **case.options), conv2d(case.x, case.weight, **case.options), **same
    )
    np.testing.assert_allclose(
        conv2d_input_grad(y, weight, view=view),
        conv2d_input_grad(case.y, case.weight, view=view),
        **same,
    )
    np.testing.assert_allclose(
        conv2d_weight_grad(x, y, view=view), conv2d_weight_grad(case.x, case.y, view=view), **same
    )


def test_a_broadcast_cotangent_is_read_as_it_is():
    # What y.sum().backward() hands down: one number behind every entry.
    x, w = (tg.Tensor(np.ones(s), requires_grad=True) for s in [(2, 1, 3, 3), (2, 1, 2, 2)])
    conv2d(x, w).sum().backward()
    assert w.grad.tolist() == [[[[8.0, 8.0], [8.0, 8.0]]]] * 2
    assert x.grad.data[0, 0].tolist() == [[2.0, 4.0, 2.0], [4.0, 8.0, 4.0], [2.0, 4.0, 2.0]]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_an_empty_batch_gives_an_empty_output_and_zero_weight_gradient(layout):
    shape = (0, 2, 5, 4) if layout == "NCHW" else (0, 5, 4, 2)
    x, w = (tg.Tensor(np.ones(s), requires_grad=True) for s in [shape, (3, 2, 2, 2)])
    y = conv2d(x, w, layout=layout)
    assert y.shape == ((0, 3, 4, 3) if layout == "NCHW" else (0, 4, 3, 3))
    y.sum().backward()
    assert x.grad.shape == shape
    assert not w.grad.data.any()


@pytest.mark.parametrize("value", [2, (2, 2), [2, 2], np.int64(2)])
def test_options_are_integers_or_pairs_of_any_kind(value):
    x, w = np.ones((1, 1, 6, 6)), np.ones((1, 1, 2, 2))
    y = conv2d(x, w, stride=value, padding=value, dilation=value)
    np.testing.assert_array_equal(y, conv2d(x, w, stride=2, padding=2, dilation=2))


def test_mixed_dtypes_promote_as_numpys():
    x, w = np.ones((1, 1, 3, 3), np.uint8), np.ones((1, 1, 2, 2), np.float32)
    assert conv2d(x, w).dtype == np.float32
    assert conv2d(x.astype(np.float32), w.astype(np.float64)).dtype == np.float64
    assert conv2d(x, w.astype(np.uint8)).dtype == np.uint8


@pytest.mark.parametrize(
    ("x", "weight", "bias", "options", "parts"),
    [
        ((3, 4, 4), (2, 3, 2, 2), None, {}, ["(3, 4, 4)", "expected 4", "x[None]"]),
        ((1, 3, 4, 4), (2, 3, 2), None, {}, ["(2, 3, 2)", "(O, C/groups, KH, KW)"]),
        ((1, 4, 4, 3), (2, 3, 2, 2), None, {}, ["4 channels", "NCHW", "expects 3", "layout"]),
        ((1, 3, 4, 4), (2, 3, 5, 2), None, {}, ["(5, 2)", "(4, 4)", "padding"]),
        ((1, 3, 4, 4), (2, 3, 2, 3), None, {"dilation": 3}, ["dilation (3, 3)", "(4, 7)"]),
        ((1, 3, 4, 4), (2, 1, 2, 2), None, {"groups": 2}, ["groups=2", "3 input", "2 output"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), None, {"groups": 0}, ["groups=0"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), (3,), {}, ["bias", "(3,)", "(2,)"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), None, {"layout": "CHWN"}, ["'CHWN'", "'NCHW'", "'NHWC'"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), None, {"stride": 0}, ["stride is 0", ">= 1"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), None, {"padding": (1, -1)}, ["padding is (1, -1)", ">= 0"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), None, {"stride": 1.5}, ["stride is 1.5"]),
        ((1, 3, 4, 4), (2, 3, 2, 2), None, {"stride": (1, 2, 3)}, ["stride is (1, 2, 3)"]),
    ],
)
def test_errors_say_what_came_and_what_was_expected(x, weight, bias, options, parts):
    with pytest.raises(ValueError, match=r"^conv2d: ") as caught:
        conv2d(np.ones(x), np.ones(weight), None if bias is None else np.ones(bias), **options)
    for part in parts:
        assert part in str(caught.value)


def test_a_cotangent_of_another_shape_is_refused():
    view = convolution_windows((1, 1, 3, 3), (1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 3\).*\(1, 1, 2, 2\)"):
        conv2d_input_grad(np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2)), view=view)
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 3\).*\(1, 1, 2, 2\)"):
        conv2d_weight_grad(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)), view=view)
