"""Batch norm on the published list of inputs on which batch norm goes wrong, by every family."""

from dataclasses import replace

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.testing.hard_cases import BOUNDS, hard_case, hard_cases

CASES = [pytest.param(dtype, c, id=c.name) for dtype in BOUNDS for c in hard_cases(dtype)]


@pytest.fixture(params=["generic", "numpy", "numba"])
def family(request):
    status = tg.kernel_status()["batch_norm"].get(request.param, "has no kernels")
    if request.param != "generic" and status != "usable":
        pytest.skip(f"{request.param}: {status}")
    with use_kernels(request.param):
        yield request.param


def run(case, function=F.batch_norm):
    """Return y and the gradients of x, weight and bias, by the names that errors have."""
    x, weight, bias, g = case.inputs()
    leaves = [tg.Tensor(a, requires_grad=True) for a in (x, weight, bias)]
    # Where an entry of the right answer overflows, NumPy's cast in the generic form warns of it.
    with np.errstate(over="ignore", invalid="ignore"):
        y = function(
            leaves[0],
            weight=leaves[1],
            bias=leaves[2],
            training=True,
            eps=case.eps,
            axis=case.axis,
        )
        y.backward(tg.Tensor(g))
    assert y.dtype == leaves[0].grad.dtype == x.dtype
    gx, gweight, gbias = (leaf.grad.numpy() for leaf in leaves)
    return {"y": y.numpy(), "gx": gx, "gweight": gweight, "gbias": gbias}


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_errors_are_within_the_bound_of_the_dtype(family, dtype, case):
    if family == "generic" and case.repeats > 1:
        case = replace(case, repeats=1000)  # all, in float64, would take gigabytes
    found = case.errors(**run(case))
    assert max(found.values()) <= BOUNDS[dtype], found


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_with_relu_errors_are_within_the_bound_too(family, dtype, case):
    case = replace(case, repeats=min(case.repeats, 1000))
    want = case.expected()
    # Where y is 0 but for rounding, either side is right: no cotangent comes from there.
    near = np.abs(want.y) <= BOUNDS[dtype] * want.scales["y"]
    case = replace(case, g=np.where(near, 0, case.g).astype(case.g.dtype))
    found = run(case, F.batch_norm_relu)
    y = found["y"]
    assert ((y >= 0) | np.isnan(y)).all()
    right = replace(case, g=np.where(want.y > 0, case.g, 0).astype(case.g.dtype))
    # What ReLU has cut off is taken for right where it had to be cut off.
    cut = np.tile(np.minimum(want.y, 0), (case.repeats,) + (1,) * (want.y.ndim - 1))
    found["y"] = np.where(y == 0, cut.astype(y.dtype), y)
    errors = right.errors(**found)
    assert max(errors.values()) <= BOUNDS[dtype], errors


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_with_a_mask_over_as_many_nan_errors_are_within_the_bound_too(family, dtype, case):
    case = replace(case, repeats=min(case.repeats, 1000))

    def masked(x, **options):
        # Each sample is followed by one of NaN, which does not count and takes no cotangent.
        rows, shape = len(x), x.shape[1:]
        both = tg.stack([x, tg.full(x.shape, np.nan, dtype=x.dtype)], axis=1)
        mask = np.tile([3, 0], rows).reshape(-1, *[1] * len(shape))
        y = F.batch_norm(both.reshape((2 * rows, *shape)), mask=mask, **options)
        return y.reshape((rows, 2, *shape))[:, 0]

    found = case.errors(**run(case, masked))
    assert max(found.values()) <= BOUNDS[dtype], found


@pytest.mark.parametrize("case", [*hard_cases("float16")], ids=lambda case: case.name)
def test_float16_is_float32_work_rounded_once(family, case):
    found, want = run(case), case.expected()
    for key in ("y", "gx"):
        right = getattr(want, key)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = right.astype(np.float16)
            half_unit = np.spacing(np.abs(rounded)).astype(np.float64) / 2
            error = np.abs(found[key] - right)
            # 1e-5 of the scale is the bound for float32, which is what is rounded.
            fine = error <= half_unit + 1e-5 * want.scales[key]
        same = (found[key] == rounded) | (np.isnan(found[key]) & np.isnan(rounded))
        assert (fine | same).all(), key
    if "overflows" in case.name:
        infinite = np.isinf(found["gx"])
        assert 0.2 < infinite.mean() < 0.5


def test_a_constant_channel_gives_beta_and_the_gradient_of_epsilon_alone(family):
    for text in ("0.1", "10⁴", "10⁷", "10¹⁰"):
        case = hard_case(f"constant {text}")
        found = run(case)
        weight, bias = case.weight[:, None, None], case.bias[:, None, None]
        assert (found["y"] == bias).all() and (found["gweight"] == 0).all()
        g = case.g.astype(np.float64)
        right = weight * (g - g.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(case.eps)
        # Largest |γ g / √ε| is about 2,000.
        np.testing.assert_allclose(found["gx"], right, rtol=1e-5, atol=1e-3)


def test_a_running_variance_beyond_its_dtype_is_the_largest_there_is(family):
    case = hard_case("magnitude 10³⁰")
    mean, var = np.zeros(4, np.float32), np.ones(4, np.float32)
    for _ in range(3):
        F.batch_norm(case.x, mean, var, training=True)
        assert (var == np.finfo(np.float32).max).all() and np.isfinite(mean).all()
    F.batch_norm(np.ones((2, 4), np.float32) * np.array([[0], [2]]), mean, var, training=True)
    assert (var < np.finfo(np.float32).max).all()  # it comes down again
