"""Where work runs: on the one device that all of its arrays are on.

On the host there is nothing to do, and nothing is done. With a GPU's arrays about, mixing devices
is an error that names both, and where there are several GPUs that of the arrays is made the current
one, since array libraries compute on the current device wherever the operands are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tinygrad_bn.backend.arrays import ARRAY_TYPES

_HERE: AbstractContextManager[Any] = nullcontext()


def placed(name: str, arrays: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return a context in which the device of `arrays` is the current one.

    arrays: raw arrays; anything else among them is passed over.

    Raises ValueError that names both devices where the arrays are on different ones.
    """
    if len(ARRAY_TYPES) == 1:
        return _HERE
    first = like = None
    device = ""
    for array in arrays:
        backend = ARRAY_TYPES.get(type(array))
        if backend is None:
            continue
        several = backend.accelerator is not None and backend.accelerator.count() > 1
        if first is None:
            first, like, device = backend, array, backend.device_of(array) if several else ""
        elif backend is not first or (several and backend.device_of(array) != device):
            here, there = first.device_of(like), backend.device_of(array)
            raise ValueError(
                f"{name}: got arrays on {here!r} and on {there!r}, expected one device for all; "
                f"move one of them, for example x.to({here!r})"
            )
    if not device:
        return _HERE
    return on(device)


def copied(array: Any) -> Any:
    """Return a copy of a raw array on the device it is on."""
    with placed("copy", (array,)):
        return array.copy()


def cast(array: Any, dtype: Any) -> Any:
    """Return a copy of a raw array in `dtype`, on the device it is on."""
    with placed("astype", (array,)):
        return array.astype(dtype)


def on(device: str) -> AbstractContextManager[Any]:
    """Return a context in which the GPU named in full by `device`, "cuda:1", is the current one."""
    index = int(device.partition(":")[2])
    accelerator: Any = _accelerator()
    return _HERE if accelerator.current() == index else accelerator.use(index)


def several_devices() -> bool:
    """Return whether there is more than one GPU, so that work has to follow its arrays."""
    accelerator = _accelerator()
    return accelerator is not None and accelerator.count() > 1


def _accelerator() -> Any:
    """Return the devices of the array library that has any, or None."""
    if len(ARRAY_TYPES) == 1:
        return None
    found = (backend.accelerator for backend in ARRAY_TYPES.values())
    return next((accelerator for accelerator in found if accelerator is not None), None)
