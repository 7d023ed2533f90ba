"""The CUDA kernels of a convolution block, run on the CPU, against the chain that defines it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.kernels.cuda import shim
from tests.ops.images import convolutions
from tinygrad_bn import nn
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import conv_block as kernel
from tinygrad_bn.kernels.cuda import convolutions as driver
from tinygrad_bn.ops.fused import conv_block

pytestmark = pytest.mark.usefixtures("served")

#: Sums of at most some hundred terms of size 1, in another order.
TOLERANCE = {"f": 3e-5, "d": 1e-11}
PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "layout": "NCHW"}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with shim.small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "PIXELS", 1)
        patch.setattr(driver, "FEWEST_PIXELS", 32)
        patch.setattr(driver, "TOTAL_WARPS", 2)
        yield


def inputs(dtype="f", outputs=6, offset=True, layout="NCHW", seed=0):
    rng = np.random.default_rng(seed)
    x = (5, 2, 9, 8) if layout == "NCHW" else (5, 9, 8, 2)
    shapes = (x, (outputs, 2, 3, 2), (outputs,), (outputs,), (outputs,))
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return arrays if offset else [*arrays[:2], None, *arrays[3:]]


def both_ways(family, arrays, g=None, eps=1e-2, **options):
    """Return output, statistics and gradients of the block, served by `family`."""
    with use_kernels(family):
        tensors = [None if a is None else tg.tensor(a, requires_grad=True) for a in arrays]
        y, found = conv_block.call_with_residuals(*tensors, eps=eps, **{**PLAIN, **options})
        assert isinstance(found["kept"], kernel.Kept) == (family == "cuda")
        g = np.random.default_rng(1).normal(size=y.shape).astype(y.dtype) if g is None else g
        y.backward(tg.tensor(g))
    grads = [t.grad.numpy() for t in tensors if t is not None]
    return {"y": y.numpy(), "mean": found["mean"], "var": found["var"]}, grads, found["count"]


def agree(served, defined, tolerance):
    (values, grads, count), (expected, right, counted) = served, defined
    assert count == counted
    for got, want in zip((*values.values(), *grads), (*expected.values(), *right), strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        # The offset's gradient is 0: relative to what it is a difference of.
        scale = max(np.abs(want).max(initial=0), 1)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


@given(
    data=st.data(),
    dtype=st.sampled_from("fd"),
    pool=st.sampled_from([None, 1, 2, (2, 1), (1, 3), 3]),
    given_=st.tuples(*[st.booleans()] * 3),
)
def test_it_agrees_with_the_ops_it_is_a_chain_of(data, dtype, pool, given_):
    case = data.draw(convolutions(dtype=dtype, most_groups=1, most=5))
    y = case.y.shape
    rows, columns = y[2:] if case.options["layout"] == "NCHW" else y[1:3]
    high, wide = pool if isinstance(pool, tuple) else (pool or 1, pool or 1)
    if high > rows or wide > columns or case.y.size // case.weight.shape[0] < 2:
        return
    channels = case.weight.shape[0]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    vectors = [rng.normal(size=channels).astype(dtype) if there else None for there in given_]
    options = {k: v for k, v in case.options.items() if k != "groups"}
    arrays = [case.x, case.weight, *vectors]
    if (case.weight.reshape(channels, -1) == 0).all(axis=1).any():
        return  # a constant channel: the definition's own rounding decides who is largest
    agree(
        both_ways("cuda", arrays, pool=pool, **options),
        both_ways("generic", arrays, pool=pool, **options),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("outputs", [1, 6, 33])
@pytest.mark.parametrize("pool", [None, 2, (3, 5)])
def test_many_blocks_of_many_channels(layout, outputs, pool):
    arrays = inputs(outputs=outputs, layout=layout)
    served, defined = (
        both_ways(family, arrays, pool=pool, layout=layout) for family in ("cuda", "generic")
    )
    agree(served, defined, TOLERANCE["f"])


def test_it_runs_in_four_launches_and_six(served):
    before = len(served.launched)
    both_ways("cuda", inputs(), pool=2)
    assert [name for name, *_ in served.launched[before:]] == [
        *("convolve", "forward_sums", "channel_moments", "activate"),
        *("pooled_sums", "channel_gradients", "spread", "convolve", "weight_sums", "weight_total"),
    ]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cotangents_and_images_of_any_strides_are_served(layout):
    arrays = inputs(layout=layout)
    right = both_ways("cuda", arrays, pool=2, layout=layout)
    g = np.random.default_rng(1).normal(size=right[0]["y"].shape).astype("f")
    for strided in (np.asfortranarray(g), np.repeat(g, 2, axis=-1)[..., ::2], g[::-1].copy()[::-1]):
        arrays[0] = np.asfortranarray(arrays[0])
        again = both_ways("cuda", arrays, g=strided, pool=2, layout=layout)
        for a, b in zip(right[1], again[1], strict=True):
            np.testing.assert_array_equal(a, b)


def test_only_the_gradients_that_are_needed_are_computed():
    arrays = inputs()
    _, right, _ = both_ways("cuda", arrays, pool=2)
    for i in range(5):
        tensors = [tg.tensor(a, requires_grad=j == i) for j, a in enumerate(arrays)]
        y = conv_block(*tensors, eps=1e-2, pool=2, **PLAIN)
        y.backward(tg.tensor(np.random.default_rng(1).normal(size=y.shape).astype("f")))
        np.testing.assert_array_equal(tensors[i].grad.numpy(), right[i])
        assert all(t.grad is None for j, t in enumerate(tensors) if j != i)


def test_of_equal_entries_the_first_takes_the_gradient():
    arrays = inputs(offset=False)
    arrays[0] = np.repeat(np.repeat(arrays[0][:, :, :4, :4], 2, axis=2), 2, axis=3)
    arrays[1] = arrays[1][:, :, :1, :1]
    served, defined = (both_ways(family, arrays, pool=2) for family in ("cuda", "generic"))
    agree(served, defined, TOLERANCE["f"])


def test_a_mean_far_larger_than_the_spread_costs_no_digits():
    # A kernel of one entry, 1 for its own channel: what the convolution gives is exact.
    x = (1e6 + np.random.default_rng(0).normal(size=(8, 3, 6, 6))).astype("f")
    one = np.eye(3, dtype="f").reshape(3, 3, 1, 1)
    arrays = [x, one, None, np.ones(3, "f"), np.zeros(3, "f")]
    served = both_ways("cuda", arrays, pool=2)
    defined = both_ways("generic", [a if a is None else a.astype("d") for a in arrays], pool=2)
    # On the scales of batch norm: at most the 3 of y and dx here.
    assert np.abs(served[0]["y"] - defined[0]["y"]).max() < 1e-5
    assert np.abs(served[1][0] - defined[1][0]).max() < 1e-5


@pytest.mark.parametrize("power", [-60, 60])
def test_deviations_at_the_ends_of_float32_lose_no_digits(power):
    arrays = inputs(offset=False)
    near = both_ways("cuda", arrays, pool=2)
    far = [np.ldexp(arrays[0], power), *arrays[1:]]
    again = both_ways("cuda", far, eps=float(np.ldexp(1e-2, 2 * power)), pool=2)
    np.testing.assert_allclose(again[0]["y"], near[0]["y"], rtol=0, atol=3e-6)
    scale = np.abs(near[1][0]).max()
    gx = np.ldexp(again[1][0].astype("d"), power)
    np.testing.assert_allclose(gx, near[1][0], rtol=0, atol=1e-5 * scale)


def test_nan_fills_its_channel_and_no_other():
    arrays = inputs()
    arrays[1][2] = np.nan  # weights of the convolution
    values, (gx, gkernel, *_), _ = both_ways("cuda", arrays, pool=2)
    for result, axis in ((values["y"], 1), (values["mean"], 1), (gkernel, 0)):
        assert np.isnan(np.take(result, 2, axis)).all()
        assert np.isfinite(np.delete(result, 2, axis)).all()
    assert np.isnan(gx).all()  # every pixel lies in some window


def test_second_derivatives_are_those_of_the_chain():
    arrays = [a.astype("d") for a in inputs(outputs=3)]

    def second(family):
        with use_kernels(family):
            x, k, *rest = (tg.tensor(a, requires_grad=True) for a in arrays)
            y = conv_block(x, k, *rest, eps=1e-2, pool=2, **PLAIN)
            u = tg.tensor(np.random.default_rng(1).normal(size=y.shape))
            first = tg.grad(y, (x, k), u, create_graph=True)
            return tg.grad(sum((f * f).sum() for f in first), (x, k, rest[1]))

    for served, defined in zip(second("cuda"), second("generic"), strict=True):
        scale = max(np.abs(defined.numpy()).max(), 1)
        assert np.abs(served.numpy() - defined.numpy()).max() < 1e-9 * scale


@pytest.mark.parametrize(
    "change",
    [
        lambda a: [a[0].astype("d"), *a[1:]],
        lambda a: [a[0].astype("e"), a[1].astype("e"), *a[2:]],
        lambda a: [a[0][:0], *a[1:]],
        lambda a: [a[0], a[1], a[2], a[3].astype(int), a[4]],
        lambda a: [a[0][:1, :, :3, :2], *a[1:]],
    ],
    ids=["mixed dtypes", "float16", "an empty batch", "integers", "a single value"],
)
def test_it_declines_what_it_is_not_made_for(change):
    with use_kernels("cuda"):
        assert conv_block.served(*change(inputs()), eps=1e-2, pool=None, **PLAIN) is NotImplemented


def test_it_declines_windows_that_a_byte_cannot_number():
    x = np.ones((1, 1, 16, 16), "f")
    with use_kernels("cuda"):
        call = (x, np.ones((1, 1, 1, 1), "f"))
        assert conv_block.served(*call, eps=1.0, pool=16, **PLAIN) is NotImplemented
        assert conv_block.served(*call, eps=1.0, pool=15, **PLAIN) is not NotImplemented


def test_layers_in_a_row_are_served(served):
    tg.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    x = tg.tensor(np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype("f"))
    before = len(served.launched)
    y = model(x)
    names = [name for name, *_ in served.launched[before:]]
    assert names == ["convolve", "forward_sums", "channel_moments", "activate", "move_statistics"]
    means = model[1].running_mean.numpy().copy()
    model[1].reset_running_stats()
    with use_kernels("generic"):
        np.testing.assert_allclose(model(x).numpy(), y.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(model[1].running_mean.numpy(), means, rtol=0, atol=1e-6)
