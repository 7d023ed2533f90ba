"""How a rule's parameter names become values: what a node keeps, and what a rule receives.

Each parameter of a rule is resolved once, when the rule is defined, to a *want*: an input, the
output, a shape, an option, a residual. Which rules a call needs, and so which wants it keeps,
depends on which of its inputs require grad alone; a `Plan` is made once for each such set. In the
backward pass the rules get what was kept: raw arrays or, under `create_graph`, Tensors attached to
the graph where the originals stood.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tinygrad_bn.backend import device_of
from tinygrad_bn.tape import NEVER_WRITTEN, Node, Output, TensorBase, Version, new_tensor

if TYPE_CHECKING:
    from tinygrad_bn.op import Op

Arrays = Sequence[Any]  # of a call, flat: arrays and numbers; None for an absent optional input


class Rule:
    """One function of a derivative: for all inputs of `op`, or for the input at `target` alone."""

    def __init__(self, op: Op, function: Callable[..., Any], target: int | None):
        names = list(inspect.signature(function).parameters)
        if "g" not in names:
            raise TypeError(f"{op.name}.def_vjp: the rule must take the cotangent, named 'g'")
        self.function = function
        self.target = target
        self.wants = {name: _want(op, name) for name in names if name not in ("g", "needs")}
        self.takes_needs = "needs" in names
        self.positional = names[0] == "g" and not self.takes_needs

    def by_name(self, saved: Sequence[Any], g: Any, needs: Sequence[bool]) -> dict[str, Any]:
        """Return the rule's arguments by name, as a kernel in its place takes them."""
        values = dict(zip(self.wants, saved, strict=True), g=g)
        if self.takes_needs:
            values["needs"] = needs
        return values

    def taking_from(self, kept: Sequence[str]) -> Callable[..., Any]:
        """Return the rule as a function of `g`, of the values of the names `kept`, and of `needs`.

        Most rules take one value or none, and a call with unpacked arguments takes three times as
        long as a plain one.
        """
        function = self.function
        places = [kept.index(name) for name in self.wants]
        if not self.positional:
            return lambda g, saved, needs: function(
                **self.by_name([saved[i] for i in places], g, needs)
            )
        if not places:
            return lambda g, saved, needs: function(g)
        if len(places) == 1:
            (place,) = places
            return lambda g, saved, needs: function(g, saved[place])
        return lambda g, saved, needs: function(g, *[saved[i] for i in places])


class Plan:
    """What a call of `op` keeps, and the rules that take its cotangent back.

    needs: for each flat input, whether it requires grad.
    wants: what is kept, by name.
    pulls: the rules as functions of `(g, saved, needs)`, with the input each is for (None: all).
    joint: whether there is but one rule, for all inputs.
    pick: a function from `(*inputs, output)` to what is kept of them, if nothing else is kept.
    """

    def __init__(self, op: Op, needs: tuple[bool, ...]):
        rules = [rule for rule in op.rules if rule.target is None or needs[rule.target]]
        self.op = op
        self.needs = needs
        self.wants: Mapping[str, _Want] = {k: v for rule in rules for k, v in rule.wants.items()}
        self.pulls = [(rule.target, rule.taking_from(list(self.wants))) for rule in rules]
        self.joint = any(rule.target is None for rule in rules)
        self.pick = _picker(self.wants.values())
        self._guarded = self.guarded(outputs=1)

    def keep(
        self,
        node: Node,
        arrays: Arrays,
        versions: Sequence[Version],
        result: Any,
        options: Mapping[str, Any],
        residuals: Mapping[str, Any],
    ) -> None:
        """Have `node` keep the wanted values of a call, and the versions of what may be written to.

        result: the Tensor that the call made, or a tuple of them.
        """
        if type(result) is tuple:
            out: Any = tuple([tensor.data for tensor in result])
            # Output i is called -1 - i.
            versions = [*versions, *[tensor.version for tensor in reversed(result)]]
            guarded = self.guarded(len(result))
        elif self.pick is not None:
            node.saved = self.pick((*arrays, result.data))
            node.guards = self.pick((*versions, result.version))
            return
        else:
            out, versions, guarded = result.data, [*versions, result.version], self._guarded
        wants = self.wants.values()
        node.saved = tuple([want.read(arrays, out, options, residuals) for want in wants])
        node.guards = tuple([versions[i] for i in guarded])

    def guarded(self, outputs: int) -> list[int]:
        """Return what each guard of a node is of: a flat input, or -1 - i for output i."""
        inputs = len(self.needs)
        return [i for want in self.wants.values() for i in want.guarded(inputs, outputs)]

    def attached(self, node: Node) -> tuple[Any, ...]:
        """Return what `node` saved as a rule on Tensors gets it."""
        guards = iter(node.guards)
        kept: Any = zip(self.wants.values(), node.saved, strict=True)  # pyrefly: ignore
        return tuple([want.attach(value, node, guards) for want, value in kept])


def _picker(wants: Collection[_Want]) -> Callable[..., tuple] | None:
    """Return a function from `(*inputs, output)` to those wanted; None if more is wanted."""
    places = [want.place for want in wants]
    if None in places:
        return None
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places) if places else lambda values: ()


def _want(op: Op, name: str) -> _Want:
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

    `read(arrays, out, options, residuals)` takes it from a call, and `guarded` tells which inputs
    and outputs of the call it is part of, whose versions the node then keeps. `attach` turns it
    into what a rule on Tensors gets, and takes as many versions from `guards`.

    place: where it stands in `(*inputs, output)`; None for what does not stand there.
    """

    place: int | None = None

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        raise NotImplementedError

    def guarded(self, inputs: int, outputs: int) -> Sequence[int]:
        return ()

    def attach(self, value: Any, node: Node, guards: Iterator[Version]) -> Any:
        return value


class _Input(_Want):
    def __init__(self, index: int):
        self.index = self.place = index

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        return arrays[self.index]

    def guarded(self, inputs: int, outputs: int) -> Sequence[int]:
        return (self.index,)

    def attach(self, value: Any, node: Node, guards: Iterator[Version]) -> Any:
        return _attached(value, node.parents[self.index], next(guards))


class _Rest(_Want):
    def __init__(self, start: int):
        self.start = start

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        return tuple(arrays[self.start :])

    def guarded(self, inputs: int, outputs: int) -> Sequence[int]:
        return range(self.start, inputs)

    def attach(self, value: Any, node: Node, guards: Iterator[Version]) -> Any:
        parents = node.parents[self.start :]
        return tuple([_attached(v, p, next(guards)) for v, p in zip(value, parents, strict=True)])


class _Out(_Want):
    place = -1  # behind the inputs

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        return out

    def guarded(self, inputs: int, outputs: int) -> Sequence[int]:
        return range(-1, -1 - outputs, -1)

    def attach(self, value: Any, node: Node, guards: Iterator[Version]) -> Any:
        if type(value) is tuple:
            places = enumerate(value)
            return tuple([_attached(v, Output(node, i), next(guards)) for i, v in places])
        return _attached(value, node, next(guards))


class _Attribute(_Want):
    def __init__(self, attribute: str, index: int):
        self.attribute = attribute
        self.index = index

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        return _attribute(arrays[self.index], self.attribute)


class _RestAttribute(_Want):
    def __init__(self, attribute: str, start: int):
        self.attribute = attribute
        self.start = start

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        return tuple([_attribute(array, self.attribute) for array in arrays[self.start :]])


class _Option(_Want):
    def __init__(self, name: str, default: Any):
        self.name = name
        self.default = default

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        return options.get(self.name, self.default)


class _Residual(_Want):
    def __init__(self, op_name: str, name: str):
        self.op_name = op_name
        self.name = name

    def read(self, arrays: Arrays, out: Any, options: Any, residuals: Any) -> Any:
        if self.name not in residuals:
            raise TypeError(
                f"{self.op_name}: its derivative rule asks for {self.name!r}, which is no input, "
                f"no option and none of the residuals of its forward ({sorted(residuals)})"
            )
        return residuals[self.name]

    def attach(self, value: Any, node: Node, guards: Iterator[Version]) -> Any:
        # A floating residual depends on the inputs. Handing it out here would freeze it: right at
        # first order and wrong at second.
        return value if _is_discrete(value) else None


def _attached(value: Any, parent: Any, version: Version) -> Any:
    """Return the Tensor that `value` came from, or one in its place of the graph."""
    if isinstance(parent, TensorBase):
        return parent
    if version is NEVER_WRITTEN:
        return value  # it came as a raw array or a number
    tensor = new_tensor(value, parent)
    tensor.version = version  # so that later writes are seen
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


def _attribute(array: Any, attribute: str) -> Any:
    if attribute == "device":
        return device_of(array)
    return getattr(array, attribute, () if attribute == "shape" else None)
