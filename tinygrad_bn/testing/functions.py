"""What the checkers difference: a user's function of Tensors, as functions of raw float64 arrays.

`FirstOrder` is the function and its gradient. `SecondOrder` is the gradient and *its* gradient: the
value comes from the ordinary backward pass on raw arrays and the derivative from `create_graph`, so
that a rule that is right in one of the two worlds only is found out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.autograd import grad, leading_to, newest_first
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.op import Op
from tinygrad_bn.tape import Node, TensorBase
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing import noise

Array = Any
Function = Callable[..., Any]


def name_of(fn: Function) -> str:
    """Return what messages call `fn`."""
    if isinstance(fn, partial):
        return f"{name_of(fn.func)}({', '.join(f'{k}={v!r}' for k, v in fn.keywords.items())})"
    return fn.name if isinstance(fn, Op) else getattr(fn, "__name__", type(fn).__name__)


def input_names(fn: Function, count: int) -> tuple[str, ...]:
    """Return what messages call the inputs of `fn`: parameter names where it has them.

    An attribute `input_labels` of the function says otherwise.

    >>> input_names(lambda x, *rest: x, 3)
    ("input 0 ('x')", 'input 1', 'input 2')
    """
    labels = getattr(fn, "input_labels", None)
    if labels is not None:
        return labels
    names = _parameters(fn)
    return tuple(
        f"input {i} ({names[i]!r})" if i < len(names) else f"input {i}" for i in range(count)
    )


def _parameters(fn: Function) -> Sequence[str]:
    if isinstance(fn, partial):
        return _parameters(fn.func)[len(fn.args) :]
    if isinstance(fn, Op):
        return fn.inputs
    if type(fn) is FunctionType and not hasattr(fn, "__wrapped__"):
        # What `inspect` would say, without the third of a forward pass that it takes to say it.
        return fn.__code__.co_varnames[: fn.__code__.co_argcount]
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a callable that has no signature to read
        return ()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in plain]


def raw_inputs(inputs: Sequence[Any]) -> list[Array]:
    """Return inputs (arrays, Tensors, numbers, None) as raw arrays and None."""
    raw = (value.data if isinstance(value, TensorBase) else value for value in inputs)
    return [None if value is None else backend.as_array(value) for value in raw]


def is_floating(array: Array) -> bool:
    """Return whether gradients can flow to `array`."""
    return array is not None and backend.is_floating(array.dtype)


def as_tuple(outputs: Any, name: str) -> tuple[Any, ...]:
    """Return a function's output or outputs as a tuple of Tensors; TypeError if they are not."""
    result = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
    for value in result:
        if not isinstance(value, TensorBase):
            raise TypeError(
                f"{name}: it returned a {type(value).__name__}, expected a Tensor or a tuple of "
                f"Tensors; compute with tinygrad_bn's ops and do not unwrap .data"
            )
    return result


def tensors(arrays: Sequence[Array], requires_grad: bool) -> list[Any]:
    """Return Tensors around raw arrays, floating ones requiring grad if asked; None stays None."""
    return [
        None if a is None else Tensor(a, requires_grad=requires_grad and is_floating(a))
        for a in arrays
    ]


def pull_back(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    cotangents: Sequence[Any],
    create_graph: bool = False,
) -> list[Any]:
    """Return the gradients of the inputs that require grad, zeros where nothing leads there."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    live = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
    found: Sequence[Any] = [None] * len(wanted)
    if live:
        found = grad(
            [o for o, _ in live],
            wanted,
            [g for _, g in live],
            create_graph=create_graph,
            allow_unused=True,
        )
    return [
        Tensor(backend.array_module(t.data).zeros_like(t.data)) if g is None else g
        for t, g in zip(wanted, found, strict=True)
    ]


class FirstOrder:
    """`fn` and its gradient, for raw inputs: float64 where they can vary, each on its own device.

    What is returned stays on the device too; nothing is brought to the host here.

    inputs: what `value` takes. free: which of them vary. given: those that `fn` takes.
    """

    def __init__(self, fn: Function, inputs: Sequence[Any]):
        self.fn = fn
        self.name = name_of(fn)
        self.inputs = self.given = [_wide(a) for a in raw_inputs(inputs)]
        self.free = [i for i, a in enumerate(self.inputs) if is_floating(a)]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What messages call the inputs."""
        return input_names(self.fn, len(self.inputs))

    def call(self, arrays: Sequence[Array], requires_grad: bool) -> tuple[list[Any], list[Any]]:
        """Return the input Tensors and the floating output Tensors."""
        ts = tensors(arrays, requires_grad)
        outputs = as_tuple(self.fn(*ts), self.name)
        return ts, [o for o in outputs if backend.is_floating(o.dtype)]

    def value(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the floating outputs."""
        with no_grad():
            _, outputs = self.call(arrays, False)
        return [o.data for o in outputs]

    def complex_value(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the outputs for arrays of which one is complex."""
        with no_grad():
            outputs = as_tuple(self.fn(*tensors(arrays, False)), self.name)
        raw = [o.data for o in outputs]
        if not any(o.dtype.kind == "c" for o in raw):
            raise TypeError(
                f"{self.name}: it returned {[str(o.dtype) for o in raw]} for a complex input, so a "
                f"complex step cannot differentiate it; use another mode"
            )
        return [o for o in raw if o.dtype.kind in "fc"]

    def rounded_anew(self, rng: np.random.Generator, times: int) -> Iterator[list[Array]]:
        """Yield nothing: what an op rounds on its way to the outputs is out of reach."""
        yield from ()

    def gradient(self, arrays: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        """Return the gradients of Σ <cotangent, output> for the free inputs."""
        return self.both(arrays, lambda outputs: cotangents)[2]

    def both(
        self, arrays: Sequence[Array], choose: Callable[[list[Array]], Sequence[Array]]
    ) -> tuple[list[Array], Sequence[Array], list[Array]]:
        """Return the outputs, the cotangents that `choose` gives for them, and the gradients."""
        ts, outputs = self.call(arrays, True)
        values = [o.data for o in outputs]
        cotangents = choose(values)
        return values, cotangents, [g.data for g in pull_back(outputs, ts, cotangents)]


class SecondOrder:
    """The gradient of `fn` as a function of its inputs and cotangents, and the gradient of that."""

    def __init__(self, fn: Function, inputs: Sequence[Any], cotangents: Sequence[Array]):
        self.first = FirstOrder(fn, inputs)
        self.name = f"gradient of {self.first.name}"
        self.count = len(self.first.inputs)
        self.given = self.first.inputs
        self.inputs = [*self.given, *cotangents]
        self.free = [*self.first.free, *range(self.count, len(self.inputs))]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What messages call the inputs, and after them the cotangents."""
        count = len(self.inputs) - self.count
        return (*self.first.names, *(f"cotangent of output {i}" for i in range(count)))

    def value(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the gradients of the free inputs, by the ordinary backward pass."""
        return self.first.gradient(arrays[: self.count], arrays[self.count :])

    def rounded_anew(self, rng: np.random.Generator, times: int) -> Iterator[list[Array]]:
        """Yield `value` at `inputs`, with what the forward hands to the backward rounded anew."""
        for _ in range(times):
            ts, outputs = self.first.call(self.given, True)
            order = newest_first([o.node for o in outputs if o.node is not None])
            leading = leading_to(order, set(ts))  # the others are not of this call
            for node in order:
                if isinstance(node, Node) and node in leading:
                    node.saved = noise.rounded_anew(node.saved, rng, self.given)
            yield [g.data for g in pull_back(outputs, ts, self.inputs[self.count :])]

    def gradient(self, arrays: Sequence[Array], cotangents: Sequence[Array]) -> list[Array]:
        """Return the gradients of Σ <cotangent, gradient>, by differentiating the backward pass."""
        ts, outputs = self.first.call(arrays[: self.count], True)
        gs = [Tensor(g, requires_grad=True) for g in arrays[self.count :]]
        grads = pull_back(outputs, ts, gs, create_graph=True)
        return [g.data for g in pull_back(grads, [*ts, *gs], cotangents)]

    def both(
        self, arrays: Sequence[Array], choose: Callable[[list[Array]], Sequence[Array]]
    ) -> tuple[list[Array], Sequence[Array], list[Array]]:
        """Return the gradients, the cotangents that `choose` gives for them, and *their* gradients.

        The gradients by the ordinary backward pass: those of the other are compared with them.
        """
        values = self.value(arrays)
        cotangents = choose(values)
        return values, cotangents, self.gradient(arrays, cotangents)


def _wide(array: Array) -> Array:
    """Return a private copy where it lies, floats as float64: differences need its digits."""
    if array is None:
        return None
    return array.astype(backend.float64) if is_floating(array) else array.copy()
