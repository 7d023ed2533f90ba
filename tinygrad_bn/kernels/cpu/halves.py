"""float16 and bfloat16 to float32 and back, a block at a time, by operations that NumPy vectorizes.

Kernels compute half precision in float32, one block in cache after another. NumPy casts float16
entry by entry: 2 ns to widen one and 4 ns to narrow one, several times what batch norm itself
costs. On the bits, viewed as integers, the same takes a handful of vectorized passes:

- Widening. A float16 is s eeeee m₁₀, a float32 s eeeeeeee m₂₃. Bits shifted by 13 are the float32
  of an exponent too small by 112, which one product with 2¹¹² corrects, subnormals included.
- Narrowing. Adding 1.5 · 2¹³ times the power of two below |x|, and subtracting it, makes the
  adder of float32 round at the bit where float16 ends, to nearest and ties to even; for subnormals
  that bit is fixed. What is left is exact, and goes the way back.

bfloat16 is the upper half of a float32, and ml_dtypes casts it fast enough.
"""

from __future__ import annotations

import sys

import numpy as np

from tinygrad_bn.kernels.cpu import threads

Array = np.ndarray

_EXPONENT, _SIGN = np.int32(0x7F800000), np.int16(-0x8000)
_UP, _DOWN = np.float32(2.0**112), np.float32(2.0**-112)
_SMALLEST_NORMAL, _LARGE = np.float32(2.0**-14), np.float32(2.0**15)
_ADDER = np.int32((13 << 23) + (1 << 22))  # to the bits of 2ᵉ: 1.5 · 2ᵉ⁺¹³
_UPPER = 1 if sys.byteorder == "little" else 0  # which half of a float32 has the sign


def work_dtype(dtype: np.dtype) -> np.dtype | None:
    """Return the dtype in which kernels compute `dtype`; None for one that they do not serve."""
    if dtype.kind == "f" and dtype.itemsize <= 8:
        return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)
    return np.dtype(np.float32) if dtype.name == "bfloat16" else None


def widen(block: Array, name: str) -> Array:
    """Return `block` in its work dtype: itself, or a copy in this thread's scratch of that name."""
    if block.dtype.itemsize > 2:
        return block
    out = threads.scratch(name, block.shape, np.float32)
    if block.dtype != np.float16:
        out[...] = block
        return out
    bits = out.view(np.int32)
    bits[...] = block.view(np.int16)  # fills the upper bits with the sign
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # the sign, and what was shifted
    np.multiply(out, _UP, out=out)
    if out.max(initial=0) >= 2**16 or out.min(initial=0) <= -(2**16):
        out[...] = block  # infinity and NaN have an exponent of their own
    return out


def narrow(work: Array, out: Array) -> None:
    """Write `work` rounded to the dtype of `out` into it; `work` may be overwritten.

    work: contiguous, in the work dtype of `out`. Both may be the same.
    """
    if work is out:
        return
    if out.dtype != np.float16:
        np.copyto(out, work, casting="unsafe")
        return
    adder = threads.scratch("narrow", work.shape, np.float32)
    bits = adder.view(np.int32)
    np.bitwise_and(work.view(np.int32), _EXPONENT, out=bits)
    if not adder.max(initial=0) < _LARGE:  # may round to infinity, or is that or NaN
        np.copyto(out, work, casting="unsafe")
        return
    upper = work.view(np.int16).reshape(*work.shape, 2)[..., _UPPER]
    half = out.view(np.int16)
    sign = threads.scratch("sign", work.shape, np.int16)
    np.copyto(sign, upper)
    np.bitwise_and(sign, _SIGN, out=sign)
    np.maximum(adder, _SMALLEST_NORMAL, out=adder)
    np.add(bits, _ADDER, out=bits)
    np.add(work, adder, out=work)
    np.subtract(work, adder, out=work)
    np.multiply(work, _DOWN, out=work)
    np.right_shift(work.view(np.int32), 13, out=bits)
    np.copyto(half, bits, casting="unsafe")  # without the sign, which went with the upper bits
    np.bitwise_or(half, sign, out=half)
