"""Modules that hold modules: one after the other, or just listed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tinygrad_bn.nn.fusion import step
from tinygrad_bn.nn.module import Module

C = TypeVar("C", bound="_Numbered")


class _Numbered(Module):
    """A module whose submodules stand in an order: `len`, indexing, slicing, iteration, append."""

    def _fill(self, named: Iterable[tuple[str, Any]]) -> None:
        for name, module in named:
            if not isinstance(module, Module):
                raise TypeError(
                    f"{type(self).__name__}: item {name} is a {type(module).__name__}, expected a "
                    f"Module (an instance: nn.ReLU(), not nn.ReLU)"
                )
            if hasattr(type(self), name) or name in ("training", "_buffers"):
                raise ValueError(
                    f"{type(self).__name__}: {name!r} cannot name an item, the container has an "
                    f"attribute of that name; choose another"
                )
            setattr(self, name, module)

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __getitem__(self: C, index: Any) -> Any:
        """Return the module at an integer index, or a container of those in a slice."""
        if isinstance(index, slice):
            cls: Any = type(self)
            part = cls.__new__(cls)  # without __init__, which subclasses may have changed
            part.training = self.training
            part._fill(list(self.named_children())[index])
            return part
        return getattr(self, self._name(index))

    def __setitem__(self, index: int, module: Module) -> None:
        self._fill([(self._name(index), module)])

    def _name(self, index: int) -> str:
        names = [name for name, _ in self.named_children()]
        try:
            return names[operator.index(index)]
        except IndexError:
            raise IndexError(
                f"{type(self).__name__}: no item {index}, it holds {len(names)}"
            ) from None

    def append(self: C, module: Module) -> C:
        """Return this container after adding `module` at its end."""
        taken = {name for name, _ in self.named_children()}
        number = len(taken)
        while str(number) in taken:
            number += 1
        self._fill([(str(number), module)])
        return self


class Sequential(_Numbered):
    """Modules called one after the other: `Sequential(a, b)(x)` is `b(a(x))`.

    modules: Modules, which are named "0", "1", ...; or one mapping of names to Modules.

    >>> from tinygrad_bn import nn
    >>> nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): ReLU()
    )
    """

    def __init__(self, *modules: Module | Mapping[str, Module]):
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            self._fill(modules[0].items())
        else:
            self._fill((str(i), module) for i, module in enumerate(modules))

    def forward(self, x: Any) -> Any:
        """Return x after all modules, in order; some run as one, see `nn.fusion`."""
        modules = list(self.children())
        at = 0
        while at < len(modules):
            count, x = step(modules, at, x)
            at += count
        return x


class ModuleList(_Numbered):
    """A list of Modules whose parameters its owner finds; a plain list would hide them.

    >>> from tinygrad_bn import nn
    >>> layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    >>> len(layers), len(list(layers.parameters()))
    (3, 6)
    """

    def __init__(self, modules: Iterable[Module] = ()):
        self._fill((str(i), module) for i, module in enumerate(modules))

    def extend(self, modules: Iterable[Module]) -> ModuleList:
        """Return this list after adding `modules` at its end."""
        for module in modules:
            self.append(module)
        return self
