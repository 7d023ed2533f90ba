"""New raw arrays: filled, counted, or random.

What has one value is made where it belongs; the rest is made on the host and moved there. Random
numbers are drawn as float64 and then rounded, so a seed gives the same numbers on every
device and, up to rounding, in every dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend.arrays import Array, backend_of
from tinygrad_bn.backend.devices import get_default_device, moved, new_on, to_device
from tinygrad_bn.backend.dtypes import as_dtype, float32, int64, is_floating, machine_epsilon
from tinygrad_bn.backend.random import generator

Shape = tuple[int, ...]


def empty(shape: Shape, dtype: Any, device: str | None) -> Array:
    """Return an array whose entries are whatever the memory holds."""
    dtype = as_dtype(dtype or float32)
    return new_on(_named(device), lambda xp: xp.empty(shape, dtype))


def full(shape: Shape, value: Any, dtype: Any, device: str | None) -> Array:
    """Return an array of `value`; without `dtype` a Python float gives float32."""
    if dtype is None and type(value) is float:
        dtype = float32
    dtype = None if dtype is None else as_dtype(dtype)
    return new_on(_named(device), lambda xp: xp.full(shape, value, dtype=dtype))


def arange(start: float, stop: float, step: float, dtype: Any, device: str | None) -> Array:
    """Return start, start + step, ... below stop; int64 for integers, otherwise float32."""
    if dtype is None:
        whole = all(isinstance(value, (int, np.integer)) for value in (start, stop, step))
        dtype = int64 if whole else float32
    # Counted in float64 or int64 and then rounded: a float32 step would drift.
    return _moved(np.arange(start, stop, step).astype(as_dtype(dtype)), device)


def linspace(start: float, stop: float, num: int, dtype: Any, device: str | None) -> Array:
    """Return `num` evenly spaced values from start to stop, both included."""
    return _moved(np.linspace(start, stop, num).astype(as_dtype(dtype or float32)), device)


def eye(n: int, m: int | None, dtype: Any, device: str | None) -> Array:
    """Return an (n, m) matrix with ones on its diagonal."""
    return _moved(np.eye(n, m, dtype=as_dtype(dtype or float32)), device)


def uniform(low: float, high: float, shape: Shape, dtype: Any, device: str | None) -> Array:
    """Return numbers drawn evenly from [low, high)."""
    dtype = _floating("rand", dtype)
    values = generator().random(shape)
    # Rounded to a narrower dtype, the numbers next to 1 would become 1.
    values = np.minimum(values, 1 - machine_epsilon(dtype) / 2)
    return _moved((low + (high - low) * values).astype(dtype), device)


def normal(mean: float, std: float, shape: Shape, dtype: Any, device: str | None) -> Array:
    """Return numbers drawn from the normal distribution."""
    dtype = _floating("randn", dtype)
    return _moved((mean + std * generator().standard_normal(shape)).astype(dtype), device)


def integers(low: int, high: int, shape: Shape, dtype: Any, device: str | None) -> Array:
    """Return integers drawn evenly from [low, high)."""
    values = generator().integers(low, high, shape)
    return _moved(np.asarray(values).astype(as_dtype(dtype or int64)), device)


def from_bytes(content: Any, dtype: Any, shape: Shape) -> np.ndarray:
    """Return little-endian bytes as an array on the host that owns its memory."""
    stored = as_dtype(dtype).newbyteorder("<")
    return np.frombuffer(content, stored).reshape(shape).astype(as_dtype(dtype))


def like(value: Array, other: Array) -> Array:
    """Return `value` in the array library and on the device of `other`: itself if it is there."""
    target = backend_of(other)
    return moved(value, target, target.device_of(other))


def _floating(name: str, dtype: Any) -> np.dtype:
    found = as_dtype(dtype or float32)
    if not is_floating(found):
        raise TypeError(
            f"{name}: dtype is {found}, expected a floating one such as 'float32'; for random "
            f"integers use randint"
        )
    return found


def _moved(array: Any, device: str | None) -> Array:
    # A 0-d result of NumPy may be a scalar.
    return to_device(np.asarray(array), _named(device))


def _named(device: str | None) -> str:
    return get_default_device() if device is None else device
