"""What must hold of any function beside its derivative: it changes nothing, and leaks no dtype.

Finite differences see none of this: a rule that scribbles on its cotangent, hands out the same
buffer twice or widens float16 to float64 has every derivative right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.cotangents import random_cotangents
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.functions import (
    as_tuple,
    input_names,
    is_floating,
    name_of,
    pull_back,
    raw_inputs,
    tensors,
)
from tinygrad_bn.testing.report import Report


class Run:
    """One forward and backward pass of `fn`, with everything that went in and came out (raw).

    gradients: one per floating input, in order.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        arrays: Sequence[Any],
        cotangents: Sequence[Any] | None = None,
        *,
        seed: int = 0,
        create_graph: bool = False,
    ):
        self.inputs = tensors(arrays, True)
        every = as_tuple(fn(*self.inputs), name_of(fn))
        self.outputs = [o.data for o in every]
        floating = [o for o in every if backend.is_floating(o.dtype)]
        if cotangents is None:
            cotangents = random_cotangents([o.data for o in floating], seed)
        self.cotangents = list(cotangents)
        given = self.cotangents
        if create_graph:
            given = [Tensor(g) for g in given]
        grads = pull_back(floating, self.inputs, given, create_graph)
        self.gradients = [g.data for g in grads]


def check_pure(fn: Callable[..., Any], *inputs: Any, seed: int = 0) -> Report:
    """Return a report that calling and differentiating `fn` at `inputs` has no side effects.

    Inputs and cotangents are unchanged; gradients share no memory with inputs, outputs, cotangents,
    each other or the gradients of another call; who holds a view of a result keeps its memory; two
    calls agree to the bit; `.grad` after `backward` is the same and can be written to; and an input
    overwritten through its Tensor between forward and backward either does no harm or raises
    RuntimeError. seed: of the random cotangents.

    Raises GradCheckError that names what was changed or shared.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> print(testing.check_pure(lambda x: x.exp(), np.ones(3)))
    check_pure(<lambda>): passed; 2 calls bitwise equal, nothing changed, nothing shared
    """
    name = f"check_pure: {name_of(fn)}"
    arrays = [None if a is None else backend.copied(a) for a in raw_inputs(inputs)]
    labels = input_names(fn, len(arrays))
    free = [labels[i] for i, a in enumerate(arrays) if is_floating(a)]
    before = [None if a is None else _bits(a) for a in arrays]
    first = Run(fn, arrays, seed=seed)
    kept = [_bits(g) for g in first.gradients]
    cotangents_before = [_bits(g) for g in random_cotangents(first.cotangents, seed)]
    outputs_before = [_bits(o) for o in first.outputs]
    second = Run(fn, arrays, first.cotangents)
    for label, array, bits in zip(labels, arrays, before, strict=True):
        if array is not None and _bits(array) != bits:
            raise GradCheckError(
                f"{name}: it changed its {label}; compute into an array of its own"
            )
    for i, (g, bits) in enumerate(zip(first.cotangents, cotangents_before, strict=True)):
        if _bits(g) != bits:
            raise GradCheckError(
                f"{name}: a rule changed the cotangent of output {i}; it belongs to whoever called "
                f"backward: write `g = g * 2`, not `g *= 2`"
            )
    _require_repeatable(name, free, first, second, kept, outputs_before)
    _require_unshared(name, free, labels, arrays, first, second)
    _require_lasting(name, fn, arrays, first.cotangents)
    _require_same_through_backward(name, fn, arrays, first, free)
    _require_guarded(name, fn, arrays, labels, first)
    return Report(
        "check_pure",
        name_of(fn),
        notes=("2 calls bitwise equal, nothing changed, nothing shared",),
    )


def check_dtypes(
    fn: Callable[..., Any],
    *inputs: Any,
    dtypes: Sequence[Any] = ("float64", "float32", "float16"),
    outputs: bool = True,
    seed: int = 0,
) -> Report:
    """Return a report that `fn` keeps the dtype of its floating inputs, in outputs and gradients.

    dtypes: to which all floating inputs are cast, one after the other.
    outputs: whether the outputs must keep it too; False for a function that is asked to convert.
    seed: of the random cotangents.

    Each gradient must have the dtype and shape of its input, also when the inputs' dtypes differ.

    Raises GradCheckError that names the output or the gradient.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> print(testing.check_dtypes(lambda x: x.exp(), np.ones(3)))
    check_dtypes(<lambda>): passed; float64, float32, float16 kept
    """
    name = f"check_dtypes: {name_of(fn)}"
    raw = raw_inputs(inputs)
    labels = [
        label for label, a in zip(input_names(fn, len(raw)), raw, strict=True) if is_floating(a)
    ]
    wanted = [backend.as_dtype(dtype) for dtype in dtypes]
    # Numbers that overflow a narrow dtype are not this check's concern.
    with np.errstate(all="ignore"):
        for dtype in wanted:
            cast = [backend.cast(a, dtype) if is_floating(a) else a for a in raw]
            run = Run(fn, cast, seed=seed)
            for i, out in enumerate(run.outputs):
                if outputs and backend.is_floating(out.dtype) and out.dtype != dtype:
                    raise GradCheckError(
                        f"{name}: output {i} is {out.dtype} for {dtype} inputs; look for a NumPy "
                        f"scalar (np.float64(2) widens) or an array made without a dtype"
                    )
            _require_like(name, labels, run, dtype)
        mixed = list(raw)
        places = [i for i, a in enumerate(raw) if is_floating(a)]
        for k, i in enumerate(places):
            mixed[i] = backend.cast(raw[i], wanted[k % len(wanted)])
        _require_like(name, labels, Run(fn, mixed, seed=seed), None)
    return Report("check_dtypes", name_of(fn), notes=(f"{', '.join(map(str, wanted))} kept",))


def _require_like(name: str, labels: Sequence[str], run: Run, dtype: Any) -> None:
    floating = [t for t in run.inputs if t is not None and t.requires_grad]
    for label, tensor, gradient in zip(labels, floating, run.gradients, strict=True):
        if gradient.dtype != tensor.dtype or gradient.shape != tensor.shape:
            raise GradCheckError(
                f"{name}: the gradient of {label} is {gradient.dtype}{list(gradient.shape)}, the "
                f"input {tensor.dtype}{list(tensor.shape)}; they must be alike"
                + ("" if dtype else " (inputs of different dtypes)")
            )


def _require_repeatable(
    name: str,
    free: Sequence[str],
    first: Run,
    second: Run,
    kept: Sequence[bytes],
    outputs_before: Sequence[bytes],
) -> None:
    for label, gradient, again, bits in zip(
        free, first.gradients, second.gradients, kept, strict=True
    ):
        if _bits(gradient) != bits:
            raise GradCheckError(
                f"{name}: the gradient of {label} that the first call returned was overwritten by "
                f"the second; a rule hands out a buffer that it keeps"
            )
        if _bits(again) != bits:
            raise GradCheckError(
                f"{name}: the gradient of {label} differs between two equal calls; the rule "
                f"depends on something besides its inputs, or something changed its inputs"
            )
    for i, (out, again, bits) in enumerate(
        zip(first.outputs, second.outputs, outputs_before, strict=True)
    ):
        if _bits(out) != bits or _bits(again) != bits:
            raise GradCheckError(
                f"{name}: output {i} differs between two equal calls, or the second overwrote the "
                f"first's"
            )


def _require_unshared(
    name: str,
    free: Sequence[str],
    labels: Sequence[str],
    arrays: Sequence[Any],
    first: Run,
    second: Run,
) -> None:
    others = [(label, a) for label, a in zip(labels, arrays, strict=True) if a is not None]
    others += [(f"the cotangent of output {i}", g) for i, g in enumerate(first.cotangents)]
    others += [(f"output {i}", o) for i, o in enumerate(first.outputs)]
    mine = [(f"the gradient of {n}", g) for n, g in zip(free, first.gradients, strict=True)]
    later = [
        (f"the gradient of {n} from another call", g)
        for n, g in zip(free, second.gradients, strict=True)
    ]
    pairs = [(a, b) for a in mine for b in (*others, *later)]
    for (label, gradient), (other, array) in (*pairs, *combinations(mine, 2)):
        if _share(gradient, array):
            raise GradCheckError(
                f"{name}: {label} shares memory with {other}: writing to one would change the "
                f"other; the rule must return an array of its own"
            )


def _require_lasting(
    name: str, fn: Callable[..., Any], arrays: Sequence[Any], cotangents: Sequence[Any]
) -> None:
    """Raise if a later call computes into a result of which a view is still held."""
    held = _views_of_results(name, Run(fn, arrays, cotangents), arrays)
    later = Run(fn, arrays, cotangents)
    for what, view in held:
        if any(_share(view, array) for array in (*later.outputs, *later.gradients)):
            raise GradCheckError(
                f"{name}: a later call writes into the memory of {what}, of which a view is still "
                f"held; take memory back only when nothing refers to it"
            )


def _views_of_results(name: str, run: Run, arrays: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return views of what a run gave but of its inputs; when `run` has died they alone hold it."""
    results = [(f"output {i}", array) for i, array in enumerate(run.outputs)]
    results += [(f"gradient {i}", array) for i, array in enumerate(run.gradients)]
    inputs = [a for a in arrays if a is not None]
    views = []
    for what, array in results:
        if not any(_share(array, a) for a in inputs):
            with backend.placed(name, [array]):  # a GPU's arrays are viewed on their own device
                views.append((what, array[...]))
    return views


def _require_same_through_backward(
    name: str, fn: Callable[..., Any], arrays: Sequence[Any], first: Run, free: Sequence[str]
) -> None:
    """Raise unless `.grad` after `backward` is what `grad` returned, in memory of its own."""
    ts = tensors(arrays, True)
    outputs = [o for o in as_tuple(fn(*ts), name) if backend.is_floating(o.dtype)]
    for i, (out, g) in enumerate(zip(outputs, first.cotangents, strict=True)):
        if out.requires_grad:
            out.backward(Tensor(g), retain_graph=i < len(outputs) - 1)
    leaves = [t for t in ts if t is not None and t.requires_grad]
    for label, leaf, gradient in zip(free, leaves, first.gradients, strict=True):
        if leaf.grad is None:
            continue
        data = leaf.grad.data
        if getattr(getattr(data, "flags", None), "writeable", True) is False:
            raise GradCheckError(f"{name}: .grad of {label} cannot be written to")
        if any(_share(data, g) for g in first.cotangents) or _share(data, leaf.data):
            raise GradCheckError(f"{name}: .grad of {label} shares memory with what it came from")
        if len(outputs) == 1 and _bits(data) != _bits(gradient):
            raise GradCheckError(f"{name}: .grad of {label} differs from what grad() returns")


def _require_guarded(
    name: str, fn: Callable[..., Any], arrays: Sequence[Any], labels: Sequence[str], first: Run
) -> None:
    """Raise if an input overwritten after the forward silently changes a gradient."""
    for i, label in enumerate(labels):
        if not is_floating(arrays[i]):
            continue
        ts = tensors([None if a is None else backend.copied(a) for a in arrays], True)
        outputs = [o for o in as_tuple(fn(*ts), name) if backend.is_floating(o.dtype)]
        with no_grad():
            ts[i][...] = 0.75
        try:
            found = pull_back(outputs, ts, first.cotangents)
        except RuntimeError:
            continue  # noticed: as it should be
        for g, want in zip(found, first.gradients, strict=True):
            if _bits(g.data) != _bits(want):
                raise GradCheckError(
                    f"{name}: {label} was overwritten (t[...] = v) between forward and backward, "
                    f"and the gradient changed without an error; the rule keeps an array that the "
                    f"version counter does not watch"
                )


def _bits(array: Any) -> bytes:
    """Return the contents of a raw array, for comparison to the bit."""
    return backend.to_numpy(array).tobytes()


def _share(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or not isinstance(a, np.ndarray):
        return backend.same_memory(a, b) if type(a) is type(b) else False
    return np.shares_memory(a, b)
