"""CuPy, where it is installed and a GPU answers; otherwise the reason why not.

`import cupy` succeeds on a machine without a GPU, and any array then raises: so the question is
always "is a device available", never "can it be imported".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from tinygrad_bn.backend.arrays import Backend, register_backend


@lru_cache(maxsize=1)
def unavailable_because() -> str | None:
    """Return why no CUDA device can be used, or None when one can."""
    try:
        import cupy  # pyrefly: ignore
    except ImportError:
        return "CuPy is not installed: pip install 'tinygrad_bn[cuda12]' or 'tinygrad_bn[cuda13]'"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy is installed but finds no usable CUDA driver or GPU ({error})"
    return None if count else "CuPy is installed but this machine has no GPU"


@lru_cache(maxsize=1)
def _registered() -> Backend:
    import cupy  # pyrefly: ignore

    def from_numpy(array: np.ndarray, device: str) -> Any:
        _, _, index = device.partition(":")
        with cupy.cuda.Device(int(index) if index else None):
            return cupy.asarray(array)

    return register_backend(
        Backend(
            name="cupy",
            xp=cupy,
            array_type=cupy.ndarray,
            device_of=lambda array: f"cuda:{array.device.id}",
            from_numpy=from_numpy,
            to_numpy=lambda array: array.get(),
            families=("cuda",),
        )
    )


def backend(index: int | None) -> Backend:
    """Return CuPy's backend; RuntimeError that names what is missing if `index` cannot be used."""
    reason = unavailable_because()
    if reason is not None:
        raise RuntimeError(f"device 'cuda' cannot be used: {reason}")
    found = _registered()
    count = found.xp.cuda.runtime.getDeviceCount()
    if index is not None and index >= count:
        raise RuntimeError(
            f"device 'cuda:{index}' cannot be used: this machine has {count} GPU(s), "
            f"numbered from 0"
        )
    return found


def current_device() -> int:
    """Return the index of CuPy's current device."""
    return int(backend(None).xp.cuda.runtime.getDevice())
