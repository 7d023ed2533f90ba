"""Half precision in compiled loops, which take it as the integers in which its bits are stored.

On a CPU Numba knows neither float16 nor bfloat16. So loops are given float16 as int16 and bfloat16
as uint16 (`stored`), and every entry goes through two functions, which leave float32 and float64 as
they are:

    widened(x)              a stored entry as the number it is, float32
    narrowed(value, x)      a number as the entry of x's kind that is nearest, ties to even

A bfloat16 is the upper half of a float32. For float16, x86 has had instructions since 2012 (F16C).
"""

from __future__ import annotations

import importlib
import platform
from functools import cache
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import Lowered, usable

Array = Any

_HALF, _BRAIN = np.dtype(np.int16), np.dtype(np.uint16)
# What is added to the bits of a float32 before the lower half is dropped, besides the upper's last.
_NEARLY_HALF = 0x7FFF
_NAN = 0x7FC0


def stored(x: Array) -> Array:
    """Return x as loops take it: a view, or x itself in float32 and float64."""
    if x.dtype.itemsize > 2:
        return x
    return x.view(_HALF if x.dtype == np.float16 else _BRAIN)


def loops_take(dtype: np.dtype) -> bool:
    """Return whether there is Numba, and an instruction by which this machine converts `dtype`."""
    return usable() and _convertible(dtype)


@cache
def _convertible(dtype: np.dtype) -> bool:
    if dtype != np.float16 or platform.machine().lower() in ("arm64", "aarch64"):
        return True
    # Without it, LLVM would call a library, which may not be there.
    binding = importlib.import_module("llvmlite.binding")
    return bool(binding.get_host_cpu_features().get("f16c"))


def _make_widened(numba: Any) -> Any:
    types, ir = numba.types, importlib.import_module("llvmlite.ir")

    def same(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    def half(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    def brain(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.zext(args[0], ir.IntType(32))
        upper = builder.shl(bits, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(upper, ir.FloatType())

    def widened(context: Any, x: Any) -> Any:
        if isinstance(x, types.Float):
            return x(x), same
        return types.float32(x), half if x == types.int16 else brain

    return numba.extending.intrinsic(widened)


def _make_narrowed(numba: Any) -> Any:
    types, ir = numba.types, importlib.import_module("llvmlite.ir")
    int16, int32 = ir.IntType(16), ir.IntType(32)

    def cast(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], signature.args[0], signature.return_type)

    def half(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), int16)

    def brain(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], int32)
        upper = builder.lshr(bits, int32(16))
        even = builder.add(int32(_NEARLY_HALF), builder.and_(upper, int32(1)))
        rounded = builder.lshr(builder.add(bits, even), int32(16))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(nan, int32(_NAN), rounded), int16)

    def narrowed(context: Any, value: Any, x: Any) -> Any:
        if isinstance(x, types.Float):
            return x(value, x), cast
        return x(types.float32, x), half if x == types.int16 else brain

    return numba.extending.intrinsic(narrowed)


def _widen(x: Any) -> Any:
    if isinstance(x, np.int16):
        return np.float32(x.view(np.float16))
    return (np.uint32(x) << np.uint32(16)).view(np.float32) if isinstance(x, np.uint16) else x


def _narrow(value: Any, x: Any) -> Any:
    if isinstance(x, np.int16):
        return np.float16(value).view(np.int16)
    if not isinstance(x, np.uint16):
        return type(x)(value)
    bits = int(np.float32(value).view(np.uint32))
    return np.uint16(_NAN if value != value else (bits + _NEARLY_HALF + (bits >> 16 & 1)) >> 16)


widened = Lowered(_widen, _make_widened)
narrowed = Lowered(_narrow, _make_narrowed)
