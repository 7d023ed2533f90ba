"""What a captured step was seen to use: whether a replay of it would still be right.

Replays read and write the memory that the recording did. So the Tensors of the modules, leaves and
optimizers that took part must have the memory they had, modules the settings they had, and leaves
the gradients they had, where the step adds to them. Gradients are put back after a replay: the
recorded `.grad` of each leaf is what the graph has just filled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tinygrad_bn.backend.recording import CaptureError, Watch
from tinygrad_bn.tape import TensorBase

_ABSENT = object()
#: Settings that are compared by value; anything else is the same only as the same object.
_PLAIN = (bool, int, float, str)


class _Gradient:
    """The `.grad` of a leaf: as the step began, as the backward met it, and as the step ended."""

    def __init__(self, leaf: Any, start: Any):
        self.leaf = leaf
        self.met = leaf.grad
        self.memory = None if self.met is None else self.met.data
        #: Whether a replay has to begin with what was met; not if the step itself made it so.
        self.needed = start is self.met
        self.end: Any = None

    def holds(self) -> bool:
        """Return whether a replay would begin with what the recording began with."""
        now = self.leaf.grad
        return not self.needed or (now is self.met and (now is None or now.data is self.memory))


class StepWatch(Watch):
    """A `Watch` that also knows Tensors, modules and gradients.

    leaves: those that an earlier run gave gradients to; what these are now is what they are as the
        step begins.
    """

    def __init__(self, recorder: Any, recording: bool, leaves: Iterable[Any] = ()):
        super().__init__(recorder, recording)
        self._tensors: dict[int, tuple[Any, Any, bool]] = {}
        self._modules: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._gradients: dict[int, _Gradient] = {}
        self._starts = {id(leaf): leaf.grad for leaf in leaves}

    # --- while the step runs -------------------------------------------------------------------

    def saw(self, *tensors: Any) -> None:
        """Note Tensors that the step takes from outside."""
        for tensor in tensors:
            if id(tensor) not in self._tensors:
                self._tensors[id(tensor)] = tensor, tensor.data, tensor.requires_grad

    def saw_module(self, module: Any) -> None:
        """Note a module that the step calls, with its settings and Tensors."""
        if id(module) not in self._modules:
            settings = dict(vars(module))
            self._modules[id(module)] = module, settings
            self.saw(*(value for value in settings.values() if isinstance(value, TensorBase)))

    def saw_gradient(self, leaf: Any) -> None:
        """Note that `leaf.grad` is about to be made, added to or used."""
        if id(leaf) not in self._gradients:
            self._gradients[id(leaf)] = _Gradient(leaf, self._starts.get(id(leaf), leaf.grad))
        self.saw(leaf)

    def leaves(self) -> list[Any]:
        """Return the leaves whose gradients the step made or used."""
        return [gradient.leaf for gradient in self._gradients.values()]

    # --- when it has been recorded -------------------------------------------------------------

    def finish(self, name: str) -> None:
        """Note how things are at the end; raise CaptureError for what replays would not do."""
        for tensor, memory, _ in self._tensors.values():
            if tensor.data is not memory:
                raise CaptureError(
                    f"capture: {name} gives a Tensor of shape {tensor.shape} new memory, and "
                    f"replays go on with the old; write in place, t[...] = value"
                )
        for key, (module, before) in self._modules.items():
            for setting, value in vars(module).items():
                if value is not before.get(setting, _ABSENT) and _would_be_missed(
                    before.get(setting), value
                ):
                    raise CaptureError(
                        f"capture: {name} changes {setting!r} of a {type(module).__name__}, which "
                        f"replays would not do; keep it in a Tensor, and write in place"
                    )
            self._modules[key] = module, dict(vars(module))
        for gradient in self._gradients.values():
            gradient.end = gradient.leaf.grad

    # --- before and after a replay -------------------------------------------------------------

    def broken(self) -> str | None:
        """Return what has changed that replays rely on, in words, or None."""
        for tensor, memory, requires_grad in self._tensors.values():
            if tensor.data is not memory:
                return f"a Tensor of shape {tensor.shape} has other memory"
            if tensor.requires_grad != requires_grad:
                return f"a Tensor of shape {tensor.shape} has another requires_grad"
        for module, settings in self._modules.values():
            changed = _changed(module, settings)
            if changed is not None:
                return f"{changed!r} of a {type(module).__name__} is another"
        for gradient in self._gradients.values():
            if not gradient.holds():
                shape = gradient.leaf.shape
                return f"the .grad of a Tensor of shape {shape}, which the step adds to, is another"
        return next((what for what, holds in self.conditions if not holds()), None)

    def moved(self) -> bool:
        """Return whether some Tensor has other memory now, so that no replay can be right."""
        return any(tensor.data is not memory for tensor, memory, _ in self._tensors.values())

    def restore_gradients(self) -> None:
        """Give each leaf the gradient that the graph fills."""
        for gradient in self._gradients.values():
            gradient.leaf.grad = gradient.end


def _changed(module: Any, settings: dict[str, Any]) -> str | None:
    """Return the name of an attribute that is not what it was, or None."""
    now = vars(module)
    if len(now) != len(settings):
        return next(iter(now.keys() ^ settings.keys()))
    for name, before in settings.items():
        value = now.get(name, _ABSENT)
        if value is not before and not (
            type(value) is type(before) and type(value) in _PLAIN and value == before
        ):
            return name
    return None


def _would_be_missed(before: Any, value: Any) -> bool:
    """Return whether an attribute that a step has changed so is state that it counts on.

    A number that counts and a Tensor that is handed on are. A switch that is set and set back is
    not, nor is what layers keep in containers of their own.
    """
    if isinstance(value, TensorBase):
        return True
    return type(value) in (int, float, str) and value != before
