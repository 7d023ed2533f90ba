"""BLAS on host memory, given what cuBLAS is given: addresses, columns, leading dimensions."""

import ctypes

import numpy as np

from tinygrad_bn.backend import as_dtype


def seen(matrices, rows, columns, count, dtype):
    """Return a stack of matrices as BLAS reads memory: (count, rows, columns), a view."""
    rows, columns = (columns, rows) if matrices.transposed else (rows, columns)
    assert matrices.leading >= max(1, rows), "cuBLAS refuses this leading dimension"
    assert matrices.stride >= 0
    size = dtype.itemsize
    length = (count - 1) * matrices.stride + (columns - 1) * matrices.leading + rows
    memory = (ctypes.c_char * (length * size)).from_address(matrices.address)
    flat = np.frombuffer(memory, dtype)
    strides = (matrices.stride * size, size, matrices.leading * size)
    array = np.lib.stride_tricks.as_strided(flat, (count, rows, columns), strides)
    return array.transpose(0, 2, 1) if matrices.transposed else array


class FakeBlas:
    """A `Blas` for NumPy's arrays; `products` counts how often it was asked."""

    def __init__(self):
        self.products = 0

    def multiply(self, dtype, sizes, a, b, c):
        rows, columns, inner, count = sizes
        dtype = as_dtype(dtype)
        wide = np.float64 if dtype == np.float64 else np.float32
        left = seen(a, rows, inner, count, dtype).astype(wide)
        right = seen(b, inner, columns, count, dtype).astype(wide)
        assert not c.transposed
        seen(c, rows, columns, count, dtype)[...] = (left @ right).astype(dtype)
        self.products += 1
