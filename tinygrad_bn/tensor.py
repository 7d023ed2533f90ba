"""The Tensor: an array on the tape. Every operator and method is an op applied to it.

What is not here is deliberate: a Tensor has no arithmetic of its own. `x * y` is `multiply(x, y)`,
and what `multiply` means, forward and backward, stands in `ops/elementwise.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from tinygrad_bn import autograd, backend
from tinygrad_bn.backend.recording import refuse
from tinygrad_bn.grad_mode import is_grad_enabled
from tinygrad_bn.ops import elementwise as _e
from tinygrad_bn.ops import indexing as _i
from tinygrad_bn.ops import linalg as _l
from tinygrad_bn.ops import reduction as _r
from tinygrad_bn.ops import shape as _s
from tinygrad_bn.ops.reduction import Axis
from tinygrad_bn.tape import NEVER_WRITTEN, Output, TensorBase, new_tensor, rebase, require_floating

Array = Any
Scalar = int | float | bool


class Tensor(TensorBase):
    """A Tensor around `data`, sharing its memory when dtype and device already agree.

    data: a NumPy or CuPy array, a Tensor, a number or nested lists of numbers.
    dtype: of the Tensor; None keeps an array's, and makes Python floats float32.
    device: `"cpu"`, `"cuda"` or `"cuda:<index>"`; None keeps an array's, and puts the rest on the
        default device.
    requires_grad: whether gradients flow to it; floating dtypes only (TypeError otherwise).

    Writing into the raw array behind a Tensor (`t.data[...] = v`) is not seen by the tape; assign
    through the Tensor (`t[...] = v`) where a pending backward may need the old values.

    >>> import tinygrad_bn as tg
    >>> x = tg.Tensor([1.0, 2.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    Tensor([2., 4.], dtype=float32)
    """

    __slots__ = ()

    #: NumPy leaves `ndarray * Tensor` to the Tensor instead of making an array of objects.
    __array_ufunc__ = None

    def __init__(
        self,
        data: Any,
        *,
        dtype: Any = None,
        device: str | None = None,
        requires_grad: bool = False,
    ):
        array = raw_array(data, dtype, device)
        if requires_grad:
            require_floating("Tensor", array.dtype)
        self.data = array
        self.requires_grad = bool(requires_grad)
        self.grad = None
        self.node = None
        self.version = [0, 0]
        self.view_of = None
        if isinstance(data, TensorBase) and backend.same_memory(array, data.data):
            self._alias(data)

    # --- what it is ----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.data.size

    @property
    def dtype(self) -> Any:
        """The type of the entries."""
        return self.data.dtype

    @property
    def device(self) -> str:
        """Where the data is: `"cpu"` or `"cuda:<index>"`."""
        return backend.device_of(self.data)

    @property
    def is_leaf(self) -> bool:
        """Whether no op made it: gradients end here."""
        return self.node is None

    @property
    def T(self) -> Tensor:  # noqa: N802  (NumPy's name)
        """The Tensor with its axes reversed."""
        return _s.transpose(self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d Tensor")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        body = backend.array_repr(self.data, "Tensor(")
        facts = [f"dtype={self.dtype}"]
        if self.device != "cpu":
            facts.append(f"device={self.device!r}")
        if self.node is not None:
            facts.append(f"op={self.node_name()!r}")
        elif self.requires_grad:
            facts.append("requires_grad=True")
        return f"{type(self).__name__}({body}, {', '.join(facts)})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and self.size == 1 else format(repr(self), spec)

    def node_name(self) -> str | None:
        """Return the name of the op that made this Tensor, None for a leaf."""
        if self.node is None:
            return None
        node = self.node.parents[0] if isinstance(self.node, Output) else self.node
        return node.op.name

    __hash__ = object.__hash__  # by identity, although == compares entries

    # --- out of the tape -----------------------------------------------------------------------

    def numpy(self) -> Any:
        """Return the data as a NumPy array: shared memory on the CPU, a copy from a GPU."""
        return backend.to_numpy(self.data)

    def item(self) -> Scalar:
        """Return the only entry as a Python number; ValueError if there is not exactly one."""
        if self.size != 1:
            raise ValueError(f"item: the Tensor has shape {self.shape}, expected exactly one entry")
        return self._read("item").item()

    def tolist(self) -> Any:
        """Return the entries as nested lists of Python numbers."""
        return self._read("tolist").tolist()

    def detach(self) -> Tensor:
        """Return a Tensor that shares the memory and takes no part in the graph."""
        tensor = new_tensor(self.data)
        tensor._alias(self)
        return tensor

    def _alias(self, other: TensorBase) -> None:
        """Share the version of `other`, whose memory this Tensor shares."""
        self.version = other.version
        self.view_of = other.version[1]

    def __copy__(self) -> Tensor:
        twin = self.detach()
        twin.requires_grad, twin.node = self.requires_grad, self.node
        return twin

    def __float__(self) -> float:
        return float(self._single("float"))

    def __int__(self) -> int:
        return int(self._single("int"))

    def __index__(self) -> int:
        value: Any = self._single("index")
        return operator.index(value)

    def __bool__(self) -> bool:
        return bool(self._single("bool"))

    def _single(self, what: str) -> Scalar:
        if self.size != 1:
            raise TypeError(
                f"{what}() of a Tensor of shape {self.shape}: only a single entry has one value; "
                f"reduce it first, for example with .sum() or .max()"
            )
        return self._read(what).item()

    def _read(self, what: str) -> Array:
        """Return the data, to be read on the host."""
        refuse(f"reads a value ({what}() of a Tensor)", "return the Tensor, and read it afterwards")
        return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if self.requires_grad:
            raise RuntimeError(
                "an array of a Tensor that requires grad would leave the graph silently; call "
                ".detach().numpy(), or .numpy() which says so by its name"
            )
        if self.device != "cpu":
            raise TypeError(f"the Tensor is on {self.device!r}; copy it with .numpy() or .cpu()")
        return backend.converted(self.data, dtype, copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> Any:
        """How other CUDA libraries reach the data; only a Tensor on a GPU has it."""
        return self.data.__cuda_array_interface__  # an array on the host raises AttributeError

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self.node is not None:
            raise RuntimeError(
                "deepcopy of a Tensor that an op made: its history cannot be copied; "
                "copy x.detach() instead"
            )
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())
        twin.data = backend.copied(self.data)
        twin.grad = None if self.grad is None else self.grad.detach().copy()
        return twin

    def __getstate__(self) -> tuple[Any, bool]:
        if self.node is not None:
            raise RuntimeError("pickling a Tensor that an op made; pickle x.detach() instead")
        return self.data, self.requires_grad

    def __setstate__(self, state: tuple[Any, bool]) -> None:
        self.data, self.requires_grad = state
        self.grad, self.node, self.version, self.view_of = None, None, [0, 0], None

    # --- devices and dtypes --------------------------------------------------------------------

    def to(self, device: str) -> Tensor:
        """Return the Tensor on `device`: itself if it is there; gradients flow back across."""
        return self if self.device == device else _s.to_device(self, device=device)

    def cpu(self) -> Tensor:
        """Return the Tensor in host memory."""
        return self.to("cpu")

    def cuda(self) -> Tensor:
        """Return the Tensor on the current GPU."""
        return self.to("cuda")

    def astype(self, dtype: Any) -> Tensor:
        """Return a copy converted to `dtype`."""
        return _s.astype(self, dtype=dtype)

    # --- gradients -----------------------------------------------------------------------------

    def backward(
        self,
        gradient: Any = None,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
    ) -> None:
        """Add the gradient of this Tensor to `.grad` of every leaf it was made from.

        gradient: the cotangent, of this Tensor's shape; None is 1, for a single entry only.
        retain_graph: keep what the graph saved, for another pass (None: as `create_graph`).
        create_graph: make gradients that can be differentiated in their turn.

        Raises RuntimeError if nothing requires grad, for a second pass through a freed graph, and
        for a saved value that was changed in place since.
        """
        autograd.backward(self, gradient, retain_graph=retain_graph, create_graph=create_graph)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Return this leaf after setting whether gradients flow to it."""
        if requires_grad:
            require_floating("requires_grad_", self.dtype)
        elif self.node is not None:
            raise RuntimeError("requires_grad_(False) on the result of an op; use .detach()")
        self.requires_grad = bool(requires_grad)
        return self

    def retain_grad(self) -> None:
        """Fill `.grad` of this Tensor too, although an op made it."""
        autograd.retain_grad(self)

    # --- indexing and assignment ---------------------------------------------------------------

    def __getitem__(self, index: Any) -> Tensor:
        return _i.getitem(self, index=_raw_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        index = _raw_index(index)
        _i.check_index("assignment", self.data, self.shape, index)

        def write(data: Array, raw: Array) -> None:
            data[index] = raw

        self._write(_i.setitem, value, write, index=index)

    def _write(self, op: Any, value: Any, write: Callable[..., Any], **options: Any) -> Tensor:
        """Return this Tensor after writing into its memory, recorded as `op(self, value)`.

        The rules: a leaf that requires grad can be written only under `no_grad`; a view can be
        written, but not with something that requires grad, of which its base would know nothing.
        """
        is_tensor = isinstance(value, TensorBase)
        recording = (
            is_grad_enabled()
            and (self.requires_grad or (is_tensor and value.requires_grad))
            and backend.is_floating(self.dtype)
        )
        if recording and self.requires_grad and self.node is None:
            raise RuntimeError(
                "in-place write to a leaf that requires grad: its old value is what gradients "
                "refer to; write under no_grad(), or make a new Tensor"
            )
        if recording and self.view_of is not None:
            raise RuntimeError(
                "in-place write of something that requires grad to a view: the Tensor it was taken "
                "from would not know; assign through that Tensor instead, base[index] = value, or "
                "write to a .copy()"
            )
        raw = value.data if is_tensor else value
        with backend.placed("in-place write", (self.data, raw)):
            _, raw = backend.without_lists((self.data, raw))
            if recording:
                # Recorded first: what the rule saves must be found changed if this write changes it
                wanted = is_tensor and value.requires_grad
                parents = [self.node, (value.node or value) if wanted else None]
                versions = [self.version, value.version if is_tensor else NEVER_WRITTEN]
                result = op.record([self.data, raw], parents, versions, self.data, options)
                write(self.data, raw)
                rebase(self, result.node)
                self.version[1] += 1
            else:
                write(self.data, raw)
        self.note_write()
        return self

    def __iadd__(self, other: Any) -> Tensor:
        return self._write(_e.add, other, type(self.data).__iadd__)

    def __isub__(self, other: Any) -> Tensor:
        return self._write(_e.subtract, other, type(self.data).__isub__)

    def __imul__(self, other: Any) -> Tensor:
        return self._write(_e.multiply, other, type(self.data).__imul__)

    def __itruediv__(self, other: Any) -> Tensor:
        return self._write(_e.divide, other, type(self.data).__itruediv__)

    # --- arithmetic ----------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return _e.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _e.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return _e.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _e.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return _e.multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _e.multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return _e.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _e.divide(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return _e.power(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return _e.power(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return _l.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _l.matmul(other, self)

    def __neg__(self) -> Tensor:
        return _e.negative(self)

    def __pos__(self) -> Tensor:
        return self

    def __abs__(self) -> Tensor:
        return _e.abs(self)

    # --- comparisons ---------------------------------------------------------------------------

    def __eq__(self, other: Any) -> Tensor:  # type: ignore[override]  # pyrefly: ignore
        return _e.equal(self, other)

    def __ne__(self, other: Any) -> Tensor:  # type: ignore[override]  # pyrefly: ignore
        return _e.not_equal(self, other)

    def __lt__(self, other: Any) -> Tensor:
        return _e.less(self, other)

    def __le__(self, other: Any) -> Tensor:
        return _e.less_equal(self, other)

    def __gt__(self, other: Any) -> Tensor:
        return _e.greater(self, other)

    def __ge__(self, other: Any) -> Tensor:
        return _e.greater_equal(self, other)

    def __and__(self, other: Any) -> Tensor:
        return _e.bitwise_and(self, other)

    def __rand__(self, other: Any) -> Tensor:
        return _e.bitwise_and(other, self)

    def __or__(self, other: Any) -> Tensor:
        return _e.bitwise_or(self, other)

    def __ror__(self, other: Any) -> Tensor:
        return _e.bitwise_or(other, self)

    def __invert__(self) -> Tensor:
        return _e.invert(self)

    # --- functions -----------------------------------------------------------------------------

    def exp(self) -> Tensor:
        """Return e to the power of each entry."""
        return _e.exp(self)

    def log(self) -> Tensor:
        """Return the natural logarithm."""
        return _e.log(self)

    def sqrt(self) -> Tensor:
        """Return the square root."""
        return _e.sqrt(self)

    def abs(self) -> Tensor:
        """Return the absolute value."""
        return _e.abs(self)

    def tanh(self) -> Tensor:
        """Return the hyperbolic tangent."""
        return _e.tanh(self)

    def sigmoid(self) -> Tensor:
        """Return 1 / (1 + e ** -x)."""
        return _e.sigmoid(self)

    def relu(self) -> Tensor:
        """Return max(x, 0)."""
        return _e.relu(self)

    def clip(self, min: float | None = None, max: float | None = None) -> Tensor:
        """Return the entries limited to [min, max]."""
        return _e.clip(self, min=min, max=max)

    # --- reductions ----------------------------------------------------------------------------

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Return the sum over `axis` (None: over all), which `keepdims` leaves with size 1."""
        return _r.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Return the mean over `axis`; arguments as of `sum`."""
        return _r.mean(self, axis=axis, keepdims=keepdims)

    def var(self, axis: Axis = None, correction: float = 0, keepdims: bool = False) -> Tensor:
        """Return the variance over `axis`, Σ(x - mean)² / (n - correction); else as `sum`."""
        return _r.var(self, axis=axis, correction=correction, keepdims=keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Return the largest entry over `axis`, as `sum`; equal ones share the gradient."""
        return _r.max(self, axis=axis, keepdims=keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Return the smallest entry over `axis`, as `sum`; equal ones share the gradient."""
        return _r.min(self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        """Return the index of the largest entry over one `axis`; of all, flat, for None."""
        return _r.argmax(self, axis=axis, keepdims=keepdims)

    # --- shapes --------------------------------------------------------------------------------

    def reshape(self, *shape: Any) -> Tensor:
        """Return the entries in another shape; one size may be -1."""
        return _s.reshape(self, shape=_sizes(shape))

    def flatten(self, start_axis: int = 0) -> Tensor:
        """Return the axes from `start_axis` on joined into one."""
        return _s.flatten(self, start_axis)

    def transpose(self, *axes: Any) -> Tensor:
        """Return the axes permuted (none given: reversed)."""
        return _s.transpose(self, axes=_sizes(axes) if axes and axes[0] is not None else None)

    def swapaxes(self, a: int, b: int) -> Tensor:
        """Return the Tensor with axes a and b exchanged."""
        axes = list(range(self.ndim))
        axes[a], axes[b] = axes[b], axes[a]
        return _s.transpose(self, axes=tuple(axes))

    def broadcast_to(self, shape: tuple[int, ...]) -> Tensor:
        """Return the entries repeated to `shape`."""
        return _s.broadcast_to(self, shape=tuple(shape))

    def squeeze(self, axis: Axis = None) -> Tensor:
        """Return the Tensor without axes of size 1 (all of them, or those at `axis`)."""
        return _s.squeeze(self, axis)

    def expand_dims(self, axis: int) -> Tensor:
        """Return the Tensor with a new axis of size 1 at `axis`."""
        return _s.expand_dims(self, axis)

    def copy(self) -> Tensor:
        """Return a copy in memory of its own; gradients flow through."""
        return _s.copy(self)


TensorBase.tensor_class = Tensor


def raw_array(data: Any, dtype: Any = None, device: str | None = None) -> Array:
    """Return `data` as a raw array: shared where possible, Python floats as float32."""
    if isinstance(data, TensorBase):
        data = data.data
    if dtype is not None:
        dtype = backend.as_dtype(dtype)
    if backend.is_array(data):
        array = backend.as_array(data)
        backend.check_numbers(array, data)
        if dtype is not None and array.dtype != dtype:
            array = backend.cast(array, dtype)
        return array if device is None else backend.to_device(array, device)
    return backend.from_python(_without_tensors(data), dtype, device)


def _without_tensors(data: Any) -> Any:
    """Return nested lists with every Tensor in them replaced by its NumPy array."""
    if isinstance(data, (list, tuple)):
        return [_without_tensors(entry) for entry in data]
    return data.numpy() if isinstance(data, Tensor) else data


def _sizes(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Return `f(2, 3)` and `f((2, 3))` alike as (2, 3)."""
    if len(arguments) == 1 and not hasattr(arguments[0], "__index__"):
        return tuple(arguments[0])
    return arguments


def _raw_index(index: Any) -> Any:
    """Return an index with the Tensors in it replaced by their arrays."""
    if isinstance(index, TensorBase):
        return backend.copied(
            index.data
        )  # a later write must not move what the backward will look for
    if isinstance(index, tuple):
        return tuple(_raw_index(part) for part in index)
    return index
