"""How a rule's parameter names become values: what a node keeps, and what a rule receives.

Each parameter of a rule is resolved once, when the rule is defined, to a *want*: an input, the
output, a shape, an option, a residual. Wants read their values when the op has been called; `apply`
hands them to the rule in the backward pass, as raw arrays or, under `create_graph`, as
Tensors attached to the graph where the originals stood.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinygrad_bn.backend import device_of
from tinygrad_bn.tape import Node, Output, TensorBase, new_tensor

if TYPE_CHECKING:
    from tinygrad_bn.op import Op

Args = Sequence[Any]  # of a call, flat: Tensors, arrays, numbers; None for an absent optional input


class Rule:
    """One function of a derivative: for all inputs of `op`, or for the input at `target` alone."""

    def __init__(self, op: Op, function: Callable[..., Any], target: int | None):
        names = list(inspect.signature(function).parameters)
        if "g" not in names:
            raise TypeError(f"{op.name}.def_vjp: the rule must take the cotangent, named 'g'")
        self.function = function
        self.target = target
        self.names = [name for name in names if name not in ("g", "needs")]
        self.wants = [_want(op, name) for name in self.names]
        self.takes_needs = "needs" in names
        self.positional = names[0] == "g" and not self.takes_needs

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> tuple:
        """Return the wanted values of a call that was recorded as `node`.

        A tuple: of arrays alone, it is not the garbage collector's concern.
        """
        if not self.wants:
            return ()
        return tuple([want.keep(node, args, options, result, residuals) for want in self.wants])

    def apply(
        self,
        node: Node,
        saved: Sequence[Any],
        g: Any,
        needs: Sequence[bool] | None,
        as_tensors: bool,
    ) -> Any:
        """Return what the rule makes of the cotangent `g` and the saved values."""
        if as_tensors:
            saved = [
                want.attach(value, node) for want, value in zip(self.wants, saved, strict=True)
            ]
        if self.positional:
            return self.function(g, *saved)
        return self.function(**self.by_name(saved, g, needs))

    def by_name(self, saved: Sequence[Any], g: Any, needs: Sequence[bool] | None) -> dict[str, Any]:
        """Return the rule's arguments by name, as a kernel in its place takes them."""
        values = dict(zip(self.names, saved, strict=True), g=g)
        if self.takes_needs:
            values["needs"] = needs
        return values


def _want(op: Op, name: str) -> Any:
    """Return the want for one parameter name of a rule of `op`."""
    base, _, suffix = name.rpartition("_")
    if name == "out":
        return _Out()
    if name in op.inputs:
        return _Input(op.inputs.index(name))
    if name == op.variadic:
        return _Rest(len(op.inputs))
    if name in op.defaults:
        return _Option(name, op.defaults[name])
    if suffix in ("shape", "dtype", "device") and base in op.inputs:
        return _Attribute(suffix, op.inputs.index(base))
    if suffix in ("shape", "dtype") and base == op.variadic:
        return _RestAttribute(suffix, len(op.inputs))
    return _Residual(op.name, name)


class _Want:
    """One value that a rule asks for.

    `keep(node, args, options, result, residuals)` reads it when the op has been called, and guards
    it on `node` if a later write could change it; `attach` turns it into what a rule on Tensors
    gets.
    """

    def attach(self, value: Any, node: Node) -> Any:
        return value


class _Input(_Want):
    def __init__(self, index: int):
        self.index = index

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        arg = args[self.index]
        if isinstance(arg, TensorBase):
            node.guards += ((self.index, arg.version),)
            return arg.data
        return arg

    def attach(self, value: Any, node: Node) -> Any:
        return _attached(value, self.index, node)


class _Rest(_Want):
    def __init__(self, start: int):
        self.start = start

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        rest = enumerate(args[self.start :], self.start)
        return tuple(_guarded(arg, i, node) for i, arg in rest)

    def attach(self, value: Any, node: Node) -> Any:
        return tuple(_attached(v, i, node) for i, v in enumerate(value, self.start))


class _Out(_Want):
    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        if type(result) is tuple:
            return tuple(_guarded(tensor, -1 - i, node) for i, tensor in enumerate(result))
        return _guarded(result, -1, node)

    def attach(self, value: Any, node: Node) -> Any:
        if type(value) is tuple:
            return tuple(
                _sharing_version(new_tensor(v, Output(node, i)), -1 - i, node)
                for i, v in enumerate(value)
            )
        return _sharing_version(new_tensor(value, node), -1, node)


class _Attribute(_Want):
    def __init__(self, attribute: str, index: int):
        self.attribute = attribute
        self.index = index

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        return _attribute(args[self.index], self.attribute)


class _RestAttribute(_Want):
    def __init__(self, attribute: str, start: int):
        self.attribute = attribute
        self.start = start

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        return tuple(_attribute(arg, self.attribute) for arg in args[self.start :])


class _Option(_Want):
    def __init__(self, name: str, default: Any):
        self.name = name
        self.default = default

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        return options.get(self.name, self.default)


class _Residual(_Want):
    def __init__(self, op_name: str, name: str):
        self.op_name = op_name
        self.name = name

    def keep(self, node: Node, args: Args, options: Any, result: Any, residuals: Any) -> Any:
        if self.name not in residuals:
            raise TypeError(
                f"{self.op_name}: its derivative rule asks for {self.name!r}, which is no input, "
                f"no option and none of the residuals of its forward ({sorted(residuals)})"
            )
        return residuals[self.name]

    def attach(self, value: Any, node: Node) -> Any:
        # A floating residual depends on the inputs. Handing it out here would freeze it: right at
        # first order and wrong at second.
        return value if _is_discrete(value) else None


def _guarded(arg: Any, index: int, node: Node) -> Any:
    if isinstance(arg, TensorBase):
        node.guards += ((index, arg.version),)
        return arg.data
    return arg


def _attached(value: Any, index: int, node: Node) -> Any:
    parent = node.parents[index]
    if isinstance(parent, TensorBase):
        return parent
    if parent is None and all(i != index for i, _ in node.guards):
        return value  # it came as a raw array or a number
    return _sharing_version(new_tensor(value, parent), index, node)


def _sharing_version(tensor: Any, index: int, node: Node) -> Any:
    """Return `tensor` with the version of the original, so that later writes are seen."""
    tensor.version = next(version for i, version in node.guards if i == index)
    return tensor


def _is_discrete(value: Any) -> bool:
    """Return whether a residual holds nothing floating, hence is constant between the kinks."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None:
        return dtype.kind in "iub"
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return all(map(_is_discrete, value))
    return not isinstance(value, (float, complex))


def _attribute(arg: Any, attribute: str) -> Any:
    if isinstance(arg, TensorBase):
        arg = arg.data
    if attribute == "device":
        return device_of(arg)
    return getattr(arg, attribute, () if attribute == "shape" else None)
