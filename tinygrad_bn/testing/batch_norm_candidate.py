"""A batch norm under test: called the same way whatever it takes, and run forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn.autograd import grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.functions import name_of

_PLAIN = ("x", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_FEATURES = ("axis", "mask", "groups", "correction")


class Candidate:
    """A function with `F.batch_norm`'s signature, or the first eight arguments of it.

    takes: which of axis, mask, groups and correction it accepts; "axes" if axis may be a tuple,
        which is found out by a call.

    Raises TypeError for a function that cannot be called with the first eight.

    >>> from tinygrad_bn import functional as F
    >>> sorted(Candidate(F.batch_norm).takes)
    ['axes', 'axis', 'correction', 'groups', 'mask']
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.name = name_of(fn)
        try:
            signature = inspect.signature(fn)
        except (TypeError, ValueError):  # it has no signature to read: take it at its word
            self.takes = frozenset(_FEATURES) | _several_axes(fn)
            return
        try:
            signature.bind(*_PLAIN)
        except TypeError as error:
            raise TypeError(
                f"verify_batch_norm: {self.name}{signature} cannot be called as F.batch_norm is, "
                f"with ({', '.join(_PLAIN)}) in this order: {error}"
            ) from None
        named = signature.parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in named.values())
        self.takes = frozenset(f for f in _FEATURES if anything or f in named)
        if "axis" in self.takes:
            self.takes |= _several_axes(fn)

    def __call__(
        self,
        x: Any,
        running: tuple[Any, Any] | None,
        weight: Any,
        bias: Any,
        *,
        training: bool,
        momentum: float = 0.1,
        eps: float = 1e-5,
        axis: int | tuple[int, ...] = 1,
        **features: Any,
    ) -> Any:
        """Return what the function returns; it must be a Tensor of x's shape and dtype."""
        if axis != 1:
            features["axis"] = axis
        mean, var = (None, None) if running is None else running
        y = self.fn(x, mean, var, weight, bias, training, momentum, eps, **features)
        if not isinstance(y, Tensor):
            raise GradCheckError(f"it returned a {type(y).__name__}, expected a Tensor")
        if y.shape != x.shape or y.dtype != x.dtype:
            raise GradCheckError(
                f"it returned {y.dtype}{list(y.shape)} for x of {x.dtype}{list(x.shape)}; the "
                f"result has the dtype and the shape of x"
            )
        return y


def _several_axes(fn: Callable[..., Any]) -> frozenset[str]:
    """Return {"axes"} for a function that takes a tuple of channel axes, else nothing."""
    x = Tensor(np.arange(12.0).reshape(3, 2, 2))
    try:
        fn(x, None, None, None, None, True, 0.1, 1e-5, axis=(1, 2))
    except Exception:  # whatever it says to an axis that it does not know
        return frozenset()
    return frozenset({"axes"})


class Pass:
    """One forward pass of a candidate on its own copies of drawn inputs, and backward on demand.

    state: the running mean and variance as raw arrays, which the candidate has written into.
    """

    def __init__(
        self,
        candidate: Candidate,
        drawn: Any,
        *,
        training: bool = True,
        running: bool | tuple[Any, Any] = False,
        needs: tuple[bool, bool, bool] = (True, True, True),
        **options: Any,
    ):
        self.drawn = drawn
        arrays = (drawn.x, drawn.weight, drawn.bias)
        self.inputs = [
            # Laid out as it came: the copy of a view with gaps or turned round would have neither.
            None if a is None else Tensor(_copied(a), requires_grad=need)
            for a, need in zip(arrays, needs, strict=True)
        ]
        state: Any = None
        if running is True:
            state = Tensor(drawn.running_mean.copy()), Tensor(drawn.running_var.copy())
        elif running:
            state = running
        self.running = state
        self.state = [s.data if isinstance(s, Tensor) else s for s in state or ()]
        chosen = {"momentum": drawn.momentum, "eps": drawn.eps, "axis": drawn.axis, **options}
        x, weight, bias = self.inputs
        self.output = candidate(x, state, weight, bias, training=training, **chosen)
        self.y: np.ndarray = self.output.numpy()

    def gradients(self, cotangent: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the gradients by name ("gx", "gweight", "gbias") of the inputs that need them."""
        wanted = {
            name: t
            for name, t in zip(("gx", "gweight", "gbias"), self.inputs, strict=True)
            if t is not None and t.requires_grad
        }
        if not self.output.requires_grad:
            raise GradCheckError(f"the result does not depend on {', '.join(wanted)} for the tape")
        g = self.drawn.cotangent if cotangent is None else cotangent
        found = grad(self.output, list(wanted.values()), _copied(g), allow_unused=True)
        result = {}
        for (name, tensor), gradient in zip(wanted.items(), found, strict=True):
            if gradient is None:
                raise GradCheckError(f"{name} is None: the gradient does not reach this input")
            if gradient.dtype != tensor.dtype or gradient.shape != tensor.shape:
                raise GradCheckError(
                    f"{name} is {gradient.dtype}{list(gradient.shape)}, expected "
                    f"{tensor.dtype}{list(tensor.shape)}, as its input"
                )
            result[name] = gradient.numpy()
        return result


def _copied(array: np.ndarray) -> np.ndarray:
    """Return a copy of an array, or a large one in an unusual layout itself."""
    return array if array.size >= 4096 and not array.flags.c_contiguous else array.copy()


def plain_function(
    candidate: Candidate, drawn: Any, training: bool, running: bool = False, **features: Any
) -> Callable[..., Any]:
    """Return the candidate as a function of x, weight and bias, with a state of its own each call,
    for the checkers of functions. features: a mask, or what else it is to be called with."""

    def batch_norm(x: Any, weight: Any = None, bias: Any = None) -> Any:
        state = None
        if running:
            state = Tensor(drawn.running_mean.copy()), Tensor(drawn.running_var.copy())
        return candidate(
            x,
            state,
            weight,
            bias,
            training=training,
            momentum=drawn.momentum,
            eps=drawn.eps,
            axis=drawn.axis,
            **features,
        )

    batch_norm.__name__ = candidate.name
    return batch_norm
