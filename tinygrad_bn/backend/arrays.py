"""Which array module serves which array: the seam where CuPy, or any NumPy-like library, comes in.

An array type is known once a `Backend` for it is registered. The floors above never name an array
library: they call `array_module(x)` and write `xp.exp(x)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_bn.backend.accelerator import Accelerator
from tinygrad_bn.backend.recording import refuse

Array = Any  # a raw array of any registered type


@dataclass(frozen=True)
class Backend:
    """What the library must know of an array library.

    name: as it appears in messages, `"numpy"`.
    xp: the array module, with NumPy's function names.
    array_type: the class of its arrays.
    device_of: array -> device string.
    from_numpy: (NumPy array, device string) -> array.
    to_numpy: array -> NumPy array.
    families: the kernel families that may serve its arrays, best first.
    accelerator: its devices and what they can do; None for a library that knows the host alone.
    """

    name: str
    xp: Any
    array_type: type
    device_of: Callable[[Array], str]
    from_numpy: Callable[[np.ndarray, str], Array]
    to_numpy: Callable[[Array], np.ndarray]
    families: tuple[str, ...] = ()
    accelerator: Accelerator | None = None


#: Array type -> Backend. `type(x) in ARRAY_TYPES` is the fast test for a proper array.
ARRAY_TYPES: dict[type, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Return `backend` after making its array type known to every op."""
    ARRAY_TYPES[backend.array_type] = backend
    return backend


numpy_backend = register_backend(
    Backend(
        name="numpy",
        xp=np,
        array_type=np.ndarray,
        device_of=lambda array: "cpu",
        from_numpy=lambda array, device: array,
        to_numpy=lambda array: array,
        families=("numba", "numpy"),
    )
)


def is_array(value: object) -> bool:
    """Return whether `value` is a raw array or a NumPy scalar (not a Python number)."""
    if type(value) in ARRAY_TYPES:
        return True
    _register_cupys(value)
    return isinstance(value, (np.generic, *ARRAY_TYPES))


def _register_cupys(value: object) -> None:
    """Register CuPy's backend if `value` is the first of its arrays that is seen."""
    if type(value).__module__.partition(".")[0] == "cupy":
        importlib.import_module("tinygrad_bn.backend.cuda").backend(None)


def backend_of(*values: object) -> Backend:
    """Return the backend of the first array among `values`; NumPy's if there is none."""
    for value in values:
        if type(value) in ARRAY_TYPES:
            return ARRAY_TYPES[type(value)]
    for value in values:  # subclasses of a known array type, such as np.memmap; CuPy's first array
        _register_cupys(value)
        for array_type, backend in ARRAY_TYPES.items():
            if isinstance(value, array_type):
                return backend
    return numpy_backend


def array_module(*values: object) -> Any:
    """Return the array module (`numpy`, `cupy`, ...) of the first array among `values`.

    >>> import numpy
    >>> array_module(numpy.ones(3)).__name__
    'numpy'
    """
    kind = type(values[0])
    backend = ARRAY_TYPES[kind] if kind in ARRAY_TYPES else backend_of(*values)
    return backend.xp


def as_array(value: object, *like: object) -> Array:
    """Return `value` as a proper array of the backend of `like`.

    NumPy reductions give scalars where CuPy gives 0-d arrays; ops normalise through this.
    """
    # Not `asarray` of what is an array: CuPy would copy it to the current device.
    return value if type(value) in ARRAY_TYPES else backend_of(value, *like).xp.asarray(value)


def without_lists(values: Sequence[Any]) -> Sequence[Any]:
    """Return raw inputs with the lists and tuples among them as arrays of the others' backend.

    NumPy takes lists for arrays everywhere; CuPy, nearly nowhere.
    """
    if not any(type(value) in (list, tuple) for value in values):
        return values
    return [as_array(v, *values) if type(v) in (list, tuple) else v for v in values]


class LentMemory:
    """The owner of memory that a kernel lends to one array, whose `.base` it is.

    Such an array is no view of another; views of it have the array itself as their base.
    """


def is_view(array: Array) -> bool:
    """Return whether the memory of `array` belongs to another array, or to who knows whom."""
    return array.base is not None and not isinstance(array.base, LentMemory)


def same_memory(view: Array, of: Array) -> bool:
    """Return whether `view` was taken from the memory of `of` (both from one backend)."""
    base = getattr(view, "base", None)
    return view is of or (base is not None and (base is of or base is getattr(of, "base", None)))


def to_numpy(array: Array) -> np.ndarray:
    """Return a raw array of any backend as a NumPy array: shared on the CPU, copied from a GPU."""
    backend = backend_of(array)
    if backend is not numpy_backend:
        refuse("copies an array to the host", "read results after the step")
    return backend.to_numpy(array)


def from_python(data: Any, dtype: Any) -> np.ndarray:
    """Return numbers and nested lists of them as a NumPy array, in which Python floats are float32.

    NumPy scalars and arrays inside the lists keep their precision, and Python numbers beside them
    are weak. TypeError for anything but numbers and for lists of unequal length.
    """
    try:
        array = np.asarray(data)
    except ValueError as error:  # ragged
        raise _no_numbers(data) from error
    check_numbers(array, data)
    if dtype is None and array.dtype == np.float64:
        found = set(_numpy_dtypes(data))
        # np.float64 is a Python float too, so NumPy's values were asked for first.
        dtype = np.result_type(*found, 1.0) if found else np.float32
    return array if dtype is None else array.astype(dtype, copy=False)


def check_numbers(array: np.ndarray, data: Any) -> None:
    """Raise TypeError unless `array`, made from `data`, holds numbers."""
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise _no_numbers(data)


def _no_numbers(data: Any) -> TypeError:
    return TypeError(
        f"Tensor: cannot make an array of numbers from the {type(data).__name__} {data!r:.80}; "
        f"expected numbers, or nested lists of them of equal length"
    )


def _numpy_dtypes(data: Any) -> Iterator[np.dtype]:
    if isinstance(data, (list, tuple)):
        for entry in data:
            yield from _numpy_dtypes(entry)
    elif isinstance(data, (np.generic, np.ndarray)):
        yield data.dtype


def converted(array: np.ndarray, dtype: Any, copy: bool | None) -> np.ndarray:
    """Return what NumPy's `__array__` protocol asks for."""
    return np.array(array, dtype=dtype, copy=copy)


def array_repr(array: Array, prefix: str) -> str:
    """Return the entries of a raw array as text, its lines aligned behind `prefix`."""
    return np.array2string(to_numpy(array), separator=", ", prefix=prefix)
