"""The NumPy kernel of matrix products against NumPy's own."""

import numpy as np
import pytest

from tinygrad_bn.kernels.cpu import numpy_matmul


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "k", "m"), [(7, 5, 3), (1, 4, 6), (0, 3, 2), (3, 0, 2), (64, 33, 20)]
)
def test_the_kernel_is_the_product(monkeypatch, dtype, n, k, m):
    monkeypatch.setattr(numpy_matmul, "SMALLEST", 0)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, k)).astype(dtype), rng.standard_normal((k, m)).astype(dtype)
    for left, right in ((x, y), (x.T.copy().T, y), (x, y.T.copy().T), (x[::-1], y[:, ::-1])):
        out = numpy_matmul.forward(left, right)
        assert out.dtype == dtype
        # Sums of k terms of size 1, in another order than NumPy's.
        np.testing.assert_allclose(out, left @ right, rtol=0, atol=k * 10 * np.finfo(dtype).eps)


def test_what_is_small_or_no_pair_of_like_matrices_is_declined():
    x = np.ones((64, 64))
    assert numpy_matmul.forward(x[:8], x) is NotImplemented
    for left, right in ((x, x[0]), (x[None], x), (x, x.astype("float32")), (x.astype(int),) * 2):
        assert numpy_matmul.forward(left, right) is NotImplemented
    assert numpy_matmul.forward(x, x[:3]) is NotImplemented  # NumPy says what is wrong
