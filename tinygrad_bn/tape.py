"""What is on the tape: Tensors as the tape sees them, and the nodes that ops leave behind them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tinygrad_bn.backend import is_floating
from tinygrad_bn.backend.recording import each_time

if TYPE_CHECKING:
    from tinygrad_bn.op import Op
    from tinygrad_bn.rule import Plan

#: The clock of the tape: nodes and writes are numbered in the order in which they happen.
_tick = itertools.count(1).__next__

Version = list[int]
#: The version of what is no Tensor: a raw array, whose writes the tape does not see, or a number.
NEVER_WRITTEN: Version = [0, 0]


class TensorBase:
    """What the tape needs to know of a Tensor; `tensor.Tensor` adds the operators and methods.

    data: the raw array.
    requires_grad: whether gradients flow to it.
    grad: its accumulated gradient (a Tensor) or None.
    node: the `Node` or `Output` that made it; None for a leaf.
    version: `[when it was last written to, number of recorded writes]`, one list shared by all
        views of one memory; 0 for never.
    view_of: for a view, the number of recorded writes when it was taken; None otherwise.
    """

    __slots__ = ("__weakref__", "data", "grad", "node", "requires_grad", "version", "view_of")

    #: The class of op results; `tensor.py` puts itself here, since this floor cannot import it.
    tensor_class: ClassVar[type[TensorBase]]

    data: Any
    grad: Any
    node: Node | Output | None
    requires_grad: bool
    version: Version
    view_of: int | None

    def note_write(self) -> None:
        """Note a write into this memory: a backward that needs what was there will refuse."""
        each_time(self._mark_written)

    def _mark_written(self) -> None:
        self.version[0] = _tick()


def new_tensor(data: Any, node: Node | Output | None = None) -> Any:
    """Return a Tensor around a proper array, made by `node`."""
    tensor = _new(TensorBase.tensor_class)
    tensor.data = data
    tensor.requires_grad = node is not None
    tensor.grad = None
    tensor.node = node
    tensor.version = [0, 0]
    tensor.view_of = None
    return tensor


_new = object.__new__


class Node:
    """One recorded op.

    plan: of its op, for those of its inputs that require grad: what is saved, and the rules.
    parents: for each flat array input, where its cotangent goes: a Node, an Output or a leaf
        Tensor, or None for an input that needs no gradient.
    shape, dtype: of the output; tuples of them for several outputs.
    saved: the values that the rules asked for; None once freed.
    guards: the versions of the inputs and outputs among them.
    retained: a weak reference to the Tensor that wants its gradient kept, or None; for several
        outputs, such references by index.
    time: when it was recorded; what it saved must not have been written to since.
    """

    __slots__ = (
        "__weakref__",
        "dtype",
        "guards",
        "parents",
        "plan",
        "retained",
        "saved",
        "shape",
        "time",
    )

    def __init__(self, plan: Plan, parents: Sequence[Any], shape: Any, dtype: Any):
        self.plan = plan
        self.parents = parents
        self.shape = shape
        self.dtype = dtype
        self.saved: tuple[Any, ...] | None = ()
        self.guards: tuple[Version, ...] = ()
        self.retained: Any = None
        self.time = _tick()

    @property
    def op(self) -> Op:
        """The op that was recorded."""
        return self.plan.op

    def check(self) -> None:
        """Raise RuntimeError unless everything that was saved is there and unchanged."""
        if self.saved is None:
            raise RuntimeError(
                f"backward through {self.op.name!r} a second time: what it had saved was freed by "
                f"the first pass; pass retain_graph=True to that one"
            )
        for i, version in enumerate(self.guards):
            if version[0] > self.time:
                places = self.plan.guarded(len(self.dtype) if type(self.dtype) is tuple else 1)
                raise RuntimeError(
                    f"backward through {self.op.name!r}: its {self.op.describe(places[i])} was "
                    f"changed in place after the forward; call backward first, or write to a copy"
                )


class Output:
    """The place of one output of a Node that has several: it files its cotangent under its index.

    Two of the same node and index are one place.
    """

    __slots__ = ("__weakref__", "dtype", "index", "parents", "shape", "time")

    def __init__(self, node: Node, index: int):
        self.parents: tuple[Node] = (node,)
        self.index = index
        self.shape = node.shape[index]
        self.dtype = node.dtype[index]
        self.time = node.time + 0.5  # before all that uses it, whenever it is made

    @property
    def retained(self) -> Any:
        """A weak reference to the Tensor that wants its gradient kept, or None."""
        return (self.parents[0].retained or {}).get(self.index)

    @retained.setter
    def retained(self, reference: Any) -> None:
        (node,) = self.parents
        node.retained = {**(node.retained or {}), self.index: reference}

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is Output
            and other.parents[0] is self.parents[0]
            and other.index == self.index
        )

    def __hash__(self) -> int:
        return hash((id(self.parents[0]), self.index))


def rebase(tensor: TensorBase, node: Any) -> None:
    """Make `node` the history of `tensor`, which was written in place."""
    before = tensor.node
    if before is not None and before.retained is not None and before.retained() is tensor:
        before.retained, node.retained = None, before.retained
    tensor.node, tensor.requires_grad = node, True


def require_floating(name: str, dtype: Any) -> None:
    """Raise TypeError unless Tensors of `dtype` can require grad."""
    if not is_floating(dtype):
        raise TypeError(
            f"{name}: only floating Tensors can require grad, this one is {dtype}; convert it "
            f"first, for example with .astype('float32')"
        )
