"""Functions that make Tensors: from data, filled, counted or random.

All take the keywords `dtype` (float32 unless said otherwise), `device` (the default device unless
given, see `default_device`) and `requires_grad`. Random numbers come from the generator that
`manual_seed` seeds and are drawn on the host: one seed gives the same numbers on every device and,
up to rounding, in every dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from tinygrad_bn import backend
from tinygrad_bn.backend import creation as _raw
from tinygrad_bn.tape import TensorBase
from tinygrad_bn.tensor import Tensor, raw_array

Size = int | Sequence[int]


def tensor(
    data: Any, *, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return a Tensor around a copy of `data` (`Tensor(data)` shares the memory of an array).

    data: an array, a Tensor, a number or nested lists of numbers.
    dtype: None keeps an array's, and makes Python floats float32 and Python integers int64.

    >>> import numpy as np
    >>> array = np.zeros(2)
    >>> t = tensor(array)
    >>> array[:] = 1
    >>> t
    Tensor([0., 0.], dtype=float64)
    """
    array = raw_array(data, dtype, device)
    if not isinstance(data, (bool, int, float, list, tuple)):
        array = backend.copied(array)
    return Tensor(array, requires_grad=requires_grad)


def from_dlpack(value: Any) -> Tensor:
    """Return a Tensor that shares the memory of another library's array, wherever that is.

    value: anything with `__dlpack__`: an array of NumPy or CuPy, a tensor of PyTorch or JAX, ...

    Raises TypeError for anything else, ValueError for devices that are neither host nor CUDA GPU.

    >>> import numpy as np
    >>> array = np.zeros(2)
    >>> t = from_dlpack(array)
    >>> array[:] = 1
    >>> t
    Tensor([1., 1.], dtype=float64)
    """
    return Tensor(backend.from_dlpack(value))


def zeros(
    *shape: Size, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return a Tensor of zeros: `zeros(2, 3)` or `zeros((2, 3))`.

    >>> zeros(2, 3).shape
    (2, 3)
    """
    return _filled("zeros", shape, 0, dtype, device, requires_grad)


def ones(
    *shape: Size, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return a Tensor of ones: `ones(2, 3)` or `ones((2, 3))`.

    >>> ones(2)
    Tensor([1., 1.], dtype=float32)
    """
    return _filled("ones", shape, 1, dtype, device, requires_grad)


def full(
    shape: Size,
    value: float,
    *,
    dtype: Any = None,
    device: str | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return a Tensor of `value`; without `dtype` a float gives float32 and an integer int64.

    >>> full((2,), 0.5)
    Tensor([0.5, 0.5], dtype=float32)
    """
    array = _raw.full(_shape("full", (shape,)), value, dtype, device)
    return Tensor(array, requires_grad=requires_grad)


def empty(
    *shape: Size, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return a Tensor whose entries are whatever the memory holds: to be written before use.

    >>> empty(2, 3).shape
    (2, 3)
    """
    array = _raw.empty(_shape("empty", shape), dtype, device)
    return Tensor(array, requires_grad=requires_grad)


def arange(
    start: float,
    stop: float | None = None,
    step: float = 1,
    *,
    dtype: Any = None,
    device: str | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return start, start + step, ... below stop; `arange(n)` counts from 0.

    Without `dtype`, integers give int64 and anything else float32.

    >>> arange(3)
    Tensor([0, 1, 2], dtype=int64)
    >>> arange(0, 1, 0.5)
    Tensor([0. , 0.5], dtype=float32)
    """
    if stop is None:
        start, stop = 0, start
    if step == 0:
        raise ValueError("arange: step is 0, expected a number that leads from start to stop")
    return Tensor(_raw.arange(start, stop, step, dtype, device), requires_grad=requires_grad)


def linspace(
    start: float,
    stop: float,
    num: int = 50,
    *,
    dtype: Any = None,
    device: str | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return `num` evenly spaced values from start to stop, both included.

    >>> linspace(0, 1, 3)
    Tensor([0. , 0.5, 1. ], dtype=float32)
    """
    return Tensor(_raw.linspace(start, stop, num, dtype, device), requires_grad=requires_grad)


def eye(
    n: int,
    m: int | None = None,
    *,
    dtype: Any = None,
    device: str | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return an (n, m) matrix (m: as n) with ones on its diagonal and zeros elsewhere.

    >>> eye(2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return Tensor(_raw.eye(n, m, dtype, device), requires_grad=requires_grad)


def rand(
    *shape: Size, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return random numbers from the uniform distribution on [0, 1); floating dtypes only.

    >>> x = rand(1000)
    >>> bool(x.min() >= 0), bool(x.max() < 1)
    (True, True)
    """
    array = _raw.uniform(0.0, 1.0, _shape("rand", shape), dtype, device)
    return Tensor(array, requires_grad=requires_grad)


def randn(
    *shape: Size, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return random numbers from the standard normal distribution; floating dtypes only.

    >>> import tinygrad_bn as tg
    >>> tg.manual_seed(0)
    >>> x = tg.randn(3)
    >>> tg.manual_seed(0)
    >>> bool((x == tg.randn(3)).min())
    True
    """
    array = _raw.normal(0.0, 1.0, _shape("randn", shape), dtype, device)
    return Tensor(array, requires_grad=requires_grad)


def randint(
    low: int,
    high: int | None = None,
    shape: Size = (),
    *,
    dtype: Any = None,
    device: str | None = None,
) -> Tensor:
    """Return random integers from [low, high), int64 unless said otherwise.

    `randint(n, shape=...)` draws from [0, n), as NumPy's.

    >>> x = randint(0, 10, (100,))
    >>> 0 <= x.min().item() <= x.max().item() < 10
    True
    """
    if high is None:
        low, high = 0, low
    low, high = operator.index(low), operator.index(high)
    if low >= high:
        raise ValueError(f"randint: [{low}, {high}) holds no integer; expected low < high")
    return Tensor(_raw.integers(low, high, _shape("randint", (shape,)), dtype, device))


def zeros_like(
    x: Any, *, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return zeros with the shape, dtype and device of `x` (a Tensor or an array).

    >>> zeros_like(arange(2))
    Tensor([0, 0], dtype=int64)
    """
    return full_like(x, 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones_like(
    x: Any, *, dtype: Any = None, device: str | None = None, requires_grad: bool = False
) -> Tensor:
    """Return ones with the shape, dtype and device of `x` (a Tensor or an array).

    >>> ones_like(arange(2), dtype="float32")
    Tensor([1., 1.], dtype=float32)
    """
    return full_like(x, 1, dtype=dtype, device=device, requires_grad=requires_grad)


def full_like(
    x: Any,
    value: float,
    *,
    dtype: Any = None,
    device: str | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """Return `value` with the shape, dtype and device of `x` (a Tensor or an array).

    >>> full_like(zeros(2), 0.5)
    Tensor([0.5, 0.5], dtype=float32)
    """
    like = x.data if isinstance(x, TensorBase) else raw_array(x)
    dtype = like.dtype if dtype is None else backend.as_dtype(dtype)
    # From x's own library, so that an array type the library was only told of serves here too.
    with backend.placed("full_like", (like,)):
        array = backend.array_module(like).full(like.shape, value, dtype=dtype)
    if device is not None:
        array = backend.to_device(array, device)
    return Tensor(array, requires_grad=requires_grad)


def _filled(
    name: str, sizes: tuple[Size, ...], value: int, dtype: Any, device: str | None, grad: bool
) -> Tensor:
    dtype = backend.float32 if dtype is None else dtype
    return Tensor(_raw.full(_shape(name, sizes), value, dtype, device), requires_grad=grad)


def _shape(name: str, sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Return `f(2, 3)` and `f((2, 3))` alike as (2, 3); raise for what is no shape."""
    if len(sizes) == 1 and isinstance(sizes[0], Sequence):
        sizes = tuple(sizes[0])
    try:
        shape = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            f"{name}: the shape is {sizes}, expected integers: {name}(2, 3) or {name}((2, 3))"
        ) from None
    if any(size < 0 for size in shape):
        raise ValueError(f"{name}: the shape is {shape}, expected sizes >= 0")
    return shape
