"""Matrix products by cuBLAS, through handles of our own.

CuPy's own wrapper refuses to run while a stream is capturing, and takes twice as long to call. A
handle belongs to one stream and has its workspace, so that a captured product allocates nothing and
products on different streams do not share memory.

The functions of the C library are called through ctypes, with the Python lock held: a handle may
not be used by two threads at once.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_longlong, c_size_t, c_void_p
from functools import cache
from typing import Any, NamedTuple, Protocol

from tinygrad_bn.backend.precision import tf32_is_allowed

# The numbers of cuBLAS's and CUDA's headers (cublas_api.h, library_types.h).
_NO_TRANSPOSE, _TRANSPOSE = 0, 1
_REAL = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77
_ALGORITHM_DEFAULT = -1
#: Half precision is to be added up in float32 throughout.
_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16

#: What NVIDIA recommends, from compute capability 9.0 on and before, in bytes.
_WORKSPACE, _WORKSPACE_BEFORE = 32 << 20, 4 << 20

SERVED = frozenset(_REAL)


class Matrices(NamedTuple):
    """A stack of matrices in memory, as BLAS sees it: column by column.

    address: of the first entry. transposed: whether what is wanted is the transpose of that.
    leading: entries from one column to the next. stride: entries from one matrix to the next.
    """

    address: int
    transposed: bool
    leading: int
    stride: int


class Blas(Protocol):
    """What multiplies stacks of matrices."""

    def multiply(
        self, dtype: str, sizes: tuple[int, int, int, int], a: Matrices, b: Matrices, c: Matrices
    ) -> None:
        """Begin c = a b on the current stream.

        sizes: rows and columns of c, the columns of a, and how many matrices there are.
        """
        ...


class Cublas:
    """cuBLAS, as the CUDA that CuPy runs on has it (a `Blas`)."""

    def __init__(self, cupy: Any):
        self._cupy = cupy
        self._library = _load(cupy)
        self._handles: dict[tuple[int, int], tuple[Any, Any]] = {}

    def multiply(
        self, dtype: str, sizes: tuple[int, int, int, int], a: Matrices, b: Matrices, c: Matrices
    ) -> None:
        """Begin c = a b on CuPy's current stream."""
        rows, columns, inner, count = sizes
        compute, one, zero = _computing(dtype, tf32_is_allowed())
        real = _REAL[dtype]
        status = self._library.cublasGemmStridedBatchedEx_64(
            self._handle(),
            _TRANSPOSE if a.transposed else _NO_TRANSPOSE,
            _TRANSPOSE if b.transposed else _NO_TRANSPOSE,
            rows,
            columns,
            inner,
            one,
            a.address,
            real,
            a.leading,
            a.stride,
            b.address,
            real,
            b.leading,
            b.stride,
            zero,
            c.address,
            real,
            c.leading,
            c.stride,
            count,
            compute,
            _ALGORITHM_DEFAULT,
        )
        _check(status, "cublasGemmStridedBatchedEx_64")

    def _handle(self) -> Any:
        """Return the handle of the current device and stream."""
        cuda = self._cupy.cuda
        key = cuda.runtime.getDevice(), cuda.get_current_stream().ptr
        if key not in self._handles:
            self._handles[key] = self._new_handle(key[1])
        return self._handles[key][0]

    def _new_handle(self, stream: int) -> tuple[Any, Any]:
        """Return a handle for `stream`, and the workspace to be kept with it."""
        capability = int(self._cupy.cuda.Device().compute_capability)
        size = _WORKSPACE if capability >= 90 else _WORKSPACE_BEFORE
        # Not from the current allocator: that of a recording has its memory for a while only.
        workspace = self._cupy.get_default_memory_pool().malloc(size)
        handle = c_void_p()
        library = self._library
        _check(library.cublasCreate_v2(ctypes.byref(handle)), "cublasCreate")
        # In this order: setting a stream takes the workspace away.
        _check(library.cublasSetStream_v2(handle, stream), "cublasSetStream")
        _check(library.cublasSetWorkspace_v2(handle, workspace.ptr, size), "cublasSetWorkspace")
        mode = _MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
        _check(library.cublasSetMathMode(handle, mode), "cublasSetMathMode")
        return handle, workspace


@cache
def _computing(dtype: str, tf32: bool) -> tuple[int, Any, Any]:
    """Return how to compute, and pointers to the factors 1 and 0 in that type."""
    if dtype == "float64":
        return _COMPUTE_64F, ctypes.pointer(c_double(1.0)), ctypes.pointer(c_double(0.0))
    compute = _COMPUTE_32F_FAST_TF32 if tf32 and dtype == "float32" else _COMPUTE_32F
    return compute, ctypes.pointer(c_float(1.0)), ctypes.pointer(c_float(0.0))


def _load(cupy: Any) -> Any:
    """Return the C library, the very one that CuPy uses, with the types of its functions."""
    # Looked up here, CuPy finds it in a wheel of NVIDIA's too; an import of the module behind this
    # would not. Once it is loaded, its bare name finds it.
    _ = cupy.cuda.cublas
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    windows = hasattr(ctypes, "WinDLL")
    library = ctypes.PyDLL(f"cublas64_{major}.dll" if windows else f"libcublas.so.{major}")
    declare(library)
    return library


def declare(library: Any) -> None:
    """Tell ctypes the types of the functions that are used."""
    for name, arguments in {
        "cublasCreate_v2": (c_void_p,),
        "cublasSetStream_v2": (c_void_p, c_void_p),
        "cublasSetWorkspace_v2": (c_void_p, c_void_p, c_size_t),
        "cublasSetMathMode": (c_void_p, c_int),
        "cublasGemmStridedBatchedEx_64": (
            c_void_p, c_int, c_int, c_int64, c_int64, c_int64,
            c_void_p, c_void_p, c_int, c_int64, c_longlong,
            c_void_p, c_int, c_int64, c_longlong,
            c_void_p, c_void_p, c_int, c_int64, c_longlong,
            c_int64, c_int, c_int,
        ),
    }.items():  # fmt: skip
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int


def _check(status: int, name: str) -> None:
    if status:
        raise RuntimeError(f"{name} failed with status {status} (cublasStatus_t)")
