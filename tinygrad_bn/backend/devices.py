"""Devices are strings: `"cpu"`, `"cuda"`, `"cuda:1"`. This file turns them into arrays' homes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tinygrad_bn.backend import arrays, cuda
from tinygrad_bn.backend.arrays import Array, Backend, backend_of, numpy_backend

_default: ContextVar[str] = ContextVar("tinygrad_bn_default_device", default="cpu")


def parse(device: str) -> tuple[str, int | None]:
    """Return a device string as (kind, index); ValueError if it names none.

    >>> parse("cuda:1")
    ('cuda', 1)
    """
    match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None or (match[1] == "cpu" and match[2]):
        raise ValueError(f"unknown device {device!r}: expected 'cpu', 'cuda' or 'cuda:<index>'")
    return match[1], None if match[2] is None else int(match[2])


def backend_for(device: str) -> Backend:
    """Return the backend that serves `device`.

    Raises ValueError for an unknown device; RuntimeError for a CUDA device that cannot be used,
    saying whether CuPy, the driver or the device is missing.
    """
    kind, index = parse(device)
    return numpy_backend if kind == "cpu" else cuda.backend(index)


def cuda_is_available() -> bool:
    """Return whether CuPy is installed and sees at least one GPU (False is never an error)."""
    return cuda.unavailable_because() is None


def get_default_device() -> str:
    """Return the device on which creation functions place new Tensors."""
    return _default.get()


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """Place what creation functions make inside the `with` block on `device`.

    >>> with default_device("cpu"):
    ...     get_default_device()
    'cpu'
    """
    backend_for(device)  # fail here, not at the first creation
    before = _default.get()
    _default.set(device)
    try:
        yield
    finally:
        _default.set(before)


def device_of(array: Array) -> str:
    """Return the device string of a raw array."""
    return backend_of(array).device_of(array)


def to_device(array: Array, device: str) -> Array:
    """Return `array` on `device`: itself if it is there already, otherwise a copy."""
    target = backend_for(device)
    source = backend_of(array)
    if source is target and source.device_of(array) == _full_name(device):
        return array
    return target.from_numpy(source.to_numpy(array), device)


def from_python(data: Any, dtype: Any, device: str | None) -> Array:
    """Return numbers or nested lists of them as an array on `device` (None: on the default)."""
    return to_device(
        arrays.from_python(data, dtype), get_default_device() if device is None else device
    )


def _full_name(device: str) -> str:
    kind, index = parse(device)
    return kind if kind == "cpu" else f"cuda:{cuda.current_device() if index is None else index}"
