"""Is it the same function everywhere: in any layout, on raw arrays and Tensors, in any kernel?

Sums taken in another order round differently, so results are compared within what rounding
explains: `noise.rounding_tolerance`, which is measured at the inputs at hand. Where nothing is
reordered the comparison is to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.backend import cuda, kernels
from tinygrad_bn.testing.errors import GradCheckError, Inconclusive
from tinygrad_bn.testing.functions import input_names, is_floating, name_of, raw_inputs
from tinygrad_bn.testing.gradients import check_grad
from tinygrad_bn.testing.invariants import Run
from tinygrad_bn.testing.layouts import LAYOUTS
from tinygrad_bn.testing.noise import rounding_tolerance, spread
from tinygrad_bn.testing.report import Report

Function = Callable[..., Any]


def check_raw(fn: Function, *inputs: Any, seed: int = 0) -> Report:
    """Return a report that `fn` does on raw arrays what it does on Tensors.

    fn: of arrays or Tensors, as every op and everything made of ops is. Its output for raw arrays
        must be its output for Tensors to the bit; and the gradients from rules that run on raw
        arrays those from rules that run on Tensors (`create_graph`), up to rounding: the latter
        may compute again what the former had saved.
    seed: of the random cotangents.

    Raises GradCheckError that names what differs.

    >>> import numpy as np
    >>> import tinygrad_bn as tg
    >>> from tinygrad_bn import testing
    >>> from tinygrad_bn.op import REGISTRY
    >>> print(testing.check_raw(REGISTRY["tanh"], np.ones(3)))
    check_raw(tanh): passed; raw arrays and Tensors agree
    """
    name = f"check_raw: {name_of(fn)}"
    arrays = raw_inputs(inputs)
    wrapped = Run(fn, arrays, seed=seed)
    out = fn(*arrays)
    plain = list(out) if isinstance(out, (tuple, list)) else [out]
    for i, (mine, theirs) in enumerate(zip(plain, wrapped.outputs, strict=True)):
        if type(mine) is not type(theirs):
            raise GradCheckError(
                f"{name}: output {i} for raw arrays is a {type(mine).__name__}, expected a "
                f"{type(theirs).__name__}: arrays in, arrays out"
            )
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or not _equal(mine, theirs):
            raise GradCheckError(f"{name}: output {i} for raw arrays differs from that for Tensors")
    recorded = Run(fn, arrays, wrapped.cotangents, create_graph=True)
    _require_same_run(
        f"{name}: rules on Tensors (create_graph) against rules on raw arrays",
        recorded,
        wrapped,
        _Noise(fn, [None if a is None else backend.to_numpy(a) for a in arrays], wrapped),
    )
    return Report("check_raw", name_of(fn), notes=("raw arrays and Tensors agree",))


def check_layouts(fn: Function, *inputs: Any, seed: int = 0) -> Report:
    """Return a report that `fn` and its gradients do not depend on how arrays lie in memory.

    C and Fortran order, permuted axes, negative strides, gaps, zero strides, read-only memory: of
    the inputs and, by themselves, of the cotangents.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> print(testing.check_layouts(lambda x: x.sum(axis=0), np.ones((3, 2))))
    check_layouts(<lambda>): passed; 8 layouts agree
    """
    arrays = raw_inputs(inputs)
    name = f"check_layouts: {name_of(fn)}"
    with backend.placed(name, arrays):
        plain = _in_order(arrays)
        base = Run(fn, plain, seed=seed)
        noise = _Noise(fn, plain, base)
        for layout in LAYOUTS:
            arranged = [None if a is None else layout(a) for a in plain]
            reference, mine = base, noise
            if not layout.keeps_values:
                repeated = _in_order(arranged)
                reference = Run(fn, repeated, base.cotangents)
                mine = _Noise(fn, repeated, reference)
            run = Run(fn, arranged, base.cotangents)
            _require_same_run(f"{name}: inputs in layout {layout.name!r}", run, reference, mine)
            cotangents = [layout(g) for g in base.cotangents]
            reference, mine = base, noise
            if not layout.keeps_values:
                reference = Run(fn, plain, _in_order(cotangents))
                mine = _Noise(fn, plain, reference)
            run = Run(fn, plain, cotangents)
            _require_same_run(f"{name}: cotangents in layout {layout.name!r}", run, reference, mine)
    return Report("check_layouts", name_of(fn), notes=(f"{len(LAYOUTS)} layouts agree",))


def check_backends(fn: Function, *inputs: Any, seed: int = 0) -> Report:
    """Return a report that every kernel family and backend at hand agrees with the generic form.

    The generic form on NumPy arrays is the definition. On a GPU the gradients are differenced too,
    there. Families that cannot serve here, and a GPU that is not there, are named in the report's
    notes with the reason.

    fn, inputs: as of `check_grad`, which is what differences on a GPU. seed: of the cotangents.

    Raises GradCheckError that names the family or device that differs.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> testing.check_backends(lambda x: x.exp(), np.ones(3)).notes[0]  # doctest: +ELLIPSIS
    'agree with generic: numpy...'
    """
    host = [None if a is None else backend.to_numpy(a) for a in raw_inputs(inputs)]
    name = f"check_backends: {name_of(fn)}"
    with kernels.use_kernels("generic"):
        base = Run(fn, host, seed=seed)
        noise = _Noise(fn, host, base)
        noise.measure()
    agree, absent, differenced = [], [], []
    for family in (f for f in kernels.CHOICES if f != "generic"):
        device = "cuda" if family == "cuda" else "cpu"
        reason = kernels.unusable_because(family)
        if reason is None and device == "cuda" and not backend.cuda_is_available():
            reason = cuda.unavailable_because()
        if reason is not None:
            absent.append(f"{family} not compared: {reason}")
            continue
        arrays, cotangents = _placed(host, device), _placed(base.cotangents, device)
        choices = (family, "generic") if device == "cuda" else (family,)
        for choice in choices:
            with kernels.use_kernels(choice):
                run = Run(fn, arrays, cotangents)
                _require_same_run(f"{name}: kernels {choice!r} on {device}", run, base, noise)
                if device == "cuda" and run.cotangents and any(map(is_floating, arrays)):
                    differenced.append(_differenced(fn, arrays, seed, f"{choice!r} on {device}"))
        agree.append(family)
    notes = (f"agree with generic: {', '.join(agree) or 'no family'}", *absent, *differenced)
    return Report("check_backends", name_of(fn), notes=notes)


def _differenced(fn: Function, arrays: Sequence[Any], seed: int, where: str) -> str:
    """Return a note that the gradients agree with differences taken where the arrays are.

    In float64, so the kernels of that; a difference that cannot tell (a kink) is noted, since what
    was asked is whether the results agree.
    """
    try:
        check_grad(fn, *arrays, seed=seed)
    except Inconclusive as error:
        return f"kernels {where} not differenced: {error}"
    except GradCheckError as error:
        raise GradCheckError(f"check_backends: kernels {where}: {error}") from None
    return f"kernels {where} differenced there"


# --- comparing ---------------------------------------------------------------------------------


class _Noise:
    """How far outputs and gradients of a run move when inputs and cotangents are nudged.

    Measured when first needed. The cotangents too: a gradient may be nothing but a sum of them.
    """

    def __init__(self, fn: Function, arrays: Sequence[Any], base: Run):
        self.fn = fn
        self.arrays = arrays
        self.base = base
        self.labels = _gradient_labels(fn, arrays)
        self.measured: list[float] | None = None

    def measure(self) -> list[float]:
        if self.measured is None:
            count = len(self.arrays)

            def results(nudged: Sequence[Any]) -> list[np.ndarray]:
                run = Run(self.fn, nudged[:count], nudged[count:])
                return _host((*run.outputs, *run.gradients))

            at = _host((*self.base.outputs, *self.base.gradients))
            self.measured = spread(results, [*self.arrays, *self.base.cotangents], at)
        return self.measured


def _require_same_run(name: str, run: Run, want: Run, noise: _Noise) -> None:
    labels = [f"output {i}" for i in range(len(want.outputs))] + noise.labels
    got = (*run.outputs, *run.gradients)
    expected = (*want.outputs, *want.gradients)
    for i, (label, a, b) in enumerate(zip(labels, got, expected, strict=True)):
        _require_close(name, label, a, b, lambda i=i: noise.measure()[i])


def _require_close(
    name: str, label: str, got: Any, want: Any, moved_by: Callable[[], float]
) -> None:
    """Raise GradCheckError unless `got` equals `want` up to rounding."""
    if got.dtype != want.dtype or got.shape != want.shape:
        raise GradCheckError(
            f"{name}: {label} is {got.dtype}{list(got.shape)}, "
            f"expected {want.dtype}{list(want.shape)}"
        )
    a, b = _host((got, want))
    if _equal(a, b):
        return
    if not backend.is_floating(b.dtype):
        raise GradCheckError(
            f"{name}: {label} differs: {a.tolist()!r:.80}, expected {b.tolist()!r:.80}"
        )
    tolerance = rounding_tolerance(b, 0.0)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    same = (wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))
    with np.errstate(invalid="ignore"):  # equal infinities
        error = np.where(same, 0.0, np.abs(wide_a - wide_b))
    if not np.all(error <= tolerance):
        tolerance = rounding_tolerance(b, moved_by())
    if not np.all(error <= tolerance):
        at = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), b.shape)
        raise GradCheckError(
            f"{name}: {label} differs at {[int(k) for k in at]}: {wide_a[at]:.9g}, expected "
            f"{wide_b[at]:.9g} (difference {error[at]:.2g}, tolerance {tolerance:.2g}: 16 times "
            f"what nudging inputs and cotangents by two units in the last place changes, and the "
            f"rounding of sums)"
        )


def _gradient_labels(fn: Function, arrays: Sequence[Any]) -> list[str]:
    labels = input_names(fn, len(arrays))
    return [f"gradient of {n}" for n, a in zip(labels, arrays, strict=True) if is_floating(a)]


def _in_order(arrays: Sequence[Any]) -> list[Any]:
    """Return copies of arrays in C order."""
    return [None if a is None else a.copy(order="C") for a in arrays]


def _placed(arrays: Sequence[Any], device: str) -> list[Any]:
    return [None if a is None else backend.to_device(a, device) for a in arrays]


def _host(arrays: Sequence[Any]) -> list[np.ndarray]:
    return [backend.to_numpy(a) for a in arrays]


def _equal(a: Any, b: Any) -> bool:
    a, b = _host((a, b))
    return bool(np.array_equal(a, b, equal_nan=backend.is_floating(b.dtype)))
