"""The CUDA kernels of the cross-entropy and of ReLU, run on the CPU, against the generic ops."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_bn as tg
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import cross_entropy as kernel
from tinygrad_bn.kernels.cuda import relu as relu_kernel
from tinygrad_bn.ops.elementwise import relu
from tinygrad_bn.ops.loss import cross_entropy
from tinygrad_bn.testing import check_double_grad, check_grad

pytestmark = pytest.mark.usefixtures("served")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: Some roundings of numbers of size 1 to 10; of half precision, one of the result.
TOLERANCE = {"float32": 3e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 2e-2}
DTYPES = st.sampled_from(["float32", "float64", "float16", BFLOAT16])
(rule,) = (r.function for r in cross_entropy.rules)


@pytest.fixture(autouse=True, scope="module")
def several_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "THREADS", 64)
        patch.setattr(relu_kernel, "THREADS", 32)
        yield


@st.composite
def losses(draw, dtype):
    """Draw logits, a target of labels or probabilities, and how losses are put together."""
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 70)), *draw(st.sampled_from(TAILS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=shape) * draw(st.sampled_from([1.0, 5.0]))
    if draw(st.booleans()):
        integer = draw(st.sampled_from(["int64", "int32", "int16", "int8", "uint8", "uint64"]))
        target = rng.integers(0, shape[1], (shape[0], *shape[2:])).astype(integer)
    else:
        target = (rng.uniform(size=shape) * (rng.uniform(size=shape) > 0.3)).astype(dtype)
    return logits.astype(dtype), target, draw(st.sampled_from(["mean", "sum", "none"]))


TAILS = [(), (1,), (5,), (2, 3)]


@given(data=st.data(), dtype=DTYPES)
def test_losses_and_gradients_are_those_of_the_generic_form(data, dtype):
    logits, target, reduction = data.draw(losses(dtype))
    with use_kernels("generic"):
        want, saved = cross_entropy.call_with_residuals(logits, target, reduction=reduction)
    result = kernel.forward(logits, target, reduction=reduction)
    name = logits.dtype.name
    wide = np.float64
    agree = {"rtol": TOLERANCE[name], "atol": TOLERANCE[name] * 10}
    assert result.out.dtype == want.dtype
    assert result.out.shape == want.shape
    np.testing.assert_allclose(result.out.astype(wide), want.astype(wide), **agree)
    logs = result.residuals["logs"]
    assert logs.dtype == saved["logs"].dtype
    np.testing.assert_allclose(logs, saved["logs"], **agree)
    g = np.random.default_rng(1).normal(size=want.shape).astype(want.dtype)
    needs = (True, target.dtype.kind not in "iu")
    call = (g, logits, target)
    got = kernel.vjp(*call, logs, reduction, needs)
    for ours, right in zip(got, rule(*call, saved["logs"], reduction, needs), strict=True):
        assert (ours is None) == (right is None)
        if ours is not None:
            assert ours.dtype == logits.dtype
            # Where g / count is rounded to half precision, the generic form's error is the larger.
            np.testing.assert_allclose(ours.astype(wide), right.astype(wide), **agree)


def test_a_mean_of_many_losses_in_blocks_is_exact_to_float32():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3000, 10)).astype("f")
    labels = rng.integers(0, 10, 3000)
    wide = logits.astype("d")
    want = (np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(3000), labels]).mean()
    assert abs(kernel.forward(logits, labels).out - want) < 2e-7 * want


@pytest.mark.parametrize("tail", TAILS)
def test_impossible_classes_and_huge_logits(tail):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, *tail)).astype("f")
    logits[0, 2] = -np.inf
    logits[1, 1], logits[1, 3] = 3e38, -3e38
    logits[2] = 1e4
    target = np.zeros((4, *tail), int)
    target[1] = 1
    hot = np.zeros_like(logits)
    hot[:, 0] = 1  # 0 where the class is impossible: contributes 0
    for given_ in (target, hot):
        with use_kernels("generic"), np.errstate(over="ignore"):
            want = cross_entropy(logits, given_, reduction="none")
        got = kernel.forward(logits, given_, reduction="none").out
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_nan_stays_in_its_position(tail):
    logits = np.zeros((4, 5, *tail), "f")
    logits[1, 2], logits[2, 0], logits[3] = np.nan, np.inf, -np.inf
    result = kernel.forward(logits, np.zeros((4, *tail), int), reduction="none")
    assert np.isnan(result.out[1:]).all() and np.isfinite(result.out[0]).all()


def test_a_label_out_of_range_is_nan_and_reads_nothing_beside(monkeypatch):
    monkeypatch.setattr(kernel, "extremes", lambda target: None)  # as on a GPU
    logits = np.zeros((5, 3), "f")
    for labels in (np.array([0, 3, -1, 2**40, 2]), np.array([0, 255, 3, 77, 2], np.uint8)):
        out = kernel.forward(logits, labels, reduction="none").out
        assert np.isfinite(out[[0, 4]]).all() and np.isnan(out[1:4]).all()
    with pytest.raises(ValueError, match="labels range from"):
        monkeypatch.undo()
        cross_entropy(logits, np.array([0, 3, 1, 1, 2]))


def test_gradients_through_the_op(served):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5, 2)), rng.integers(0, 5, (4, 2))
    before = len(served.launched)
    for reduction in ("mean", "sum", "none"):
        run = lambda x, r=reduction: cross_entropy(x, labels, reduction=r)  # noqa: E731
        check_grad(run, logits)
        check_double_grad(run, logits)
    names = {name for name, *_ in served.launched[before:]}
    assert names == {"log_likelihood", "total_loss", "likelihood_gradient"}


def test_what_the_kernels_leave_to_the_generic_form():
    x, labels = np.zeros((4, 3), "f"), np.zeros(4, int)
    assert kernel.forward(x, labels) is not NotImplemented
    assert kernel.forward(x[:0], labels[:0]) is NotImplemented
    assert kernel.forward(x.astype(int), labels) is NotImplemented
    assert kernel.forward(x, labels.astype(float)) is NotImplemented
    assert kernel.forward(x, labels[:2]) is NotImplemented
    assert kernel.forward(x, x.astype(np.float64)) is NotImplemented
    assert kernel.forward(x, labels, reduction="median") is NotImplemented
    assert kernel.forward(x, labels + 3) is NotImplemented
    assert kernel.vjp(np.ones(()), x, labels, x, "mean", (True, False)) is NotImplemented


# --- ReLU ----------------------------------------------------------------------------------------


@given(
    shape=hnp.array_shapes(min_dims=0, max_dims=4, max_side=9),
    dtype=DTYPES,
    layout=st.sampled_from(["c", "fortran", "gaps", "unaligned"]),
    seed=st.integers(0, 99),
)
def test_relu_is_that_of_the_generic_form_to_the_bit(shape, dtype, layout, seed):
    rng = np.random.default_rng(seed)
    values = [0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan]
    x, g = (np.asarray(rng.choice(values, size=shape)).astype(dtype) for _ in range(2))
    if layout == "fortran" and shape:
        x = np.asfortranarray(x)
    elif layout == "gaps":
        x = np.repeat(x[..., None], 2, axis=-1)[..., 0]
    elif layout == "unaligned":
        memory = np.empty(x.size + 1, x.dtype)[1:].reshape(shape)
        memory[...] = x
        x = memory
    y = relu_kernel.forward(x)
    with use_kernels("generic"), np.errstate(invalid="ignore"):
        want = relu.forward(x)
        right = np.where(want > 0, g, np.zeros((), g.dtype))
    (gx,) = relu_kernel.vjp(g, y)
    for got, correct in ((y, want), (gx, right)):
        assert got.dtype == x.dtype
        assert got.shape == shape
        np.testing.assert_array_equal(got.astype("d"), correct.astype("d"))


def test_relu_keeps_the_order_in_memory_and_declines_what_it_cannot_do(served):
    x = np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4)))
    assert relu_kernel.forward(x).strides == x.strides
    assert relu_kernel.forward(x.astype(int)) is NotImplemented
    assert relu_kernel.forward(x[:0]) is NotImplemented
    assert relu_kernel.vjp(x.astype("f"), x) is NotImplemented
    before = len(served.launched)
    check_grad(tg.functional.relu, x)
    assert {name for name, *_ in served.launched[before:]} == {"relu", "relu_gradient"}
