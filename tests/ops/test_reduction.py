"""Sums that NumPy would form one by one keep their digits."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.ops.reduction import mean, sum, var


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sums_over_many_rows_are_rounded_once(dtype):
    # Added one by one in float32, two million times 0.1 is off in the third digit.
    x = np.full((2_000_000, 2), 0.01 if dtype == "float16" else 0.1, dtype)
    exact = x[0].astype("float64") * len(x)
    half_an_ulp = np.finfo(dtype).eps / 2
    np.testing.assert_allclose(sum(x, axis=0), exact, rtol=half_an_ulp)
    np.testing.assert_allclose(tg.Tensor(x).sum(axis=0).numpy(), exact, rtol=half_an_ulp)
    # The sum is rounded, and then the quotient.
    np.testing.assert_allclose(mean(x, axis=0), x[0], rtol=2 * half_an_ulp)
    assert sum(x, axis=0).dtype == dtype


def test_variance_of_many_rows_is_right():
    x = np.tile(np.array([[1.0], [3.0]], np.float32), (1_000_000, 2))
    np.testing.assert_allclose(var(x, axis=0), 1.0, rtol=1e-6)


def test_half_precision_holds_a_mean_whose_sum_or_count_it_cannot():
    x = tg.Tensor(np.full((100_000, 1), 200.0, np.float16), requires_grad=True)
    for axis in (None, 0, (0, 1)):
        assert (mean(x, axis=axis).numpy() == 200).all()
        assert (var(x * 2, axis=axis).numpy() == 0).all()
    # 2048 / 100_000 and not 2048 / inf
    (g,) = tg.grad(mean(x), x, np.float16(2048))
    assert (g.numpy() == np.float16(2048 / 100_000)).all()
    spread = tg.Tensor(np.tile(np.float16([[-300.0], [300.0]]), (50_000, 1)), requires_grad=True)
    (g,) = tg.grad(var(spread / 8), spread, np.float16(512))
    assert (g.numpy() == np.float16(512 * 2 * 37.5 / 8 / 100_000) * np.sign(spread.numpy())).all()
