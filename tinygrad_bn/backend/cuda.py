"""CuPy, where it is installed and a GPU answers; otherwise the reason why not.

`import cupy` succeeds on a machine without a GPU, and any array then raises: so the question is
always "is a device available", never "can it be imported". Arrays are made on CuPy's current stream
and ops run there, so `with cupy.cuda.Stream():` around a step does what it says.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy as np

from tinygrad_bn.backend.arrays import Backend, register_backend


@lru_cache(maxsize=1)
def unavailable_because() -> str | None:
    """Return why no CUDA device can be used, or None when one can.

    It is CuPy, the driver or the device that is missing, and the text says which.
    """
    try:
        import cupy  # pyrefly: ignore
    except ImportError as error:
        why = "" if error.name == "cupy" else f" properly ({error})"
        extras = "pip install 'tinygrad_bn[cuda12]' or 'tinygrad_bn[cuda13]'"
        return f"CuPy is not installed{why}: {extras}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if "NoDevice" in str(error):
            return f"CuPy is installed but the CUDA driver finds no GPU on this machine ({error})"
        return (
            f"CuPy is installed but there is no CUDA driver, or one too old for it, to reach a GPU "
            f"with ({error})"
        )
    return None if count else "CuPy is installed but the CUDA driver finds no GPU on this machine"


class CupyDevices:
    """The GPUs that CuPy sees (an `Accelerator`)."""

    def __init__(self, cupy: Any):
        self._cupy = cupy
        self._count: int | None = None

    def count(self) -> int:
        """Return how many GPUs there are."""
        if self._count is None:
            self._count = int(self._cupy.cuda.runtime.getDeviceCount())
        return self._count

    def current(self) -> int:
        """Return the index of CuPy's current device."""
        return int(self._cupy.cuda.runtime.getDevice())

    def use(self, index: int) -> AbstractContextManager[Any]:
        """Return a context in which GPU `index` is CuPy's current device."""
        return self._cupy.cuda.Device(index)

    def move(self, array: Any, index: int) -> Any:
        """Return a copy of `array` on GPU `index`; each GPU waits for the other's current stream.

        CuPy's own copy between GPUs runs on the target's stream alone. It could begin before the
        source is computed, and the source's memory be given away before it ends.
        """
        cuda = self._cupy.cuda
        with cuda.Device(array.device.id):
            source = cuda.get_current_stream()
            computed = source.record(cuda.Event(disable_timing=True))
        with cuda.Device(index):
            target = cuda.get_current_stream()
            target.wait_event(computed)
            copy = self._cupy.array(array)
            copied = target.record(cuda.Event(disable_timing=True))
        with cuda.Device(array.device.id):
            source.wait_event(copied)
        return copy

    def from_dlpack(self, value: Any) -> Any:
        """Return a CuPy array that shares the memory of another library's GPU array."""
        return self._cupy.from_dlpack(value)

    def sender(self, index: int) -> Any:
        """Return what copies pinned host arrays to GPU `index`."""
        from tinygrad_bn.backend.cuda_copies import CupySender

        return CupySender(self._cupy, index)

    def recorder(self, index: int) -> Any:
        """Return what records CUDA graphs on GPU `index`."""
        from tinygrad_bn.backend.cuda_graphs import CupyRecorder

        return CupyRecorder(self._cupy, index)


@lru_cache(maxsize=1)
def _registered() -> Backend:
    import cupy  # pyrefly: ignore

    def from_numpy(array: np.ndarray, device: str) -> Any:
        _, _, index = device.partition(":")
        with cupy.cuda.Device(int(index) if index else None):
            # A copy from pageable memory; CuPy passes it through pinned memory of its own.
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
            accelerator=CupyDevices(cupy),
        )
    )


def backend(index: int | None) -> Backend:
    """Return CuPy's backend; RuntimeError that names what is missing if `index` cannot be used."""
    reason = unavailable_because()
    if reason is not None:
        raise RuntimeError(f"device 'cuda' cannot be used: {reason}")
    found = _registered()
    count = devices(found).count()
    if index is not None and index >= count:
        raise RuntimeError(
            f"device 'cuda:{index}' cannot be used: this machine has {count} GPU(s), "
            f"numbered from 0"
        )
    return found


def devices(found: Backend | None = None) -> Any:
    """Return the devices of CuPy's backend."""
    return (found or backend(None)).accelerator


def current_device() -> int:
    """Return the index of CuPy's current device."""
    return devices().current()
