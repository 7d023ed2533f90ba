"""A second array type for the tests: NumPy's methods and operators, and no implicit conversion.

It stands in for an array on a GPU. Whatever would silently work there only because the data is in
host memory raises here: `numpy.exp(x)`, `numpy.asarray(x)`, `x + ndarray`, `float(x)`, `if x:`.
Results stay `StrictArray`s: reductions give 0-d arrays, as CuPy's do, never scalars. Python numbers
mix with it; NumPy arrays, NumPy scalars and lists do not.

There are two devices. What is computed must be on the current one, as with CuPy where one GPU
cannot reach into the other's memory. `TRAFFIC` counts what makes a host wait for a GPU. What is
launched can be recorded: see `strict_graph.py`.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from tinygrad_bn.backend import Backend

#: How often something was read back to the host ("read") or, with CuPy, would wait for the device
#: to learn a size ("wait"), and how often it was copied from the host ("write").
TRAFFIC: Counter[str] = Counter()

#: The recording that is being made (of `strict_graph.py`), or None.
TAPE = None

DEVICES = 2
_current = 0


class ImplicitConversionError(TypeError):
    """Something took a StrictArray for a NumPy array, or the other way round."""


class WrongDeviceError(ValueError):
    """A StrictArray was used while another device than its own was the current one."""


class CapturingError(RuntimeError):
    """Something was done during a recording that CUDA refuses while a stream is capturing."""


def count(what):
    """Count a transfer or a wait; none is possible while work is being recorded."""
    if TAPE is not None:
        raise CapturingError(f"a {what} while capturing")
    TRAFFIC[what] += 1


@contextmanager
def use(index):
    """Make device `index` the current one."""
    global _current
    before, _current = _current, index
    try:
        yield
    finally:
        _current = before


def current():
    return _current


def computed(function, args, kwargs):
    """Return what a NumPy function gives, with scalars as 0-d arrays."""
    result = function(*args, **kwargs)
    if type(result) is tuple:
        return tuple(np.asarray(r) if isinstance(r, np.generic) else r for r in result)
    return np.asarray(result) if isinstance(result, np.generic) else result


def _launch(function, args, kwargs, *sources):
    """Return the result of a NumPy function on the data of StrictArrays, as StrictArrays."""
    raw_args = [_unwrap(arg) for arg in args]
    raw_kwargs = {key: _unwrap(value) for key, value in kwargs.items()}
    if TAPE is not None:
        TAPE.before(raw_args, raw_kwargs)
    result = computed(function, raw_args, raw_kwargs)
    if TAPE is not None:
        TAPE.after(function, raw_args, raw_kwargs, result)
    return NotImplemented if result is NotImplemented else _wrap(result, *sources)


def _unwrap(value):
    """Return `value` with every StrictArray in it replaced by its data; refuse NumPy's own."""
    if isinstance(value, StrictArray):
        if value.index != _current:
            raise WrongDeviceError(
                f"an array on device {value.index} was used while {_current} is the current one"
            )
        value.arrive()
        return value._data
    if isinstance(value, (np.ndarray, np.generic)):
        raise ImplicitConversionError(f"a {type(value).__name__} of NumPy met a StrictArray")
    if type(value) in (tuple, list):
        return type(value)(map(_unwrap, value))
    return value


def _wrap(value, *sources):
    """Return `value` with NumPy's arrays and scalars as StrictArrays; `sources` own the memory."""
    if isinstance(value, (tuple, list)):
        return type(value)(_wrap(entry, *sources) for entry in value)
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    for source in sources:
        if isinstance(source, StrictArray) and np.may_share_memory(array, source._data):
            return StrictArray(array, source if source.base is None else source.base)
    return StrictArray(array)


class StrictArray:
    """An array in memory that only `strict_array.xp` can reach."""

    __slots__ = ("__weakref__", "_data", "base", "index", "pending")
    __hash__ = None

    def __init__(self, data: np.ndarray, base: StrictArray | None = None):
        assert type(data) is np.ndarray
        self._data = data
        self.base = base
        self.index = _current
        self.pending = None  # a copy into it that has not been made yet

    def arrive(self):
        """Make the copy that is pending, as it comes before whatever uses the array."""
        if self.pending is not None:
            self.pending.wait()

    def __repr__(self) -> str:
        return f"StrictArray({self._data!r})"

    def _refuse(self, *args, **kwargs):
        raise ImplicitConversionError("a StrictArray was converted implicitly")

    __array__ = __array_ufunc__ = __array_function__ = _refuse
    __bool__ = __float__ = __int__ = __index__ = __complex__ = _refuse

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        index = index if type(index) is tuple else (index,)
        if _has_mask(index):
            count("wait")  # how many entries there are is data
        if not any(part is Ellipsis for part in index):
            index = (*index, Ellipsis)  # a single entry is a 0-d view, as CuPy's is, not a scalar
        return _launch(np.ndarray.__getitem__, (self, index), {}, self)

    def __setitem__(self, index, value):
        if _has_mask(index if type(index) is tuple else (index,)):
            count("wait")  # CuPy counts the entries here too
        _refuse_lists((value,))
        _launch(np.ndarray.__setitem__, (self, index, value), {})

    def __deepcopy__(self, memo):
        return self.copy()

    def item(self):
        count("read")
        self.arrive()
        return self._data.item()

    def tolist(self):
        count("read")
        self.arrive()
        return self._data.tolist()

    def __dlpack__(self, **options):
        return self._data.__dlpack__()

    def __dlpack_device__(self):
        return (2, self.index)  # kDLCUDA

    @property
    def __cuda_array_interface__(self):
        return {**self._data.__array_interface__, "version": 3}


def _has_mask(index):
    return any(isinstance(i, StrictArray) and i.dtype == bool for i in index)


def _refuse_lists(operands):
    """CuPy takes a list for an array only where arrays are made."""
    if any(type(operand) in (list, tuple) for operand in operands):
        raise ImplicitConversionError("a list met a StrictArray")


def _method(name):
    function = getattr(np.ndarray, name)

    def method(self, *args, **kwargs):
        if name.startswith("__"):
            _refuse_lists(args)
        return _launch(function, (self, *args), kwargs, self)

    return method


def _in_place(name):
    function = getattr(np.ndarray, name)

    def method(self, other):
        _refuse_lists((other,))
        _launch(function, (self, other), {})
        return self

    return method


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
_COMPARISONS_AND_UNARY = ["lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"]
_REDUCTIONS = ["sum", "mean", "max", "min", "var", "std", "prod", "argmax", "argmin", "any", "all"]
_SHAPES = ["reshape", "ravel", "flatten", "transpose", "swapaxes", "squeeze", "repeat"]
_OTHERS = ["astype", "copy", "clip", "round", "cumsum", "take", "fill", "sort"]
_FACTS = ["shape", "ndim", "size", "dtype", "nbytes", "itemsize", "strides", "flags"]

for _name in [*_BINARY, *_COMPARISONS_AND_UNARY]:
    setattr(StrictArray, f"__{_name}__", _method(f"__{_name}__"))
for _name in _BINARY:
    setattr(StrictArray, f"__r{_name}__", _method(f"__r{_name}__"))
    setattr(StrictArray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in [*_REDUCTIONS, *_SHAPES, *_OTHERS]:
    setattr(StrictArray, _name, _method(_name))
for _name in _FACTS:
    setattr(StrictArray, _name, property(lambda self, _name=_name: getattr(self._data, _name)))
StrictArray.T = property(lambda self: self.transpose())


#: NumPy functions whose results have sizes that are data.
_WAITING = {"nonzero", "flatnonzero", "argwhere", "unique", "extract", "compress"}


class _Function:
    """A NumPy function, or a ufunc with `at` and `reduce`, that takes and gives StrictArrays."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args, **kwargs):
        name = getattr(self._function, "__name__", "")
        if name in _WAITING:
            count("wait")
        if isinstance(self._function, np.ufunc) or name == "where":
            _refuse_lists(args)
        if name in ("array", "asarray") and not any(isinstance(a, StrictArray) for a in args):
            count("write")
        sources = (*args, *(args[0] if args and type(args[0]) in (tuple, list) else ()))
        result = _launch(self._function, args, kwargs, *sources)
        if kwargs.get("out") is not None:
            return kwargs["out"]
        # asarray and friends give back the very array they were given.
        if isinstance(result, StrictArray):
            for arg in args:
                if isinstance(arg, StrictArray) and result._data is arg._data:
                    return arg
        return result

    def __getattr__(self, name):
        return _Function(getattr(self._function, name))


class _Module:
    """NumPy's functions on StrictArrays; types, constants and dtypes are NumPy's."""

    def __init__(self, module: ModuleType):
        self._module = module
        self.__name__ = f"strict_{module.__name__}"

    def __getattr__(self, name):
        found = getattr(self._module, name)
        if isinstance(found, ModuleType):
            return _Module(found)
        return _Function(found) if callable(found) and not isinstance(found, type) else found


xp = _Module(np)
xp.ndarray = StrictArray


def strict(array) -> StrictArray:
    """Return a copy of a NumPy array as a StrictArray: the explicit way in."""
    count("write")
    return StrictArray(np.array(array))


def plain(array: StrictArray) -> np.ndarray:
    """Return a copy of a StrictArray as a NumPy array: the explicit way out."""
    count("read")
    array.arrive()
    return array._data.copy()


def _from_numpy(array, device):
    _, _, index = device.partition(":")
    with use(int(index) if index else _current):
        return strict(array)


class StrictDevices:
    """Two devices (an `Accelerator`)."""

    count = staticmethod(lambda: DEVICES)
    current = staticmethod(current)
    use = staticmethod(use)

    def move(self, array, index):
        with use(index):
            return StrictArray(array._data.copy())

    def from_dlpack(self, value):
        return StrictArray(np.asarray(value._data))

    def sender(self, index):
        from tests.backend.strict_copies import StrictSender

        return StrictSender(index)

    def recorder(self, index):
        from tests.backend.strict_graph import StrictRecorder

        return StrictRecorder()


#: It poses as the GPU, so that devices, `to` and `default_device` are exercised without one.
strict_backend = Backend(
    name="strict",
    xp=xp,
    array_type=StrictArray,
    device_of=lambda array: f"cuda:{array.index}",
    from_numpy=_from_numpy,
    to_numpy=plain,
    families=(),
    accelerator=StrictDevices(),
)
