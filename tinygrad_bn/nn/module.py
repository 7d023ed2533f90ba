"""The Module: layers and networks as trees of objects that hold parameters, buffers and modules.

There is no registration to go through: a module's parameters, buffers and submodules are its plain
attributes, found by looking at them, in the order in which they were first set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from tinygrad_bn import backend
from tinygrad_bn.backend import placed, several_devices
from tinygrad_bn.backend.creation import like
from tinygrad_bn.backend.recording import each_time, watching
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.tape import TensorBase
from tinygrad_bn.tensor import Tensor

Self = TypeVar("Self", bound="Module")


class StateDictError(ValueError, RuntimeError):
    """Says all that keeps a state dict from being loaded (a RuntimeError too, as in PyTorch)."""


class Mismatch(NamedTuple):
    """The names that `load_state_dict(strict=False)` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A layer or network: a callable with parameters, buffers and submodules.

    Subclasses set Parameters and Modules as attributes and define `forward`; a Tensor that is
    state but not trained is set with `register_buffer`. `training` tells which mode it is in.

    >>> from tinygrad_bn import nn
    >>> class Twice(nn.Module):
    ...     def __init__(self):
    ...         self.inner = nn.Linear(3, 3)
    ...
    ...     def forward(self, x):
    ...         return self.inner(self.inner(x))
    >>> [name for name, _ in Twice().named_parameters()]
    ['inner.weight', 'inner.bias']
    """

    training: bool
    _buffers: dict[str, bool]  # name -> whether it belongs to the state dict
    _hooks: dict[object, Callable]  # called after each forward

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make the module ready for attributes; a subclass need not call super().__init__()."""
        self = super().__new__(cls)
        vars(self)["training"] = True
        vars(self)["_buffers"] = {}
        vars(self)["_hooks"] = {}
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        if (
            isinstance(before, Parameter)
            and isinstance(value, TensorBase)
            and not isinstance(value, Parameter)
        ):
            raise TypeError(
                f"{type(self).__name__}.{name} is a Parameter and was to be replaced by a "
                f"{type(value).__name__}, which would not be trained; wrap it, "
                f"nn.Parameter(value), or write into it under no_grad: {name}[...] = value"
            )
        if "." in name:
            raise ValueError(f"{name!r} cannot name a part of a module: state dicts join with '.'")
        object.__setattr__(self, name, value)

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Set attribute `name` to a Tensor that is state: it moves and is saved with the module.

        value: the Tensor, or None for a buffer that this module does without.
        persistent: whether the state dict holds it.
        """
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"register_buffer: {name!r} is a {type(value).__name__}, expected a Tensor or "
                f"None; use tg.tensor(value)"
            )
        self._buffers[name] = persistent
        setattr(self, name, value)

    # --- calling -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's result; subclasses define it."""
        raise NotImplementedError(
            f"{type(self).__name__} defines no forward(), which calling a module runs"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` makes of the arguments, after the hooks have seen it."""
        watch: Any = watching()
        if watch is not None:
            watch.saw_module(self)
        if several_devices() and args and isinstance(args[0], TensorBase):
            # The current device goes with the input, for what a layer does on raw arrays.
            with placed(type(self).__name__, (args[0].data,)):
                out = self.forward(*args, **kwargs)
        else:
            out = self.forward(*args, **kwargs)
        # A list of a dict's values is made in one go; a tuple is not without Python's global lock,
        # and another thread may be setting a hook.
        for hook in list(self._hooks.values()):
            changed = hook(self, args, out)
            out = out if changed is None else changed
        return out

    def register_forward_hook(self, hook: Callable[[Module, tuple, Any], Any]) -> Callable:
        """Have `hook(module, args, out)` called after each forward; return what removes it again.

        hook: may look at the output, or return another in its place; None leaves it as it is.

        >>> from tinygrad_bn import nn
        >>> import tinygrad_bn as tg
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> seen = []
        >>> remove = model[0].register_forward_hook(
        ...     lambda module, args, out: seen.append(out.shape)
        ... )
        >>> y = model(tg.ones(4, 3))
        >>> remove()
        >>> seen
        [(4, 2)]
        """
        key = object()
        self._hooks[key] = hook

        def remove() -> None:
            self._hooks.pop(key, None)

        return remove

    @property
    def has_hooks(self) -> bool:
        """Whether anything is called after each forward."""
        return bool(self._hooks)

    # --- its parts -----------------------------------------------------------------------------

    def _own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, v) for name, v in vars(self).items() if isinstance(v, Parameter))

    def _own_buffers(self) -> Iterator[tuple[str, Tensor]]:
        found = ((name, getattr(self, name, None)) for name in self._buffers)
        return ((name, value) for name, value in found if value is not None)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for the modules directly inside."""
        return ((name, v) for name, v in vars(self).items() if isinstance(v, Module))

    def children(self) -> Iterator[Module]:
        """Yield the modules directly inside."""
        return (child for _, child in self.named_children())

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield (dotted name, module) for this module (its name is `prefix`) and all inside.

        A module that appears in several places is reported once, under its first name.
        """
        seen: set[int] = set()
        stack: list[tuple[str, Module]] = [(prefix, self)]
        while stack:
            path, module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield path, module
            inside = [(_join(path, name), child) for name, child in module.named_children()]
            stack.extend(reversed(inside))

    def modules(self) -> Iterator[Module]:
        """Yield this module and all inside, each once."""
        return (module for _, module in self.named_modules())

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Yield (dotted name, parameter); a shared parameter once, under its first name."""
        return _once(self, Module._own_parameters, prefix)

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters of this module and all inside, each once."""
        return (parameter for _, parameter in self.named_parameters())

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield (dotted name, buffer), each buffer once."""
        return _once(self, Module._own_buffers, prefix)

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers of this module and all inside, each once."""
        return (buffer for _, buffer in self.named_buffers())

    def apply(self: Self, function: Callable[[Module], Any]) -> Self:
        """Return this module after calling `function` on every module inside, itself last."""
        for module in reversed(list(self.modules())):
            function(module)
        return self

    # --- modes ---------------------------------------------------------------------------------

    def train(self: Self, mode: bool = True) -> Self:
        """Return this module with it and all inside in training mode (or not)."""
        for module in self.modules():
            module.training = bool(mode)
        return self

    def eval(self: Self) -> Self:
        """Return this module with it and all inside in evaluation mode."""
        return self.train(False)

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Return this module after setting whether gradients flow to its parameters."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        """Set `.grad` of every parameter to None."""
        each_time(self._drop_gradients)

    def _drop_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    # --- devices and dtypes --------------------------------------------------------------------

    def to(self: Self, device: str) -> Self:
        """Return this module with its parameters and buffers on `device`.

        The Parameters stay the same objects, so an optimizer that was given them stays valid;
        gradients move along.
        """
        for tensor in (*self.parameters(), *self.buffers()):
            _rehome(tensor, lambda array: backend.to_device(array, device))
        return self

    def cpu(self: Self) -> Self:
        """Return this module with its parameters and buffers in host memory."""
        return self.to("cpu")

    def cuda(self: Self) -> Self:
        """Return this module with its parameters and buffers on the current GPU."""
        return self.to("cuda")

    def astype(self: Self, dtype: Any) -> Self:
        """Return this module with its floating parameters and buffers converted to `dtype`.

        Batch norm keeps its own in float32 at least: they are averages over many values.
        """
        dtype = backend.as_dtype(dtype)
        if not backend.is_floating(dtype):
            raise TypeError(f"astype: {dtype} is not floating, expected for example 'float32'")
        for module in self.modules():
            kept = module._dtype_for(dtype)
            for _, tensor in (*module._own_parameters(), *module._own_buffers()):
                if backend.is_floating(tensor.dtype) and tensor.dtype != kept:
                    _rehome(tensor, lambda array, kept=kept: backend.cast(array, kept))
        return self

    def _dtype_for(self, dtype: Any) -> Any:
        """Return the dtype that this module's own tensors take when `dtype` is asked for."""
        return dtype

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return all parameters and persistent buffers by dotted name, sharing their memory.

        Training goes on to change them: `copy.deepcopy` it to keep a moment. Names and shapes are
        PyTorch's. What several modules share appears under each of its names.
        """
        return {name: tensor.detach() for name, tensor in self._state(prefix)}

    def _state(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._own_parameters():
            yield _join(prefix, name), parameter
        for name, buffer in self._own_buffers():
            if self._buffers[name]:
                yield _join(prefix, name), buffer
        for name, child in self.named_children():
            yield from child._state(_join(prefix, name))

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Return the names passed over, after writing `state` into parameters and buffers.

        state: arrays or Tensors by dotted name, of any device; converted to the module's dtypes.
        strict: require the very names of `state_dict()`; otherwise load what both have.

        Nothing is written unless everything fits. Raises StateDictError, a ValueError, that lists
        all missing and unexpected names and all shapes that differ.
        """
        sized = [m for path, m in self.named_modules() if m._take_sizes(state, _join(path, ""))]
        own = dict(self._state())
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        problems = [f"missing: {name}" for name in missing] if strict else []
        problems += [f"unexpected: {name}" for name in unexpected] if strict else []
        incoming = {}
        for name, tensor in own.items():
            if name not in state:
                continue
            value = state[name]
            raw = value.data if isinstance(value, TensorBase) else value
            if not backend.is_array(raw):
                problems.append(f"{name} is a {type(raw).__name__}, expected an array or a Tensor")
            elif tuple(raw.shape) != tensor.shape:
                problems.append(f"{name} has shape {tuple(raw.shape)}, expected {tensor.shape}")
            incoming[name] = raw
        if problems:
            for module in sized:
                module._forget_sizes()
            raise StateDictError(
                f"load_state_dict: the state does not fit this {type(self).__name__}, and nothing "
                f"was loaded:\n  "
                + "\n  ".join(problems)
                + _advice(strict and missing + unexpected)
            )
        for name, raw in incoming.items():
            tensor = own[name]
            with placed("load_state_dict", (tensor.data,)):
                tensor.data[...] = like(backend.as_array(raw), tensor.data)
            tensor.note_write()
        return Mismatch(missing, unexpected)

    def _take_sizes(self, state: Mapping[str, Any], prefix: str) -> bool:
        """Return whether sizes that were left open are taken from `state`, where the names of this
        module start with `prefix`."""
        return False

    def _forget_sizes(self) -> None:
        """Leave the sizes open again."""

    # --- text ----------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Return what stands between the brackets of this module's repr."""
        return ""

    def __repr__(self) -> str:
        inside = [f"({name}): {child!r}" for name, child in self.named_children()]
        extra = self.extra_repr()
        if not inside:
            return f"{type(self).__name__}({extra})"
        body = "\n".join([extra, *inside] if extra else inside).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _once(
    root: Module, own: Callable[[Module], Iterator[tuple[str, Any]]], prefix: str
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for what `own` finds in every module, each value once."""
    seen: set[int] = set()
    for path, module in root.named_modules(prefix):
        for name, value in own(module):
            if id(value) not in seen:
                seen.add(id(value))
                yield _join(path, name), value


def _rehome(tensor: Tensor, convert: Callable[[Any], Any]) -> None:
    """Give `tensor` and its gradient converted data, keeping the Tensor's identity."""
    data = convert(tensor.data)
    if data is not tensor.data:
        tensor.data = data
        tensor.note_write()  # a backward that was pending needs the old one
    if tensor.grad is not None:
        tensor.grad.data = convert(tensor.grad.data)


def _advice(names: Any) -> str:
    return "\nPass strict=False to load the names that both have." if names else ""
