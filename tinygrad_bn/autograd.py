"""The tape and the walk back along it.

Every op applied to a Tensor that requires grad leaves a `Node`: which op it was, the nodes or
leaves its inputs came from, and the few arrays its derivative rule asked to keep. `backward`
collects the nodes behind an output, visits them newest first (a node is always newer than its
inputs, so this is a topological order and needs no recursion), and hands each node's cotangent to
its rule.

A rule is written once. In an ordinary backward pass it receives raw arrays; under
`create_graph=True` it receives Tensors that are still attached to the graph, and what it computes
is recorded in its turn: gradients of gradients need no code of their own.

Nothing in this file knows the name of any op.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tinygrad_bn.backend import ARRAY_TYPES, array_module, as_array, is_array, is_floating

if TYPE_CHECKING:
    from tinygrad_bn.op import Op

F = TypeVar("F", bound=Callable[..., Any])

_next_age = itertools.count().__next__


class TensorBase:
    """What the tape needs to know of a Tensor; `tensor.Tensor` adds the operators and methods.

    data: the raw array.
    requires_grad: whether gradients flow to it.
    grad: its accumulated gradient (a Tensor) or None.
    node: the `Node` or `Output` that made it; None for a leaf.
    version: `[writes, recorded writes]`, one list shared by all views of one memory.
    view_of: for a view, the number of recorded writes when it was taken; None otherwise.
    """

    __slots__ = ("__weakref__", "data", "grad", "node", "requires_grad", "version", "view_of")

    #: The class of op results; `tensor.py` puts itself here, since this floor cannot import it.
    tensor_class: ClassVar[type[TensorBase]]

    data: Any
    grad: Any
    node: Node | Output | None
    requires_grad: bool
    version: list[int]
    view_of: int | None


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

    parents: for each flat array input, where its cotangent goes: a Node, an Output or a leaf
        Tensor, or None for an input that needs no gradient.
    shape, dtype: of the output; tuples of them for several outputs.
    saved: for each rule of the op, the values it asked for; None once freed.
    guards: `(input index, version list, writes seen)` for every saved Tensor (-1: the output).
    retained: a weak reference to the Tensor that wants its gradient kept, or None; for several
        outputs, such references by index.
    """

    __slots__ = (
        "__weakref__",
        "age",
        "dtype",
        "guards",
        "op",
        "parents",
        "retained",
        "saved",
        "shape",
    )

    def __init__(self, op: Op, parents: tuple[Any, ...], shape: Any, dtype: Any):
        self.op = op
        self.parents = parents
        self.shape = shape
        self.dtype = dtype
        self.saved: list[Any] | None = None
        self.guards: list[tuple[int, list[int], int]] = []
        self.retained: Any = None
        self.age = _next_age()

    def check(self) -> None:
        """Raise RuntimeError unless everything that was saved is there and unchanged."""
        if self.saved is None:
            raise RuntimeError(
                f"backward through {self.op.name!r} a second time: what it had saved was freed by "
                f"the first pass; pass retain_graph=True to that one"
            )
        for index, version, seen in self.guards:
            if version[0] != seen:
                raise RuntimeError(
                    f"backward through {self.op.name!r}: its {self.op.describe(index)} was changed "
                    f"in place after the forward; call backward first, or write to a copy"
                )

    def free(self) -> None:
        """Let go of what was saved."""
        self.saved = None
        self.guards = []


class Output:
    """The place of one output of a Node that has several: it files its cotangent under its index.

    Two of the same node and index are one place.
    """

    __slots__ = ("__weakref__", "age", "dtype", "index", "parents", "shape")

    def __init__(self, node: Node, index: int):
        self.parents: tuple[Node] = (node,)
        self.index = index
        self.shape = node.shape[index]
        self.dtype = node.dtype[index]
        self.age = node.age + 0.5  # older than all that uses it, whenever it is made

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


# --- grad mode -------------------------------------------------------------------------------

_grad_enabled: ContextVar[bool] = ContextVar("tinygrad_bn_grad_enabled", default=True)


def is_grad_enabled() -> bool:
    """Return whether ops on Tensors that require grad are being recorded."""
    return _grad_enabled.get()


class _GradMode:
    """Set grad mode for a `with` block, a decorated function or a decorated generator's steps.

    The former value is restored by value, not by a context-variable token: a generator may be
    closed in another context than it was opened in, where a token would be refused.
    """

    enabled: ClassVar[bool]

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(_grad_enabled.get())
        _grad_enabled.set(self.enabled)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _grad_enabled.set(self._before.pop())

    def __call__(self, function: F) -> F:
        mode = type(self)
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return _stepwise(mode, function(*args, **kwargs))

        elif inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                return _stepwise_async(mode, function(*args, **kwargs))

        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapper(*args: Any, **kwargs: Any) -> Any:
                with mode():
                    return await function(*args, **kwargs)

        else:

            @functools.wraps(function)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with mode():
                    return function(*args, **kwargs)

        return wrapper  # pyrefly: ignore


def _stepwise(mode: type[_GradMode], generator: Any) -> Any:
    """Run each step of `generator` under `mode`, and its caller's code between steps as it was."""
    step, value = generator.send, None
    while True:
        try:
            with mode():
                result = step(value)
        except StopIteration as stop:
            return stop.value
        try:
            step, value = generator.send, (yield result)
        except GeneratorExit:
            with mode():
                generator.close()
            raise
        except BaseException as error:
            step, value = generator.throw, error


async def _stepwise_async(mode: type[_GradMode], generator: Any) -> Any:
    """Do for an asynchronous generator what `_stepwise` does for a generator."""
    step, value = generator.asend, None
    while True:
        try:
            with mode():
                result = await step(value)
        except StopAsyncIteration:
            return
        try:
            step, value = generator.asend, (yield result)
        except GeneratorExit:
            with mode():
                await generator.aclose()
            raise
        except BaseException as error:
            step, value = generator.athrow, error


class no_grad(_GradMode):  # noqa: N801  (a context manager, named as users know it)
    """Return a context manager and decorator under which nothing is recorded.

    >>> import tinygrad_bn as tg
    >>> x = tg.tensor([1.0], requires_grad=True)
    >>> with tg.no_grad():
    ...     (x * 2).requires_grad
    False
    """

    enabled = False


class enable_grad(_GradMode):  # noqa: N801
    """Return a context manager and decorator under which ops are recorded, also inside `no_grad`.

    >>> import tinygrad_bn as tg
    >>> x = tg.tensor([1.0], requires_grad=True)
    >>> with tg.no_grad(), tg.enable_grad():
    ...     (x * 2).requires_grad
    True
    """

    enabled = True


# --- the walk --------------------------------------------------------------------------------


def backward(
    output: TensorBase,
    gradient: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> None:
    """Add d(output)/d(leaf) to `.grad` of every leaf behind `output`; see `Tensor.backward`."""
    if not output.requires_grad:
        raise RuntimeError(
            "backward: this Tensor does not require grad, so nothing leads back from it; create "
            "an input with requires_grad=True (and check that no_grad() is not active)"
        )
    seed = _seed("backward", output, gradient, create_graph)
    roots = [(_place(output), seed)]
    leaves: dict[Any, Any] = {}
    _walk(roots, None, leaves, create_graph, create_graph if retain_graph is None else retain_graph)
    while leaves:
        leaf, g = leaves.popitem()
        if leaf.grad is None:
            leaf.grad = _own(g, sys.getrefcount(g))
        elif create_graph or leaf.grad.requires_grad:
            leaf.grad = leaf.grad + g
        else:
            leaf.grad.data += g  # in place: .grad owns its memory
            leaf.grad.version[0] += 1


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Any, ...]:
    """Return the gradients of the sum of `outputs` with respect to `inputs`, one Tensor each.

    outputs, inputs: a Tensor or a sequence of them; inputs need not be leaves.
    grad_outputs: cotangents, one per output with its shape; None (or an entry None) is 1 for an
        output of one element.
    retain_graph: keep what the graph saved, for another pass (default: as `create_graph`).
    create_graph: return gradients that can be differentiated in their turn.
    allow_unused: give None for an input that no output depends on, instead of raising.

    `.grad` of no Tensor is touched.

    >>> import tinygrad_bn as tg
    >>> x = tg.tensor([2.0], requires_grad=True)
    >>> (g,) = tg.grad(x**3, x, create_graph=True)
    >>> (h,) = tg.grad(g, x)
    >>> g.item(), h.item()
    (12.0, 12.0)
    """
    outputs, inputs = _as_tuple(outputs), _as_tuple(inputs)
    seeds = (None,) * len(outputs) if grad_outputs is None else _as_tuple(grad_outputs)
    if len(seeds) != len(outputs):
        raise ValueError(f"grad: {len(outputs)} outputs but {len(seeds)} grad_outputs")
    for name, tensors in (("outputs", outputs), ("inputs", inputs)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, TensorBase):
                raise TypeError(
                    f"grad: {name}[{i}] is a {type(tensor).__name__}, expected a Tensor"
                )
            if not tensor.requires_grad:
                raise RuntimeError(
                    f"grad: {name}[{i}] does not require grad; call requires_grad_() on it before "
                    f"the forward"
                )
    roots = [
        (_place(output), _seed("grad", output, seed, create_graph))
        for output, seed in zip(outputs, seeds, strict=True)
    ]
    targets = {_place(tensor) for tensor in inputs}
    found: dict[Any, Any] = {}
    _walk(
        roots, targets, found, create_graph, create_graph if retain_graph is None else retain_graph
    )
    results: dict[Any, Any] = {}
    for i, tensor in enumerate(inputs):
        place = _place(tensor)
        if place in results:
            continue
        g = found.pop(place, None)
        if g is None and not allow_unused:
            raise RuntimeError(
                f"grad: no output depends on inputs[{i}]; pass allow_unused=True to get None for it"
            )
        results[place] = None if g is None else _own(g, sys.getrefcount(g))
    places = [_place(tensor) for tensor in inputs]
    first = {place: i for i, place in reversed(list(enumerate(places)))}
    return tuple(
        results[place] if first[place] == i or results[place] is None else results[place].copy()
        for i, place in enumerate(places)
    )


def _walk(
    roots: list[tuple[Any, Any]],
    targets: set[Any] | None,
    found: dict[Any, Any],
    create_graph: bool,
    retain_graph: bool,
) -> None:
    """Carry the cotangents in `roots` back to the places in `targets` (None: to all leaves) and
    add them up in `found`."""
    order = _newest_first([place for place, _ in roots])
    leading = set() if targets is None else _leading_to(order, targets)
    pending: dict[Any, Any] = {}  # place -> the sum of the cotangents that have reached it
    for place, seed in roots:
        _add(pending, place, seed)
    mode = enable_grad if create_graph else no_grad
    with mode():
        for node in order:
            g = pending.pop(node, None)
            if g is None:
                continue
            if node.retained is not None and type(g) is not list:
                _retain(node, g)
            needs = None
            if targets is not None:
                if node in targets:
                    found[node] = g
                needs = [parent in leading for parent in node.parents]
                if not any(needs):
                    continue
            if type(node) is Output:
                (parent,) = node.parents
                pending.setdefault(parent, [None] * len(parent.shape))[node.index] = g
                continue
            if type(g) is list:
                g = _complete(node, g, create_graph)
            node.check()
            grads = node.op.pull_back(node, g, needs, create_graph)
            for parent, h in zip(node.parents, grads, strict=True):
                if h is not None and parent is not None:
                    _add(pending, parent, h, node)
            if not retain_graph:
                node.free()
    # What is left has no node to pass it on: the leaves.
    found.update((leaf, g) for leaf, g in pending.items() if targets is None or leaf in targets)


def _newest_first(places: list[Any]) -> list[Any]:
    """Return every Node and Output reachable from `places`, each before all that it depends on."""
    stack = [place for place in places if not isinstance(place, TensorBase)]
    seen = set(stack)
    while stack:
        for parent in stack.pop().parents:
            if parent is not None and parent not in seen and not isinstance(parent, TensorBase):
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=attrgetter("age"), reverse=True)


def _leading_to(order: list[Any], targets: set[Any]) -> set[Any]:
    """Return the places from which a target can be reached, targets included."""
    leading = set(targets)
    for node in reversed(order):
        if any(parent in leading for parent in node.parents if parent is not None):
            leading.add(node)
    return leading


def _add(pending: dict[Any, Any], place: Any, g: Any, source: Any = None) -> None:
    """Add `g`, in the dtype of `place` and summed to its shape, to what has reached `place`."""
    if g.shape != place.shape:
        if not _is_broadcast(place.shape, g.shape):
            raise ValueError(
                f"{source.op.name}: its derivative rule returned a cotangent of shape {g.shape} for "
                f"an input of shape {place.shape}; it must have that shape, or one that the input "
                f"was broadcast to"
            )
        g = sum_to_shape(g, place.shape)
    if g.dtype != place.dtype:
        g = g.astype(place.dtype)
    before = pending.get(place)
    pending[place] = g if before is None else before + g


def _is_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether `shape` broadcasts to `to`."""
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
    )


def sum_to_shape(g: Any, shape: tuple[int, ...]) -> Any:
    """Return `g` (array or Tensor) summed over the axes along which `shape` was broadcast to it.

    >>> import numpy
    >>> sum_to_shape(numpy.ones((2, 3)), (3,))
    array([2., 2., 2.])
    """
    extra = g.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        i for i, size in enumerate(shape, extra) if size == 1 and g.shape[i] != 1
    )
    if axes:
        g = g.sum(axis=axes, keepdims=True)
    return g.reshape(shape)


def _complete(node: Node, filed: list, create_graph: bool) -> tuple:
    """Return the cotangents of all outputs of `node`, zeros for those that were not used."""
    like = next(g for g in filed if g is not None)
    xp = array_module(like.data if isinstance(like, TensorBase) else like)
    zeros = (xp.zeros(shape, dtype) for shape, dtype in zip(node.shape, node.dtype, strict=True))
    return tuple(
        (new_tensor(zero) if create_graph else zero) if g is None else g
        for g, zero in zip(filed, zeros, strict=True)
    )


def _seed(name: str, output: TensorBase, gradient: Any, create_graph: bool) -> Any:
    """Return the cotangent to start from: raw, or a Tensor under `create_graph`."""
    data = output.data
    if gradient is None:
        if data.size != 1:
            raise RuntimeError(
                f"{name}: the output has shape {data.shape}, and only one element has an implied "
                f"gradient of 1; pass a gradient of that shape or reduce the output, for example "
                f"with .sum()"
            )
        gradient = array_module(data).ones_like(data)
    is_tensor = isinstance(gradient, TensorBase)
    raw = gradient.data if is_tensor else gradient
    if not is_array(raw):
        raw = array_module(data).asarray(raw, dtype=data.dtype)
    if raw.shape != data.shape:
        raise ValueError(
            f"{name}: the gradient has shape {raw.shape}, the output {data.shape}; make them equal"
        )
    if not create_graph:
        return raw
    return gradient if is_tensor else new_tensor(as_array(raw))


def _own(g: Any, references: int) -> Any:
    """Return cotangent `g` as a Tensor whose memory nothing else uses.

    A rule may pass its cotangent through, or return a view or a saved array. So `g` is copied,
    unless it is an array of its own that only the caller's variable refers to.
    """
    if isinstance(g, TensorBase):
        return g.copy()  # pyrefly: ignore
    if type(g) not in ARRAY_TYPES:
        g = as_array(g)
    elif references > _REFERENCES_OF_A_VARIABLE or g.base is not None:
        g = g.copy()
    return new_tensor(g)


def _references_of_a_variable() -> int:
    g = object()
    return sys.getrefcount(g)


# What `sys.getrefcount(g)` gives where nothing but the local variable g refers to an object: 2, or 1
# in later versions of Python.
_REFERENCES_OF_A_VARIABLE = _references_of_a_variable()


def retain_grad(tensor: TensorBase) -> None:
    """Have backward passes fill `.grad` of `tensor` too, although an op made it."""
    if not tensor.requires_grad:
        raise RuntimeError(
            "retain_grad: this Tensor does not require grad, so it will receive none"
        )
    if tensor.node is not None:
        tensor.node.retained = weakref.ref(tensor)


def rebase(tensor: TensorBase, node: Any) -> None:
    """Make `node` the history of `tensor`, which was written in place."""
    before = tensor.node
    if before is not None and before.retained is not None and before.retained() is tensor:
        before.retained, node.retained = None, before.retained
    tensor.node, tensor.requires_grad = node, True


def _retain(node: Any, g: Any) -> None:
    tensor = node.retained()
    if tensor is None:
        return
    g = g.copy()
    g = g if isinstance(g, TensorBase) else new_tensor(as_array(g))
    tensor.grad = g if tensor.grad is None else tensor.grad + g


def _place(tensor: TensorBase) -> Any:
    """Return where cotangents of `tensor` are gathered: its node, or the leaf itself."""
    return tensor if tensor.node is None else tensor.node


def _as_tuple(tensors: Any) -> tuple:
    if isinstance(tensors, TensorBase) or is_array(tensors):
        return (tensors,)
    return tuple(tensors) if isinstance(tensors, Iterable) else (tensors,)


def require_floating(name: str, dtype: Any) -> None:
    """Raise TypeError unless Tensors of `dtype` can require grad."""
    if not is_floating(dtype):
        raise TypeError(
            f"{name}: only floating Tensors can require grad, this one is {dtype}; convert it "
            f"first, for example with .astype('float32')"
        )
