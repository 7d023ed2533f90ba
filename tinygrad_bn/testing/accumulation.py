"""`check_accumulation`: what is used twice has the sum of both gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.tensor import Tensor
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
from tinygrad_bn.testing.invariants import Run
from tinygrad_bn.testing.report import Report


def check_accumulation(fn: Callable[..., Any], *inputs: Any, seed: int = 0) -> Report:
    """Return a report that the gradients of two uses of `fn` at the same inputs add up.

    In one backward pass through both uses, in whichever order they were made, and in two
    `backward` calls one after the other into the same `.grad`. The cotangents of the two uses
    differ, so neither use can stand in for the other; `seed` is theirs.

    Raises GradCheckError that names the input whose gradient is not the sum.

    >>> from tinygrad_bn import testing
    >>> print(testing.check_accumulation(lambda x: x * x, np.ones(3)))
    check_accumulation(<lambda>): passed; gradients of 2 uses add up
    """
    name = f"check_accumulation: {name_of(fn)}"
    arrays = raw_inputs(inputs)
    labels = [
        n for n, a in zip(input_names(fn, len(arrays)), arrays, strict=True) if is_floating(a)
    ]
    runs = [Run(fn, arrays, seed=seed), Run(fn, arrays, seed=seed + 1)]
    want = [(a, b) for a, b in zip(runs[0].gradients, runs[1].gradients, strict=True)]
    for order in (1, -1):
        leaves = tensors(arrays, True)
        used = [_floating_outputs(fn, leaves, name) for _ in runs]
        outputs = [o for outs in used[::order] for o in outs]
        cotangents = [g for run in runs[::order] for g in run.cotangents]
        found = pull_back(outputs, leaves, cotangents)
        _require_sum(name, labels, [g.data for g in found], want, "both uses in one backward pass")
    leaves = tensors(arrays, True)
    used = [_floating_outputs(fn, leaves, name) for _ in runs]
    for outs, run in zip(used, runs, strict=True):
        last = len(outs) - 1
        for i, (out, g) in enumerate(zip(outs, run.cotangents, strict=True)):
            if out.requires_grad:
                out.backward(Tensor(g), retain_graph=i < last)
    free = [t for t in leaves if t is not None and t.requires_grad]
    # An input that nothing depends on has no gradient, which counts as zero.
    grads = [np.zeros(t.shape, t.dtype) if t.grad is None else t.grad.data for t in free]
    _require_sum(name, labels, grads, want, "two backward() calls")
    return Report("check_accumulation", name_of(fn), notes=("gradients of 2 uses add up",))


def _floating_outputs(fn: Callable[..., Any], inputs: list[Any], name: str) -> list[Any]:
    return [o for o in as_tuple(fn(*inputs), name) if backend.is_floating(o.dtype)]


def _require_sum(
    name: str, labels: list[str], found: list[Any], want: list[tuple[Any, Any]], how: str
) -> None:
    for label, got, (a, b) in zip(labels, found, want, strict=True):
        got, a, b = (backend.to_numpy(v) for v in (got, a, b))
        wide = np.float64
        with np.errstate(all="ignore"):
            right = a.astype(wide) + b.astype(wide)
            error = np.abs(got.astype(wide) - right)
            # The terms may be added in another order, with one rounding for each addition.
            size = np.abs(a.astype(wide)) + np.abs(b.astype(wide))
            allowed = 4 * backend.machine_epsilon(got.dtype) * size
            bad = ~(error <= allowed) & ~np.isnan(right)
        if bad.any():
            at = tuple(int(k) for k in np.argwhere(bad)[0])
            once = np.allclose(got, a) or np.allclose(got, b)
            raise GradCheckError(
                f"{name}: {how}: the gradient of {label} at {list(at)} is {got[at]:.9g}, expected "
                f"{a[at]:.9g} + {b[at]:.9g}"
                + (
                    "; one of the two uses is lost: add to a gradient, do not set it"
                    if once
                    else ""
                )
            )
