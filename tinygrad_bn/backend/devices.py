"""Devices are strings: `"cpu"`, `"cuda"`, `"cuda:1"`. This file turns them into arrays' homes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tinygrad_bn.backend import arrays, cuda
from tinygrad_bn.backend.arrays import Array, Backend, backend_of, numpy_backend
from tinygrad_bn.backend.placement import on
from tinygrad_bn.backend.recording import refuse

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


def device_index(device: str) -> int:
    """Return the number of the GPU that `device` names; "cuda" is the current one."""
    _, index = parse(device)
    return cuda.current_device() if index is None else index


def cuda_is_available() -> bool:
    """Return whether CuPy is installed and sees at least one GPU (False is never an error).

    >>> device = "cuda" if cuda_is_available() else "cpu"
    """
    return cuda.unavailable_because() is None


def get_default_device() -> str:
    """Return the device on which creation functions place new Tensors: "cpu" to begin with.

    >>> get_default_device()
    'cpu'
    """
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
    return moved(array, target, _full_name(device))


def moved(array: Array, target: Backend, device: str) -> Array:
    """Return `array` in the library `target`, on the `device` of that full name."""
    source = backend_of(array)
    if source is not target:
        refuse(
            f"copies an array from {source.device_of(array)!r} to {device!r}",
            "make it there before, or hand it to the step as an argument that is there",
        )
        return target.from_numpy(source.to_numpy(array), device)
    if source.device_of(array) == device:
        return array
    accelerator: Any = target.accelerator  # a library with several devices has one
    return accelerator.move(array, parse(device)[1])


def new_on(device: str, make: Callable[[Any], Array]) -> Array:
    """Return `make(xp)`, a new array, made by the library and on the device that `device` names."""
    target = backend_for(device)
    if target.accelerator is None:
        return make(target.xp)
    with on(_full_name(device)):
        return make(target.xp)


_ON_HOST, _ON_GPU, _PINNED, _MANAGED = 1, 2, 3, 13  # the numbers of DLPack's dlpack.h


def from_dlpack(value: Any) -> Array:
    """Return an array that shares the memory of `value`, an array of any library that has DLPack.

    Raises TypeError for what has no DLPack, ValueError for memory that no backend here reaches.
    """
    if not hasattr(value, "__dlpack_device__"):
        raise TypeError(
            f"from_dlpack: got a {type(value).__name__}, expected an array with __dlpack__, such "
            f"as a NumPy, CuPy, PyTorch or JAX array"
        )
    kind, index = value.__dlpack_device__()
    if kind in (_ON_HOST, _PINNED):
        return numpy_backend.xp.from_dlpack(value)
    if kind in (_ON_GPU, _MANAGED):
        target = cuda.backend(index)
        with on(f"cuda:{index}"):
            return cuda.devices(target).from_dlpack(value)
    raise ValueError(
        f"from_dlpack: the array is on a device of DLPack's type {int(kind)}, expected the host or "
        f"a CUDA GPU; copy it there first"
    )


def from_python(data: Any, dtype: Any, device: str | None) -> Array:
    """Return numbers or nested lists of them as an array on `device` (None: on the default)."""
    return to_device(
        arrays.from_python(data, dtype), get_default_device() if device is None else device
    )


def _full_name(device: str) -> str:
    kind, _ = parse(device)
    return kind if kind == "cpu" else f"cuda:{device_index(device)}"
