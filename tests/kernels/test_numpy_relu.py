"""The NumPy kernel of ReLU against the generic form."""

import numpy as np
import pytest

from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import numpy_relu
from tinygrad_bn.ops.elementwise import relu

(rule,) = (r.function for r in relu.rules)
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 1.0]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(numpy_relu, "SMALLEST", 1)
    monkeypatch.setattr(numpy_relu, "PIECE", 5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_kernel_gives_the_generic_bits(dtype, order):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 4, 3, 7))
    x.reshape(-1)[:8], g.reshape(-1)[3:11] = SPECIAL, SPECIAL
    with np.errstate(over="ignore", under="ignore"):
        x, g = (a.astype(dtype).transpose(order) for a in (x, g))
    with use_kernels("generic"):
        expected = relu(x)
    out = numpy_relu.forward(x)
    np.testing.assert_array_equal(out, expected)
    (gx,) = numpy_relu.vjp(g, out)
    np.testing.assert_array_equal(gx, rule(g, expected)[0])
    assert out.dtype == gx.dtype == dtype
    assert out.strides == x.strides


def test_what_it_cannot_do_in_one_sweep_is_declined():
    x = np.ones((4, 6), np.float32)
    assert numpy_relu.forward(x[:, ::2]) is NotImplemented
    assert numpy_relu.forward(x.astype(np.int64)) is NotImplemented
    assert numpy_relu.vjp(x.T.copy().T, x) is NotImplemented  # g lies otherwise in memory
    assert numpy_relu.vjp(x.astype(np.float64), x) is NotImplemented
