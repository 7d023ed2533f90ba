"""How a derivative rule's parameter names become values: what a node keeps, and what a rule receives.

Each parameter of a rule is resolved once, when the rule is defined, to a *want*: an input, the
output, a shape, an option, a residual. `save` reads the wanted values when the op has been called;
`apply` hands them to the rule in the backward pass, as raw arrays or, under `create_graph`, as
Tensors attached to the graph where the originals stood.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tinygrad_bn.autograd import Node, Output, TensorBase, new_tensor
from tinygrad_bn.backend import device_of, is_floating

if TYPE_CHECKING:
    from tinygrad_bn.op import Op


class Call(NamedTuple):
    """What a want may look at when an op has just been called."""

    node: Node
    args: Sequence[Any]  # Tensors, raw arrays, numbers; None for an absent optional input
    options: Mapping[str, Any]
    result: Any  # the output Tensor, or a tuple of them
    residuals: Mapping[str, Any]


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

    def save(self, call: Call) -> list[Any]:
        """Return the wanted values of a call, guarding those that a later write could change."""
        return [want.keep(call) for want in self.wants]

    def apply(
        self, node: Node, saved: list[Any], g: Any, needs: Sequence[bool], as_tensors: bool
    ) -> Any:
        """Return what the rule makes of the cotangent `g`."""
        if as_tensors:
            saved = [want.attach(value, node) for want, value in zip(self.wants, saved, strict=True)]
        if self.positional:
            return self.function(g, *saved)
        return self.function(**self.by_name(saved, g, needs))

    def by_name(self, saved: list[Any], g: Any, needs: Sequence[bool]) -> dict[str, Any]:
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
    """keep: read the value when the op is called. attach: turn it into what a Tensor rule gets."""

    def keep(self, call: Call) -> Any:
        raise NotImplementedError  # pragma: no cover

    def attach(self, value: Any, node: Node) -> Any:
        return value


class _Input(_Want):
    def __init__(self, index: int):
        self.index = index

    def keep(self, call: Call) -> Any:
        return _guarded(call.args[self.index], self.index, call.node)

    def attach(self, value: Any, node: Node) -> Any:
        return _attached(value, self.index, node)


class _Rest(_Want):
    def __init__(self, start: int):
        self.start = start

    def keep(self, call: Call) -> Any:
        rest = enumerate(call.args[self.start :], self.start)
        return tuple(_guarded(arg, i, call.node) for i, arg in rest)

    def attach(self, value: Any, node: Node) -> Any:
        return tuple(_attached(v, i, node) for i, v in enumerate(value, self.start))


class _Out(_Want):
    def keep(self, call: Call) -> Any:
        if type(call.result) is tuple:
            return tuple(_guarded(tensor, -1, call.node) for tensor in call.result)
        return _guarded(call.result, -1, call.node)

    def attach(self, value: Any, node: Node) -> Any:
        if type(value) is tuple:
            return tuple(new_tensor(v, Output(node, i)) for i, v in enumerate(value))
        return new_tensor(value, node)


class _Attribute(_Want):
    def __init__(self, attribute: str, index: int):
        self.attribute = attribute
        self.index = index

    def keep(self, call: Call) -> Any:
        return _attribute(call.args[self.index], self.attribute)


class _RestAttribute(_Want):
    def __init__(self, attribute: str, start: int):
        self.attribute = attribute
        self.start = start

    def keep(self, call: Call) -> Any:
        return tuple(_attribute(arg, self.attribute) for arg in call.args[self.start :])


class _Option(_Want):
    def __init__(self, name: str, default: Any):
        self.name = name
        self.default = default

    def keep(self, call: Call) -> Any:
        return call.options.get(self.name, self.default)


class _Residual(_Want):
    def __init__(self, op_name: str, name: str):
        self.op_name = op_name
        self.name = name

    def keep(self, call: Call) -> Any:
        if self.name not in call.residuals:
            raise TypeError(
                f"{self.op_name}: its derivative rule asks for {self.name!r}, which is no input, no "
                f"option and none of the residuals of its forward ({sorted(call.residuals)})"
            )
        return call.residuals[self.name]

    def attach(self, value: Any, node: Node) -> Any:
        # A floating residual depends on the inputs. Handing it out here would freeze it: right at
        # first order and wrong at second.
        dtype = getattr(value, "dtype", None)
        return None if dtype is not None and is_floating(dtype) else value


def _guarded(arg: Any, index: int, node: Node) -> Any:
    if isinstance(arg, TensorBase):
        node.guards.append((index, arg.version, arg.version[0]))
        return arg.data
    return arg


def _attached(value: Any, index: int, node: Node) -> Any:
    parent = node.parents[index]
    if parent is None:
        return value
    if isinstance(parent, TensorBase):
        return parent
    tensor = new_tensor(value, parent)
    # Share the original's version, so that later writes are seen by what is recorded now.
    tensor.version = next(version for i, version, _ in node.guards if i == index)
    return tensor


def _attribute(arg: Any, attribute: str) -> Any:
    if isinstance(arg, TensorBase):
        arg = arg.data
    if attribute == "device":
        return device_of(arg)
    return getattr(arg, attribute, () if attribute == "shape" else None)
