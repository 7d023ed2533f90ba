"""Matrix products through BLAS: what cuBLAS is asked for is what NumPy's rules say.

A BLAS in Python takes the place of cuBLAS. It reads memory as cuBLAS does, so that a mistake with
rows and columns, strides or leading dimensions gives other numbers.
"""

import ctypes
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.kernels.cuda.shim import ShimRuntime, on_cuda_kernels
from tinygrad_bn.backend.precision import tf32_is_allowed
from tinygrad_bn.kernels.cuda import blas, launch, matmul
from tinygrad_bn.ops import convolution
from tinygrad_bn.ops.linalg import matmul as matmul_op
from tinygrad_bn.testing import check_double_grad, check_grad

#: Rounding of sums of at most 5 products, by dtype.
TOLERANCE = {"float64": 1e-14, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}

sizes = st.integers(1, 5)


@pytest.fixture
def runtime():
    made = ShimRuntime()
    with on_cuda_kernels(made):
        yield made


@st.composite
def stacks(draw):
    """Draw the shapes of two stacks of matrices, or vectors, that can be multiplied."""
    n, k, m = draw(sizes), draw(sizes), draw(sizes)
    together = draw(st.lists(st.integers(1, 3), max_size=3))

    def stack():
        kept = together[draw(st.integers(0, len(together))) :]
        return [size if draw(st.booleans()) else 1 for size in kept]

    x = (k,) if draw(st.integers(0, 4)) == 0 else (*stack(), n, k)
    y = (k,) if draw(st.integers(0, 4)) == 0 else (*stack(), k, m)
    return x, y


def laid_out(rng, shape, layout, dtype):
    """Return random numbers of this shape: in C order, transposed, with gaps, or backwards."""
    order = list(range(len(shape)))
    if layout == "transposed" and len(shape) > 1:
        order[-2:] = order[-1], order[-2]
    elif layout == "mixed":
        order = list(rng.permutation(len(shape)))
    step = 2 if layout == "gaps" else -1 if layout == "backwards" else 1
    made = [shape[axis] * abs(step) for axis in order]
    array = rng.normal(size=made).astype(tg.Tensor([0.0], dtype=dtype).dtype)
    array = array[tuple(slice(None, None, step) for _ in made)]
    return array.transpose(np.argsort(order)) if shape else array


LAYOUTS = ["c", "transposed", "mixed", "gaps", "backwards", "last even"]


@given(
    stacks(),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(list(TOLERANCE)),
    st.integers(0, 2**32),
)
def test_products_are_those_of_numpy(shapes, first, second, dtype, seed):
    rng = np.random.default_rng(seed)
    x, y = laid_out(rng, shapes[0], first, dtype), laid_out(rng, shapes[1], second, dtype)
    runtime = ShimRuntime()
    with launch.use_runtime(runtime):
        got = matmul.forward(x, y)
    expected = x.astype("float64") @ y.astype("float64")
    assert got is not NotImplemented
    assert runtime.blas.products == 1
    assert got.dtype == x.dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(
        got.astype("float64"), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10
    )


def test_broadcast_views_are_read_in_place():
    runtime = ShimRuntime()
    x = np.broadcast_to(np.arange(6.0).reshape(2, 3), (4, 2, 3))
    y = np.arange(24.0).reshape(4, 3, 2)
    with launch.use_runtime(runtime):
        np.testing.assert_array_equal(matmul.forward(x, y), x @ y)
        row = np.broadcast_to(np.ones(1), (3, 4))
        np.testing.assert_array_equal(matmul.forward(row, np.eye(4)), np.ones((3, 4)))


def test_a_transpose_is_not_copied(runtime, monkeypatch):
    x, y = np.arange(6.0).reshape(3, 2), np.arange(12.0).reshape(3, 4)
    monkeypatch.setattr(np, "ascontiguousarray", None)
    np.testing.assert_array_equal(matmul_op(x.T, y), x.T @ y)


DECLINED = {
    "integers": (np.ones((2, 2), int), np.ones((2, 2), int)),
    "nothing to add up": (np.ones((2, 0)), np.ones((0, 2))),
    "no rows": (np.ones((0, 2)), np.ones((2, 2))),
    "sizes that do not fit": (np.ones((2, 3)), np.ones((2, 3))),
    "stacks that do not broadcast": (np.ones((2, 1, 3)), np.ones((3, 3, 1))),
    "a scalar": (np.ones(()), np.ones((2, 2))),
    "complex numbers": (np.ones((2, 2), complex), np.ones((2, 2))),
}


@pytest.mark.parametrize(("x", "y"), DECLINED.values(), ids=DECLINED)
def test_declines(x, y):
    with launch.use_runtime(ShimRuntime()):
        assert matmul.forward(x, y) is NotImplemented


def test_mixed_dtypes_are_promoted(runtime):
    got = matmul_op(np.ones((2, 3), "float32"), np.ones((3, 2)))
    assert got.dtype == np.float64
    assert runtime.blas.products == 1


def test_gradients(runtime):
    rng = np.random.default_rng(0)
    for x, y in (((2, 3, 4), (4, 2)), ((3, 4), (2, 4, 3)), ((4,), (4, 2)), ((2, 3, 4), (2, 4, 1))):
        check_grad(tg.matmul, rng.normal(size=x), rng.normal(size=y))
        check_double_grad(tg.matmul, rng.normal(size=x), rng.normal(size=y))
    assert runtime.blas.products > 8


def test_convolution_in_its_generic_form_multiplies_through_the_op(runtime):
    # Under capture CuPy's own product would be refused.
    x, weight = np.ones((2, 3, 5, 5)), np.ones((4, 3, 2, 2))
    made = convolution.conv2d.forward(x, weight)
    y, view = made.out, made.residuals["view"]
    assert runtime.blas.products == 4
    convolution.conv2d_input_grad.forward(y, weight, view=view)
    convolution.conv2d_weight_grad.forward(x, y, view=view)
    assert runtime.blas.products == 12


# --- the call of the C function ------------------------------------------------------------------


class Recorded:
    """Stands where the C library does, and keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def function(*arguments):
            self.calls.append((name, arguments))
            return 0

        return function


@pytest.mark.parametrize(
    ("dtype", "tf32", "real", "compute"),
    [
        ("float32", False, 0, 68),
        ("float32", True, 0, 77),
        ("float64", True, 1, 70),
        ("float16", True, 2, 68),
        ("bfloat16", False, 14, 68),
    ],
)
def test_float32_is_true_float32_unless_tf32_is_asked_for(dtype, tf32, real, compute):
    made = object.__new__(blas.Cublas)
    made._library, made._handle = Recorded(), lambda: ctypes.c_void_p(7)
    a, b, c = (blas.Matrices(1000 * i, i == 1, 10 * i, 100 * i) for i in (1, 2, 3))
    with tg.allow_tf32(tf32):
        made.multiply(dtype, (4, 5, 6, 2), a, b, c)
    ((name, given),) = made._library.calls
    assert name == "cublasGemmStridedBatchedEx_64"
    one, zero = given[6], given[15]
    assert (one.contents.value, zero.contents.value) == (1.0, 0.0)
    assert [g for i, g in enumerate(given) if i not in (0, 6, 15)] == [
        *(1, 0, 4, 5, 6),
        *(1000, real, 10, 100),
        *(2000, real, 20, 200),
        *(3000, real, 30, 300),
        *(2, compute, -1),
    ]


def test_the_types_fit_the_calls():
    # ctypes converts by the declared types: a call with as many arguments, of kinds that fit.
    class Library:
        def __init__(self):
            self.functions = {}

        def __getattr__(self, name):
            if name not in self.functions:
                count = 23 if "Gemm" in name else 3
                prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * count)
                self.functions[name] = prototype(lambda *arguments: 0)
            return self.functions[name]

    library = Library()
    blas.declare(library)
    made = object.__new__(blas.Cublas)
    assert len(library.cublasGemmStridedBatchedEx_64.argtypes) == 23
    made._library, made._handle = Recorded(), lambda: ctypes.c_void_p(7)
    made.multiply("float32", (1, 1, 1, 1), *[blas.Matrices(8, False, 1, 1)] * 3)
    ((_, given),) = made._library.calls
    for type_, value in zip(library.cublasGemmStridedBatchedEx_64.argtypes, given, strict=True):
        type_.from_param(value)


def test_cupy_loads_cublas_before_it_is_asked_for_by_its_bare_name(monkeypatch):
    # From NVIDIA's wheels it can be loaded no other way than CuPy's.
    class Cuda:
        runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 13020)

        @property
        def cublas(self):
            seen.append("CuPy loads it")

    seen = []
    monkeypatch.setattr(ctypes, "PyDLL", lambda name: seen.append(name) or Recorded())
    monkeypatch.setattr(blas, "declare", lambda library: None)
    blas._load(types.SimpleNamespace(cuda=Cuda()))
    assert seen == ["CuPy loads it", "libcublas.so.13"]


def test_tf32_is_asked_for_by_the_environment_or_a_context(monkeypatch):
    monkeypatch.delenv("TINYGRAD_BN_TF32", raising=False)
    assert not tf32_is_allowed()
    for value, allowed in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("TINYGRAD_BN_TF32", value)
        assert tf32_is_allowed() is allowed
        with tg.allow_tf32(not allowed):
            assert tf32_is_allowed() is not allowed
