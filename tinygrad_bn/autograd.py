"""The walk back along the tape.

Every op applied to a Tensor that requires grad leaves a `Node` (tape.py): which op it was, the
nodes or leaves its inputs came from, and the few arrays its derivative rule asked to keep.
`backward` collects the nodes behind an output, visits them newest first (a node is always newer
than its inputs, so this is a topological order and needs no recursion), and hands each node's
cotangent to its rule.

A rule is written once. In an ordinary backward pass it receives raw arrays; under
`create_graph=True` it receives Tensors that are still attached to the graph, and what it computes
is recorded in its turn: gradients of gradients need no code of their own.

Nothing in this file knows the name of any op.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from tinygrad_bn.backend import (
    ARRAY_TYPES,
    array_module,
    as_array,
    copied,
    is_array,
    is_view,
    placed,
    several_devices,
    sum_dtype,
)
from tinygrad_bn.backend.recording import watching
from tinygrad_bn.grad_mode import enable_grad, no_grad
from tinygrad_bn.tape import Node, Output, TensorBase, new_tensor


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
    watch: Any = watching()
    while leaves:
        leaf, g = leaves.popitem()
        if watch is not None:
            watch.saw_gradient(leaf)
        if leaf.grad is None:
            references = sys.getrefcount(g)  # as an argument of _own it would have one more
            leaf.grad = _own(g, references)
        elif create_graph or leaf.grad.requires_grad:
            leaf.grad = leaf.grad + g
        else:
            with placed("backward", (leaf.grad.data, g)):
                leaf.grad.data += g  # in place: .grad owns its memory
            leaf.grad.note_write()


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

    Raises TypeError for what is no Tensor; ValueError for cotangents of another number or shape;
    RuntimeError for a Tensor that does not require grad, an output of several elements without its
    cotangent, an input that no output depends on, and what was freed or overwritten.

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
    results: list[Any] = []
    first: dict[Any, int] = {}  # place -> where it stands in results
    for i, tensor in enumerate(inputs):
        place = _place(tensor)
        if place in first:
            again = results[first[place]]
            results.append(None if again is None else again.copy())
            continue
        g = found.pop(place, None)
        if g is None and not allow_unused:
            raise RuntimeError(
                f"grad: no output depends on inputs[{i}]; pass allow_unused=True to get None for it"
            )
        references = sys.getrefcount(g)
        first[place] = i
        results.append(None if g is None else _own(g, references))
    return tuple(results)


def _walk(
    roots: list[tuple[Any, Any]],
    targets: set[Any] | None,
    found: dict[Any, Any],
    create_graph: bool,
    retain_graph: bool,
) -> None:
    """Carry the cotangents in `roots` back to the places in `targets` (None: to all leaves) and
    add them up in `found`."""
    order = newest_first([place for place, _ in roots])
    leading = set() if targets is None else leading_to(order, targets)
    pending: dict[Any, Any] = {}  # place -> the sum of the cotangents that have reached it
    for place, seed in roots:
        with placed("backward", (seed,)):
            _add(pending, place, seed)
    several = several_devices()
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
            if several:
                _carry_between_devices(node, g, needs, create_graph, pending)
            elif node.plan.joint or create_graph:
                for i, h in node.plan.op.pull_back(node, g, needs, create_graph):
                    _add(pending, node.parents[i], h, node)
            else:
                # What `pull_back` does for one rule per input, without a list of what it found: in
                # a chain of small ops every call of a function counts.
                for i, pull in node.plan.pulls:
                    if needs is None or needs[i]:
                        h = pull(g, node.saved, needs)
                        if h is not None:
                            _add(pending, node.parents[i], h, node)
            if not retain_graph:
                node.saved, node.guards = None, ()
    # What is left has no node to pass it on: the leaves.
    found.update((leaf, g) for leaf, g in pending.items() if targets is None or leaf in targets)


def _carry_between_devices(
    node: Any, g: Any, needs: Any, create_graph: bool, pending: dict[Any, Any]
) -> None:
    """Carry `g` through `node` as `_walk` does; rules and sums run on the devices of their arrays.

    (Under `create_graph` they are ops on Tensors, which look after that themselves.)
    """
    with placed(node.op.name, g if type(g) is tuple else (g,)):
        pairs = node.op.pull_back(node, g, needs, create_graph)
    for i, h in pairs:
        with placed(node.op.name, (h,)):
            _add(pending, node.parents[i], h, node)


def newest_first(places: list[Any]) -> list[Any]:
    """Return every Node and Output reachable from `places`, each before all that it depends on."""
    # A dict keeps its order: that of a chain is right already, and sorting it costs nothing.
    seen = dict.fromkeys(place for place in places if not isinstance(place, TensorBase))
    stack = list(seen)
    while stack:
        for parent in stack.pop().parents:
            if parent is not None and parent not in seen and not isinstance(parent, TensorBase):
                seen[parent] = None
                stack.append(parent)
    return sorted(seen, key=attrgetter("time"), reverse=True)


def leading_to(order: list[Any], targets: set[Any]) -> set[Any]:
    """Return the places from which a target can be reached, targets included."""
    leading = set(targets)
    for node in reversed(order):
        if any(parent in leading for parent in node.parents if parent is not None):
            leading.add(node)
    return leading


def _add(pending: dict[Any, Any], place: Any, g: Any, source: Any = None) -> None:
    """Add `g`, in the dtype of `place` and summed to its shape, to what has reached `place`."""
    kind = place.data if isinstance(place, TensorBase) else place
    if g.shape != kind.shape:
        if not _is_broadcast(kind.shape, g.shape):
            raise ValueError(
                f"{source.op.name}: its derivative rule returned a cotangent of shape {g.shape} "
                f"for an input of shape {kind.shape}; it must have that shape, or one that the "
                f"input was broadcast to"
            )
        g = sum_to_shape(g, kind.shape)
    if g.dtype is not kind.dtype and g.dtype != kind.dtype:
        g = g.astype(kind.dtype)
    before = pending.get(place)
    pending[place] = g if before is None else before + g


def _is_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Return whether `shape` broadcasts to `to`."""
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
    )


#: Fewer numbers than this are added up one by one in float32, in a half or a quarter of float64's
#: time. They lose a millionth of Σ|g|, as a rule; ten million would lose several percent.
FEW = 1024


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
    if axes and is_array(g):
        total = g.sum(axis=axes, keepdims=True, dtype=sum_dtype(g, axes, FEW))
        g = total.astype(g.dtype, copy=False)
    elif axes:
        g = g.sum(axis=axes, keepdims=True)
    return g.reshape(shape)


def _complete(node: Node, filed: list, create_graph: bool) -> tuple:
    """Return the cotangents of all outputs of `node`, zeros for those that were not used."""
    like = next(g for g in filed if g is not None)
    xp = array_module(like.data if isinstance(like, TensorBase) else like)
    with placed(node.op.name, (like.data if isinstance(like, TensorBase) else like,)):
        zeros = [xp.zeros(s, dtype) for s, dtype in zip(node.shape, node.dtype, strict=True)]
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
        with placed(name, (data,)):
            gradient = array_module(data).ones_like(data)
    is_tensor = isinstance(gradient, TensorBase)
    raw = gradient.data if is_tensor else gradient
    given = is_array(raw)  # asked first: CuPy may be met here for the first time
    with placed(name, (data, raw)):
        if not given:
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
    elif references > _REFERENCES_OF_A_VARIABLE or is_view(g):
        g = copied(g)
    return new_tensor(g)


def _references_of_a_variable() -> int:
    g = object()
    return sys.getrefcount(g)


# What `sys.getrefcount(g)` gives where nothing but the local variable g refers to an object: 2, or
# 1 in later versions of Python.
_REFERENCES_OF_A_VARIABLE = _references_of_a_variable()


def retain_grad(tensor: TensorBase) -> None:
    """Have backward passes fill `.grad` of `tensor` too, although an op made it."""
    if not tensor.requires_grad:
        raise RuntimeError(
            "retain_grad: this Tensor does not require grad, so it will receive none"
        )
    if tensor.node is not None:
        tensor.node.retained = weakref.ref(tensor)


def _retain(node: Any, g: Any) -> None:
    tensor = node.retained()
    if tensor is None:
        return
    g = g.copy() if isinstance(g, TensorBase) else copied(g)  # pyrefly: ignore
    g = g if isinstance(g, TensorBase) else new_tensor(as_array(g))
    tensor.grad = g if tensor.grad is None else tensor.grad + g


def _place(tensor: TensorBase) -> Any:
    """Return where cotangents of `tensor` are gathered: its node, or the leaf itself."""
    return tensor if tensor.node is None else tensor.node


def _as_tuple(tensors: Any) -> tuple:
    if isinstance(tensors, TensorBase) or is_array(tensors):
        return (tensors,)
    return tuple(tensors) if isinstance(tensors, Iterable) else (tensors,)
