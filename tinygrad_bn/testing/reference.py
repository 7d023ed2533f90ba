"""`check_reference`: does a function compute what it should, in the dtype that it is used in?

Difference quotients need float64's digits and say nothing about float32 or float16. There the
answer is compared with one computed in longdouble from the same (rounded) inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.op import Op
from tinygrad_bn.testing.cotangents import signed_uniform
from tinygrad_bn.testing.errors import GradCheckError, Inconclusive
from tinygrad_bn.testing.functions import input_names, is_floating, name_of, raw_inputs
from tinygrad_bn.testing.invariants import Run
from tinygrad_bn.testing.noise import nudged_all, rounding_tolerance, spread
from tinygrad_bn.testing.report import Report
from tinygrad_bn.testing.ties import jumps_unseen

WIDE = np.longdouble

#: What a report says on platforms whose longdouble is float64 (Windows, macOS on ARM).
NOT_WIDER = "longdouble is float64 here: the reference has no digits to spare"

#: Digits that a difference quotient of a reference in longdouble keeps at least, for steps of
#: ε^⅓ of the inputs: its errors are of the order of ε^⅔.
_QUOTIENT = 100 * float(np.finfo(WIDE).eps) ** (2 / 3)


def check_reference(
    fn: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    ulps: float | None = None,
    scale: Any = None,
    gradients: bool = True,
    seed: int = 0,
) -> Report:
    """Return a report that `fn` at `inputs`, in their own dtypes, agrees with a wider reference.

    reference: of NumPy arrays, the floating ones in longdouble; returns an array or a tuple.
    gradient: (cotangents, *inputs) -> one array (or None) per floating input: the right gradients,
        in longdouble. Without it an op is differentiated by its rules, in longdouble, and any
        other reference by difference quotients, of which the gradient's product with a random
        direction must be near.
    ulps: how many units in the last place of the outputs' (gradients') dtype the error may have;
        None derives the tolerance: 16 times what moving inputs and cotangents by two units does to
        the reference or to `fn` itself, and the rounding of sums. That forgives a function that
        loses digits on the way (the softmax of a near certainty has to); give `ulps` to one that
        must not.
    scale: with `ulps`, of what size the units are: an array for each output, or one for all;
        None is the right value itself.
    gradients: whether to compare them too.
    seed: of the random cotangents and directions.

    Where the right value overflows the dtype, an infinity is right.

    Raises GradCheckError that names the entry that is worst; `Inconclusive` where the reference
    itself is not finite in any entry, and where its gradient is another one, by a jump, within
    what the narrow dtype rounds off in its outputs: at a kink whose side the dtype cannot tell.

    >>> x = np.linspace(-3, 3, 7).astype(np.float16)
    >>> print(check_reference(lambda t: t.tanh(), x, reference=np.tanh))
    check_reference(<lambda>): passed; float16 agrees with longdouble
    """
    name = f"check_reference: {name_of(fn)}"
    arrays = [None if a is None else backend.to_numpy(a) for a in raw_inputs(inputs)]
    with np.errstate(all="ignore"):
        run = Run(fn, arrays, seed=seed)
        wide = [_wide(a) for a in arrays]
        right = _values(reference, wide)
        got = [backend.to_numpy(o) for o in run.outputs]
        if len(right) != len(got) or any(
            w.shape != g.shape for w, g in zip(right, got, strict=True)
        ):
            raise GradCheckError(
                f"{name}: outputs of shapes {[g.shape for g in got]}, expected those of the "
                f"reference, {[w.shape for w in right]}"
            )
        sized = [w for w in right if w.size]
        if sized and not any(np.isfinite(w).any() for w in sized):
            raise Inconclusive(f"{name}: the reference is not finite at these inputs")
        moved = _moved(lambda a: _values(reference, a), arrays, right, ulps)
        own = _own_noise(fn, run, arrays, ulps)
        scales = list(scale) if isinstance(scale, (tuple, list)) else [scale] * len(got)
        tolerances = []
        for i, (g, w) in enumerate(zip(got, right, strict=True)):
            allowed = _tolerance(g, w, max(moved[i], own[i]), ulps, scales[i])
            _require(f"{name}: output {i}", g, w, allowed)
            tolerances.append(float(np.max(allowed, initial=0)))
        if gradients and run.gradients:
            own = own[len(got) :]
            _require_gradients(
                name, fn, run, arrays, wide, reference, gradient, ulps, own, tolerances, seed
            )
    kinds = sorted({g.dtype.name for g in got})
    notes = (f"{', '.join(kinds)} agrees with longdouble", *wideness())
    return Report("check_reference", name_of(fn), notes=notes)


def wideness() -> tuple[str, ...]:
    """Return what a report says of longdouble: something only where it is no wider than float64."""
    return (NOT_WIDER,) if np.finfo(WIDE).eps >= np.finfo(np.float64).eps else ()


def gradient_by_rules(fn: Callable[..., Any]) -> Callable[..., list[np.ndarray]]:
    """Return (cotangents, *inputs) -> the gradients of `fn`, a function of Tensors that is right.

    >>> g, x = np.ones(2, np.longdouble), np.arange(2, dtype=np.longdouble)
    >>> print(*gradient_by_rules(lambda t: t * t)((g,), x))
    [0. 2.]
    """

    def gradient(cotangents: Sequence[Any], *inputs: Any) -> list[np.ndarray]:
        return [backend.to_numpy(g) for g in Run(fn, inputs, cotangents).gradients]

    return gradient


def _require_gradients(
    name: str,
    fn: Callable[..., Any],
    run: Run,
    arrays: Sequence[Any],
    wide: Sequence[Any],
    reference: Callable[..., Any],
    gradient: Callable[..., Any] | None,
    ulps: float | None,
    own: Sequence[float],
    tolerances: Sequence[float],
    seed: int,
) -> None:
    free = [i for i, a in enumerate(arrays) if is_floating(a)]
    labels = [input_names(fn, len(arrays))[i] for i in free]
    cotangents = [backend.to_numpy(g).astype(WIDE) for g in run.cotangents]
    found = [backend.to_numpy(g) for g in run.gradients]
    count = len(arrays)
    if gradient is None and isinstance(reference, Op):
        gradient = gradient_by_rules(reference)
    if gradient is None:
        _require_quotients(name, labels, free, found, wide, cotangents, reference, seed)
        return

    def pull(values: Sequence[Any]) -> list[np.ndarray]:
        given = gradient(tuple(values[count:]), *values[:count])
        listed = list(given) if isinstance(given, (tuple, list)) else [given]
        return [
            np.zeros_like(values[i]) if g is None else np.asarray(g)
            for i, g in zip(free, listed, strict=True)
        ]

    everything = [*arrays, *(backend.to_numpy(g) for g in run.cotangents)]
    right = pull([*wide, *cotangents])
    moved = _moved(pull, everything, right, ulps)
    for k, (label, g, w, *noise) in enumerate(zip(labels, found, right, moved, own, strict=True)):
        allowed = _tolerance(g, w, max(noise), ulps, None)
        try:
            _require(f"{name}: the gradient of {label}", g, w, allowed)
        except GradCheckError as error:
            if jumps_unseen(
                lambda inputs: _values(reference, inputs),
                lambda inputs, k=k: pull([*inputs, *cotangents])[k],
                wide,
                tolerances,
                float(np.max(allowed)),
                seed,
            ):
                raise Inconclusive(
                    f"{error}; but {g.dtype} cannot tell on which side of a kink this is"
                ) from None
            raise


def _require_quotients(
    name: str,
    labels: Sequence[str],
    free: Sequence[int],
    found: Sequence[np.ndarray],
    wide: Sequence[Any],
    cotangents: Sequence[np.ndarray],
    reference: Callable[..., Any],
    seed: int,
) -> None:
    """Compare the gradients with difference quotients of the reference along a direction."""
    rng = np.random.default_rng((seed, 11))
    step = float(np.finfo(WIDE).eps) ** (1 / 3)

    def scalar(values: Sequence[Any]) -> tuple[Any, float]:
        # Integer and boolean outputs have no cotangent.
        outputs = [o for o in _values(reference, values) if o.dtype.kind == "f"]
        terms = [g * o for g, o in zip(cotangents, outputs, strict=True)]
        return sum(t.sum() for t in terms), float(sum(np.abs(t).sum() for t in terms))

    for label, i, g in zip(labels, free, found, strict=True):
        x = wide[i]
        size = float(np.abs(x).max(initial=0)) or 1.0
        direction = signed_uniform(rng, 0.5, 1.0, x.shape) * size
        ends = []
        for sign in (1, -1):
            moved = list(wide)
            moved[i] = x + sign * step * direction
            ends.append(scalar(moved))
        numeric = float((ends[0][0] - ends[1][0]) / (2 * step))
        terms = g.astype(WIDE) * direction
        size_of_terms = float(np.abs(terms).sum())
        # The gradient's own rounding, term by term (16 as for outputs); the quotient's error.
        tolerance = 16 * backend.machine_epsilon(g.dtype) * size_of_terms
        tolerance += _QUOTIENT * (ends[0][1] + size_of_terms)
        analytic = float(terms.sum())
        if not np.isfinite(numeric):
            raise Inconclusive(f"{name}: the reference is not finite around {label}")
        if not abs(analytic - numeric) <= tolerance:
            raise GradCheckError(
                f"{name}: the gradient of {label} in {g.dtype} is wrong along a random direction: "
                f"{analytic:.9g}, but the reference rises by {numeric:.9g} (tolerance "
                f"{tolerance:.2g}: 16 units in the last place, and the quotient's error)"
            )


def _wide(array: Any) -> Any:
    return array.astype(WIDE) if is_floating(array) else array


def _values(function: Callable[..., Any], arrays: Sequence[Any]) -> list[np.ndarray]:
    out = function(*arrays)
    listed = out if isinstance(out, (tuple, list)) else (out,)
    return [
        np.asarray(getattr(o, "data", o) if not isinstance(o, np.ndarray) else o) for o in listed
    ]


def _moved(
    function: Callable[[Sequence[Any]], Sequence[np.ndarray]],
    arrays: Sequence[Any],
    at: Sequence[np.ndarray],
    ulps: float | None,
) -> list[float]:
    """Return how far the wide answers move when the narrow inputs are nudged (max norm)."""
    widest = [0.0] * len(at)
    if ulps is not None:
        return widest
    rng = np.random.default_rng(5)
    for _ in range(2):
        near = [_wide(a) for a in nudged_all(arrays, rng)]
        for i, (a, b) in enumerate(zip(function(near), at, strict=True)):
            apart = np.abs(a.astype(WIDE) - b.astype(WIDE))
            widest[i] = max(widest[i], float(apart[np.isfinite(apart)].max(initial=0)))
    return widest


def _own_noise(
    fn: Callable[..., Any], run: Run, arrays: Sequence[Any], ulps: float | None
) -> list[float]:
    """Return how far `fn`'s own outputs and gradients move when all that goes in is nudged."""
    at = [backend.to_numpy(a) for a in (*run.outputs, *run.gradients)]
    if ulps is not None:
        return [0.0] * len(at)
    count = len(arrays)

    def results(near: Sequence[Any]) -> list[np.ndarray]:
        moved = Run(fn, near[:count], near[count:])
        return [backend.to_numpy(a) for a in (*moved.outputs, *moved.gradients)]

    return spread(results, [*arrays, *(backend.to_numpy(g) for g in run.cotangents)], at)


def _require(name: str, got: np.ndarray, right: np.ndarray, tolerance: Any) -> None:
    """Raise GradCheckError unless `got` is near enough to the longdouble value `right`."""
    if not backend.is_floating(got.dtype):
        if not np.array_equal(got, right):
            raise GradCheckError(f"{name} is {got.tolist()!r:.80}, expected {right.tolist()!r:.80}")
        return
    error = np.abs(got.astype(WIDE) - right)
    same = (got == right.astype(got.dtype)) | (np.isnan(got) & np.isnan(right))
    error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
    over = error > tolerance
    if over.any():
        at = np.unravel_index(int(np.argmax(np.where(over, error, -1))), error.shape)
        units = float(error[at] / _units(got, right)[at])
        raise GradCheckError(
            f"{name} in {got.dtype} is wrong at {[int(k) for k in at]}: {float(got[at]):.9g}, "
            f"expected {float(right[at]):.9g}, off by {units:.3g} units in the last place "
            f"(tolerance {float(np.broadcast_to(tolerance, error.shape)[at]):.2g})"
        )


def _tolerance(
    got: np.ndarray, right: np.ndarray, moved: float, ulps: float | None, scale: Any
) -> Any:
    """Return how far `got` may be from `right`: one number, or one for each entry."""
    if not backend.is_floating(got.dtype):
        return 0.0
    if ulps is not None:
        return ulps * _units(got, right if scale is None else scale)
    tiny = float(np.finfo(got.dtype).smallest_subnormal)
    return rounding_tolerance(right.astype(got.dtype), moved) + 4 * tiny


def _units(got: np.ndarray, size: Any) -> Any:
    """Return units in the last place of the dtype of `got`, for values of this size."""
    tiny = float(np.finfo(got.dtype).smallest_subnormal)
    return backend.machine_epsilon(got.dtype) * np.abs(size) + tiny
