"""The compiled convolution block against its definition, a chain of ordinary ops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.ops.images import convolutions
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import conv_block_plan as driver
from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.ops.fused import conv_block

kernel = pytest.importorskip("tinygrad_bn.kernels.cpu.numba_conv_block")
pytest.importorskip("numba")

#: Sums of at most some hundred terms of size 1, in another order.
TOLERANCE = {"f": 3e-5, "d": 1e-11}
PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "layout": "NCHW"}


@pytest.fixture(autouse=True, params=[1, 3], ids=["one thread", "three threads"])
def many_threads(request, monkeypatch):
    monkeypatch.setattr(threads, "_count", request.param)


@pytest.fixture(autouse=True)
def serves_small(monkeypatch):
    monkeypatch.setattr(driver, "SMALLEST", 1)


@pytest.fixture(params=[1, 2**19], ids=["single images", "many at once"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(driver, "CHUNK_BYTES", request.param)


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
        assert (found["kept"] is not None) == (family == "numba")
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


@pytest.mark.usefixtures("chunk_bytes")
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
        both_ways("numba", arrays, pool=pool, **options),
        both_ways("generic", arrays, pool=pool, **options),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_cotangents_and_images_of_any_strides_are_served(layout):
    arrays = inputs(layout=layout)
    right = both_ways("numba", arrays, pool=2, layout=layout)
    g = np.random.default_rng(1).normal(size=right[0]["y"].shape).astype("f")
    for strided in (np.asfortranarray(g), np.repeat(g, 2, axis=-1)[..., ::2], g[::-1].copy()[::-1]):
        arrays[0] = np.asfortranarray(arrays[0])
        again = both_ways("numba", arrays, g=strided, pool=2, layout=layout)
        for a, b in zip(right[1], again[1], strict=True):
            np.testing.assert_array_equal(a, b)


def test_only_the_gradients_that_are_needed_are_computed():
    arrays = inputs()
    _, right, _ = both_ways("numba", arrays, pool=2)
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
    served, defined = (both_ways(family, arrays, pool=2) for family in ("numba", "generic"))
    agree(served, defined, TOLERANCE["f"])


def test_a_mean_far_larger_than_the_spread_costs_no_digits():
    # A kernel of one entry, 1 for its own channel: what the convolution gives is exact.
    x = (1e6 + np.random.default_rng(0).normal(size=(8, 3, 6, 6))).astype("f")
    kernel = np.eye(3, dtype="f").reshape(3, 3, 1, 1)
    arrays = [x, kernel, None, np.ones(3, "f"), np.zeros(3, "f")]
    served = both_ways("numba", arrays, pool=2)
    defined = both_ways("generic", [a if a is None else a.astype("d") for a in arrays], pool=2)
    gx, want = served[1][0], defined[1][0]
    # On the scales of batch norm: at most the 3 of y and dx here. The generic float32 rule and this
    # kernel are both within 1e-6; a mean rounded to float32 costs 3e-2.
    assert np.abs(served[0]["y"] - defined[0]["y"]).max() < 1e-5
    assert np.abs(gx - want).max() < 1e-5


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_float32_cannot_hold_is_left_to_the_ops(value):
    arrays = inputs()
    arrays[0][1, 0, 2, 2] = value
    with use_kernels("numba"):
        assert conv_block.served(*arrays, eps=1e-2, pool=2, **PLAIN) is NotImplemented


@pytest.mark.parametrize(
    "change",
    [
        lambda a: [a[0].astype("d"), *a[1:]],
        lambda a: [a[0].astype("e"), a[1].astype("e"), *a[2:]],
        lambda a: [a[0][:0], *a[1:]],
    ],
    ids=["mixed dtypes", "float16", "an empty batch"],
)
def test_it_declines_what_it_is_not_made_for(change):
    with use_kernels("numba"):
        assert conv_block.served(*change(inputs()), eps=1e-2, pool=2, **PLAIN) is NotImplemented


def test_second_derivatives_are_those_of_the_chain():
    arrays = [a.astype("d") for a in inputs()]

    def second(family):
        with use_kernels(family):
            x, k, *rest = (tg.tensor(a, requires_grad=True) for a in arrays)
            y = conv_block(x, k, *rest, eps=1e-2, pool=2, **PLAIN)
            u = tg.tensor(np.random.default_rng(1).normal(size=y.shape))
            first = tg.grad(y, (x, k), u, create_graph=True)
            return tg.grad(sum((f * f).sum() for f in first), (x, k, rest[1]))

    for served, defined in zip(second("numba"), second("generic"), strict=True):
        scale = max(np.abs(defined.numpy()).max(), 1)
        assert np.abs(served.numpy() - defined.numpy()).max() < 1e-9 * scale


def test_the_result_does_not_depend_on_which_thread_was_faster():
    arrays = inputs()
    first = both_ways("numba", arrays, pool=2)
    for _ in range(5):
        again = both_ways("numba", arrays, pool=2)
        np.testing.assert_array_equal(first[0]["y"], again[0]["y"])
        for a, b in zip(first[1], again[1], strict=True):
            np.testing.assert_array_equal(a, b)
