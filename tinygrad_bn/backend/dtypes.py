"""Questions about dtypes, so that the floors above need not import NumPy."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

float32 = np.dtype(np.float32)
float64 = np.dtype(np.float64)
int64 = np.dtype(np.int64)


@lru_cache(maxsize=256)
def as_dtype(dtype: Any) -> np.dtype:
    """Return `dtype` (a name, a NumPy type or a dtype) as a dtype; TypeError if it is none.

    `"bfloat16"` is understood where the package `ml_dtypes` is installed.
    """
    try:
        return np.dtype(dtype)
    except TypeError:
        if dtype == "bfloat16":
            return _bfloat16()
        raise TypeError(
            f"as_dtype: {dtype!r} names no dtype; use for example 'float32', 'float64' or 'int64'"
        ) from None


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise TypeError(
            "as_dtype: 'bfloat16' needs the package ml_dtypes: pip install ml_dtypes"
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def is_floating(dtype: np.dtype) -> bool:
    """Return whether `dtype` is a real floating type: the only ones that carry gradients."""
    # ml_dtypes' bfloat16 reports kind 'V', so its kind alone does not tell.
    kind = dtype.kind
    return kind == "f" or (kind == "V" and dtype.name == "bfloat16")


@lru_cache(maxsize=256)
def accumulation_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype in which sums over `dtype` are kept: at least float64."""
    return np.result_type(dtype, np.float64) if dtype.name != "bfloat16" else float64


def sum_dtype(x: Any, axes: tuple[int, ...], few: int = 128) -> np.dtype | None:
    """Return the dtype in which to add up `x`, an array, over `axes`: float64 where its own would
    lose digits or overflow, and None where its own will do.

    few: fewer numbers than this may be added up one by one in float32.

    NumPy adds one by one unless the last axis is reduced: float32 ones of shape (20_000_000, 2)
    would add up to 16_777_216, and float16 ones to 2048. Half precision ends at 65_504, which a sum
    passes long before its mean does.
    """
    in_pairs = x.ndim - 1 in axes or math.prod(x.shape[a] for a in axes) < few
    if not is_floating(x.dtype) or (in_pairs and x.dtype.itemsize >= 4):
        return None
    return accumulation_dtype(x.dtype)


def machine_epsilon(dtype: np.dtype) -> float:
    """Return the distance from 1 to the next larger number of `dtype`.

    >>> machine_epsilon(float32)
    1.1920928955078125e-07
    """
    if dtype.name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(dtype).eps)


@lru_cache(maxsize=256)
def largest(dtype: np.dtype) -> float:
    """Return the largest finite number of `dtype`.

    >>> largest(float32)
    3.40282347e+38
    """
    if dtype.name == "bfloat16":
        return (2 - 2.0**-7) * 2.0**127
    return float(np.finfo(dtype).max)
