"""`check_grad` and `check_double_grad`: is the derivative of a function right?

The cotangents are random and know nothing of the output. With ones in their place, as the loss
`sum(y)` has it, or with y itself, as in `sum(y**2) / 2`, whole terms vanish: for a batch norm in
training mode both give (nearly) zero for dx whatever the rule does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from tinygrad_bn.testing import functions
from tinygrad_bn.testing.diagnosis import explain
from tinygrad_bn.testing.errors import BlindCheckWarning, GradCheckError, Inconclusive
from tinygrad_bn.testing.functions import FirstOrder, SecondOrder
from tinygrad_bn.testing.noise import nudged_all
from tinygrad_bn.testing.probe import Probe
from tinygrad_bn.testing.report import Comparison, Report

Mode = Literal["auto", "directional", "full", "complex-step"]
_MODES = ("auto", "directional", "full", "complex-step")

#: Below this share of its derivative an error would go unnoticed at worst: a thousandth is far
#: below what realistic mistakes do (the mildest, m/(m - 1) for m values, exceeds it to m = 1000).
MAX_RESOLUTION = 1e-3


def check_grad(
    fn: Callable[..., Any],
    *inputs: Any,
    mode: Mode = "auto",
    directions: int = 2,
    cotangents: Any = None,
    seed: int = 0,
    max_resolution: float = MAX_RESOLUTION,
    rtol: float = 0.0,
) -> Report:
    """Return a report that the gradients of `fn` at `inputs` agree with difference quotients.

    fn: takes Tensors, returns a Tensor or a tuple of them.
    inputs: arrays or Tensors; None passes through. Floating ones are converted to float64 and
        varied one at a time; integers and booleans stay as they are.
    mode: "directional" varies all entries of an input together, along random directions; "full"
        each entry by itself; "complex-step" as directional, for analytic functions of complex
        arrays; "auto" is full for inputs with no more entries than there are directions.
    directions: how many random directions per input.
    cotangents: of the outputs (an array, or one per output); None draws them at random.
    max_resolution: the largest share of a derivative that may be within the tolerance.
    rtol: a relative tolerance to add to the one that is derived; a right gradient needs none.

    Raises GradCheckError where they disagree, `Inconclusive` (a GradCheckError) where that cannot
    be told: at a kink, or where noise leaves a resolution coarser than `max_resolution`.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> report = testing.check_grad(lambda x: x.tanh(), np.array([0.5, -1.0, 2.0]))
    >>> report.directions, report.resolution < 1e-6
    (2, True)
    """
    if mode not in _MODES:
        raise ValueError(f"check_grad: unknown mode {mode!r}; expected one of {_MODES}")
    problem = FirstOrder(fn, inputs)
    return _check("check_grad", problem, mode, directions, cotangents, seed, max_resolution, rtol)[
        0
    ]


def check_double_grad(
    fn: Callable[..., Any],
    *inputs: Any,
    mode: Mode = "auto",
    directions: int = 2,
    cotangents: Any = None,
    seed: int = 0,
    max_resolution: float = MAX_RESOLUTION,
    rtol: float = 0.0,
) -> Report:
    """Return a report that the gradients of the gradients of `fn` are right.

    The ordinary backward pass is differenced, with respect to the inputs and to the cotangents, and
    compared with what `create_graph=True` gives: a rule that freezes what depends on its inputs is
    right in the former and wrong in the latter. Besides, the Hessian must be symmetric:
    <w, H v> = <v, H w> for random v, w.

    Arguments and errors are those of `check_grad` (without "complex-step").

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> testing.check_double_grad(lambda x: x.exp(), np.array([0.5, -1.0])).notes
    ('Hessian symmetric',)
    """
    if mode not in _MODES[:3]:
        raise ValueError(f"check_double_grad: unknown mode {mode!r}; expected one of {_MODES[:3]}")
    with np.errstate(all="ignore"):
        first = FirstOrder(fn, inputs)
        given = _cotangents(first.name, first.value(first.inputs), cotangents, seed)
    problem = SecondOrder(fn, inputs, given)
    report, probe = _check(
        "check_double_grad", problem, mode, directions, None, seed, max_resolution, rtol
    )
    if not first.free:
        return report
    with np.errstate(all="ignore"):
        _require_symmetry(problem, probe)
    return Report(
        report.check, first.name, report.comparisons, report.vacuous, ("Hessian symmetric",)
    )


def _check(
    check: str,
    problem: Any,
    mode: str,
    directions: int,
    cotangents: Any,
    seed: int,
    max_resolution: float,
    rtol: float,
) -> tuple[Report, Probe]:
    if directions < 1:
        raise ValueError(f"{check}: directions is {directions}, expected at least 1")
    if not problem.free:
        raise TypeError(f"{check}: {problem.name}: no input is floating, so there is no gradient")
    # Steps may leave the domain of fn; that is noticed by its not being finite, not by a warning.
    with np.errstate(all="ignore"):
        outputs = problem.value(problem.inputs)
        if not outputs:
            raise TypeError(f"{check}: {problem.name} has no floating output to differentiate")
        if not all(np.isfinite(o).all() for o in outputs):
            raise Inconclusive(
                f"{check}: {problem.name} is not finite at these inputs, so it has no derivative "
                f"there; choose inputs inside its domain"
            )
        probe = Probe(
            problem,
            _cotangents(problem.name, outputs, cotangents, seed),
            outputs,
            max_resolution=max_resolution,
            rtol=rtol,
            seed=seed,
        )
        comparisons: list[Comparison] = []
        vacuous: list[str] = []
        for i in problem.free:
            mine = _check_input(check, probe, i, mode, directions)
            comparisons += mine
            if all(c.size <= c.tolerance.total for c in mine):
                vacuous.append(problem.names[i])
    return Report(check, problem.name, tuple(comparisons), tuple(vacuous)), probe


def _check_input(check: str, probe: Probe, i: int, mode: str, directions: int) -> list[Comparison]:
    """Return the comparisons for input `i`; GradCheckError at the first that fails."""
    x = probe.problem.inputs[i]
    rng = np.random.default_rng((probe.seed, i))
    chosen = [probe.direction(i, rng) for _ in range(directions)]
    labels = [f"direction {k + 1} of {directions}" for k in range(directions)]
    tested = chosen
    if mode == "full" or (mode == "auto" and x.size <= directions):
        tested, labels = [], []
        for index in np.ndindex(x.shape):
            only = np.zeros(x.shape)
            only[index] = chosen[0][index]
            tested.append(only)
            labels.append(f"coordinate {list(index)}")
    compare = probe.along_imaginary if mode == "complex-step" else probe.along
    comparisons = []
    for direction, label in zip(tested, labels, strict=True):
        comparison = compare(i, direction, label)
        if not comparison.passed:
            raise GradCheckError(explain(check, probe, i, comparison, chosen))
        comparisons.append(comparison)
    return comparisons


def _require_symmetry(problem: SecondOrder, probe: Probe) -> None:
    """Raise GradCheckError unless <w, H v> = <v, H w>, H the Hessian of Σ <cotangent, output>."""
    rng = np.random.default_rng((probe.seed, 10_000))
    free = problem.first.free
    v = [probe.direction(i, rng) for i in free]
    w = [probe.direction(i, rng) for i in free]
    here = probe.outputs

    def products(arrays: Sequence[Any]) -> tuple[float, float, float]:
        hv = problem.gradient(arrays, v)[: len(free)]
        hw = problem.gradient(arrays, w)[: len(free)]
        wide = [a * b for a, b in zip((*w, *v), (*hv, *hw), strict=True)]
        # Where the Hessian itself cancels, rounding is relative to the gradient's own terms.
        gradient = [a * b for a, b in zip((*v, *w), (*here, *here), strict=True)]
        absolute = sum(float(np.abs(a).sum()) for a in (*wide, *gradient))
        return (
            sum(float(a.sum()) for a in wide[: len(free)]),
            sum(float(a.sum()) for a in wide[len(free) :]),
            absolute,
        )

    left, right, absolute = products(problem.inputs)
    # Rounding of the terms and of their sum; 16 units for the rule's own few operations.
    tolerance = 16 * float(np.finfo(np.float64).eps) * absolute
    if abs(left - right) <= tolerance:
        return
    nudge_rng = np.random.default_rng((probe.seed, 20_000))
    nudges = (nudged_all(problem.inputs, nudge_rng) for _ in range(3))
    # 8 times the largest of three changes under nudged inputs, as for the analytic derivative.
    tolerance += 8 * max(abs(a - left) + abs(b - right) for a, b, _ in map(products, nudges))
    if not abs(left - right) <= tolerance:
        raise GradCheckError(
            f"check_double_grad: {problem.first.name}: its Hessian is not symmetric: "
            f"<w, H v> = {left:.9g} but <v, H w> = {right:.9g} for random v, w (tolerance "
            f"{tolerance:.1e}: rounding, and what nudging the inputs changes); some rule does not "
            f"belong to its forward"
        )


def _cotangents(
    name: str, outputs: Sequence[np.ndarray], given: Any, seed: int
) -> list[np.ndarray]:
    """Return one float64 cotangent per output: those given, or random ones."""
    if given is None:
        rng = np.random.default_rng((seed, 7))
        return [rng.uniform(0.5, 1.5, o.shape) * rng.choice((-1.0, 1.0), o.shape) for o in outputs]
    listed = list(given) if isinstance(given, (tuple, list)) else [given]
    arrays = [np.asarray(a, dtype=np.float64) for a in functions.raw_inputs(listed)]
    if [a.shape for a in arrays] != [o.shape for o in outputs]:
        raise ValueError(
            f"{name}: cotangents of shapes {[a.shape for a in arrays]}, but outputs of shapes "
            f"{[o.shape for o in outputs]}; give one per output, of its shape"
        )
    for cotangent, output in zip(arrays, outputs, strict=True):
        if cotangent.size > 1 and _proportional(cotangent, np.ones_like(output)):
            _warn_blind(name, "constant, as the loss sum(y) has it")
        elif cotangent.size > 1 and _proportional(cotangent, output):
            _warn_blind(name, "the output itself, as the loss sum(y**2) / 2 has it")
    return arrays


def _proportional(a: np.ndarray, b: np.ndarray) -> bool:
    aa, bb, ab = (float(np.vdot(p, q)) for p, q in ((a, a), (b, b), (a, b)))
    # The cosine is 1 within rounding; zeros, as y where gamma is 0, have no direction.
    return ab * ab >= (1 - 1e-12) * aa * bb > 0


def _warn_blind(name: str, what: str) -> None:
    warnings.warn(
        f"{name}: the cotangent is {what}. Whole terms of a gradient vanish then (for batch norm "
        f"in training mode all of dx), and so would their faults; leave it out for a random one",
        BlindCheckWarning,
        stacklevel=5,
    )
