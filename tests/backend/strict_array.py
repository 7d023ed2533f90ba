"""A second array type for the tests: NumPy's methods and operators, and no implicit conversion.

It stands in for an array on a GPU. Whatever would silently work there only because the data is in
host memory raises here: `numpy.exp(x)`, `numpy.asarray(x)`, `x + ndarray`, `float(x)`, `if x:`.
Results stay `StrictArray`s: reductions give 0-d arrays, as CuPy's do, never scalars. Python numbers
mix with it; NumPy arrays and NumPy scalars do not.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np

from tinygrad_bn.backend import Backend


class ImplicitConversionError(TypeError):
    """Something took a StrictArray for a NumPy array, or the other way round."""


def _unwrap(value):
    """Return `value` with every StrictArray in it replaced by its data; refuse NumPy's own."""
    if isinstance(value, StrictArray):
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

    __slots__ = ("__weakref__", "_data", "base")
    __hash__ = None

    def __init__(self, data: np.ndarray, base: StrictArray | None = None):
        assert type(data) is np.ndarray
        self._data = data
        self.base = base

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
        if not any(part is Ellipsis for part in index):
            index = (*index, Ellipsis)  # a single entry is a 0-d view, as CuPy's is, not a scalar
        return _wrap(self._data[_unwrap(index)], self)

    def __setitem__(self, index, value):
        self._data[_unwrap(index)] = _unwrap(value)

    def __deepcopy__(self, memo):
        return StrictArray(self._data.copy())


def _method(name):
    def method(self, *args, **kwargs):
        kwargs = {key: _unwrap(value) for key, value in kwargs.items()}
        result = getattr(self._data, name)(*map(_unwrap, args), **kwargs)
        return NotImplemented if result is NotImplemented else _wrap(result, self)

    return method


def _in_place(name):
    def method(self, other):
        getattr(self._data, name)(_unwrap(other))
        return self

    return method


_BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
_COMPARISONS_AND_UNARY = ["lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"]
_REDUCTIONS = ["sum", "mean", "max", "min", "var", "std", "prod", "argmax", "argmin", "any", "all"]
_SHAPES = ["reshape", "ravel", "flatten", "transpose", "swapaxes", "squeeze", "repeat"]
_OTHERS = ["astype", "copy", "clip", "round", "cumsum", "take", "item", "tolist", "fill", "sort"]
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


class _Function:
    """A NumPy function, or a ufunc with `at` and `reduce`, that takes and gives StrictArrays."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args, **kwargs):
        kwargs_ = {key: _unwrap(value) for key, value in kwargs.items()}
        result = self._function(*map(_unwrap, args), **kwargs_)
        if kwargs.get("out") is not None:
            return kwargs["out"]
        # asarray and friends give back the very array they were given.
        for arg in args:
            if isinstance(arg, StrictArray) and result is arg._data:
                return arg
        return _wrap(result, *args, *(args[0] if args and type(args[0]) in (tuple, list) else ()))

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
# What `backend/cuda.py` asks CuPy for: one device, number 0, the current one.
xp.cuda = SimpleNamespace(
    runtime=SimpleNamespace(getDeviceCount=lambda: 1, getDevice=lambda: 0),
)


def strict(array) -> StrictArray:
    """Return a copy of a NumPy array as a StrictArray."""
    return StrictArray(np.array(array))


def plain(array: StrictArray) -> np.ndarray:
    """Return a copy of a StrictArray as a NumPy array: the explicit way out."""
    return array._data.copy()


#: It poses as the GPU, so that devices, `to` and `default_device` are exercised without one.
strict_backend = Backend(
    name="strict",
    xp=xp,
    array_type=StrictArray,
    device_of=lambda array: "cuda:0",
    from_numpy=lambda array, device: strict(array),
    to_numpy=plain,
    families=(),
)
