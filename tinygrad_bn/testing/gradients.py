"""`check_grad` and `check_double_grad`: is the derivative of a function right?

The cotangents are random and know nothing of the output. With ones in their place, as the loss
`sum(y)` has it, or with y itself, as in `sum(y**2) / 2`, whole terms vanish: for a batch norm in
training mode both give (nearly) zero for dx whatever the rule does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.testing import functions
from tinygrad_bn.testing.cotangents import random_cotangents
from tinygrad_bn.testing.diagnosis import explain
from tinygrad_bn.testing.errors import BlindCheckWarning, GradCheckError, Inconclusive, is_by_chance
from tinygrad_bn.testing.functions import FirstOrder, SecondOrder
from tinygrad_bn.testing.noise import nudged_all
from tinygrad_bn.testing.probe import Probe, dot
from tinygrad_bn.testing.report import Comparison, Report
from tinygrad_bn.testing.reproduction import snippet

Mode = Literal["auto", "directional", "full", "complex-step"]
_MODES = ("auto", "directional", "full", "complex-step")

#: Below this share of its derivative an error would go unnoticed at worst: a thousandth is far
#: below what realistic mistakes do (the mildest, m/(m - 1) for m values, exceeds it to m = 1000).
MAX_RESOLUTION = 1e-3

#: The least share, of that of the largest, with which an input is varied together with others.
_SHARE = 1e-2


def check_grad(
    fn: Callable[..., Any],
    *inputs: Any,
    mode: Mode = "auto",
    directions: int = 1,
    cotangents: Any = None,
    seed: int = 0,
    max_resolution: float = MAX_RESOLUTION,
    rtol: float = 0.0,
) -> Report:
    """Return a report that the gradients of `fn` at `inputs` agree with difference quotients.

    fn: takes Tensors, returns a Tensor or a tuple of them.
    inputs: arrays or Tensors, on any device; None passes through. Floating ones are converted to
        float64 and varied, where they are; integers and booleans stay as they are.
    mode: "directional" varies all entries together, along random directions, and all inputs
        together where each of them can then still be seen; "full" each entry by itself;
        "complex-step" is directional, input by input, for analytic functions of complex arrays;
        "auto" is directional, and full for inputs with no more entries than there are directions.
    directions: how many random directions. One sees every fault, but for a chance as small as the
        resolution: a fault would have to be at right angles to it.
    cotangents: of the outputs (an array, or one per output); None draws them at random.
    max_resolution: the largest share of a derivative that may be within the tolerance.
    seed: of the random directions and cotangents.
    rtol: a relative tolerance to add to the one that is derived; a right gradient needs none.

    Raises GradCheckError where they disagree, `Inconclusive` (a GradCheckError) where that cannot
    be told: at a kink, or where noise leaves a resolution coarser than `max_resolution`.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> report = testing.check_grad(lambda x: x.tanh(), np.array([0.5, -1.0, 2.0]))
    >>> report.directions, report.resolution < 1e-6
    (1, True)
    """
    asked = _Asked("check_grad", fn, mode, directions, cotangents, seed, max_resolution, rtol)
    return asked.run(inputs)[0]


def check_double_grad(
    fn: Callable[..., Any],
    *inputs: Any,
    mode: Mode = "auto",
    directions: int = 1,
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
    asked = _Asked(
        "check_double_grad", fn, mode, directions, cotangents, seed, max_resolution, rtol
    )
    report, problem, probe = asked.run(inputs)
    if not problem.first.free:
        return report
    with backend.placed("check_double_grad", problem.given), np.errstate(all="ignore"):
        _require_symmetry(problem, probe)
    return replace(report, function=problem.first.name, notes=("Hessian symmetric",))


@dataclass(frozen=True)
class _Asked:
    """What a check was asked for; `run` does it, and does it again on other inputs."""

    check: str
    fn: Callable[..., Any]
    mode: str
    directions: int
    cotangents: Any
    seed: int
    max_resolution: float
    rtol: float

    def run(self, inputs: Sequence[Any], explained: bool = True) -> tuple[Report, Any, Probe]:
        """Return the report, and what it was made with; raise for what is wrong.

        explained: whether the error says what is wrong.
        """
        check = self.check
        modes = _MODES if check == "check_grad" else _MODES[:3]
        if self.mode not in modes:
            raise ValueError(f"{check}: unknown mode {self.mode!r}; expected one of {modes}")
        if self.directions < 1:
            raise ValueError(f"{check}: directions is {self.directions}, expected at least 1")
        # Steps may leave the domain of fn; what tells is that it is not finite, not a warning.
        with backend.placed(check, functions.raw_inputs(inputs)), np.errstate(all="ignore"):
            problem, cotangents = self._problem(inputs)
            probe = Probe(
                problem,
                *problem.both(
                    problem.inputs,
                    lambda outputs: self._cotangents(problem, outputs, cotangents),
                ),
                max_resolution=self.max_resolution,
                rtol=self.rtol,
                seed=self.seed,
            )
            chosen = {i: self._directions(probe, i) for i in problem.free}
            comparisons: list[Comparison] = []
            vacuous: list[str] = []
            alone = list(problem.free)
            if self.mode in ("auto", "directional"):
                comparisons, alone = _check_together(probe, chosen)
            for i in alone:
                mine = self._check_input(probe, i, chosen[i], explained)
                comparisons += mine
                if all(c.size <= c.tolerance.total for c in mine):
                    vacuous.append(problem.names[i])
        return Report(check, problem.name, tuple(comparisons), tuple(vacuous)), problem, probe

    def _problem(self, inputs: Sequence[Any]) -> tuple[Any, Any]:
        """Return what is differenced, and the cotangents that were given for its outputs."""
        first = FirstOrder(self.fn, inputs)
        if not first.free:
            raise TypeError(
                f"{self.check}: {first.name}: no input is floating, so there is no gradient"
            )
        if self.check == "check_grad":
            return first, self.cotangents
        outputs = first.value(first.inputs)
        given = self._cotangents(first, outputs, self.cotangents)
        return SecondOrder(self.fn, inputs, given), None

    def _cotangents(self, problem: Any, outputs: list[Any], given: Any) -> list[Any]:
        if not outputs:
            raise TypeError(f"{self.check}: {problem.name} has no floating output to differentiate")
        if not all(backend.array_module(o).isfinite(o).all().item() for o in outputs):
            raise Inconclusive(
                f"{self.check}: {problem.name} is not finite at these inputs, so it has no "
                f"derivative there; choose inputs inside its domain"
            )
        return _cotangents(problem.name, outputs, given, self.seed)

    def _directions(self, probe: Probe, i: int) -> list[np.ndarray]:
        return [probe.direction(i, k) for k in range(self.directions)]

    def _check_input(
        self, probe: Probe, i: int, chosen: list[np.ndarray], explained: bool
    ) -> list[Comparison]:
        """Return the comparisons for input `i`; GradCheckError at the first that fails."""
        x = probe.problem.inputs[i]
        count = len(chosen)
        tested, labels = chosen, [f"direction {k + 1} of {count}" for k in range(count)]
        if self.mode == "full" or (self.mode == "auto" and x.size <= count):
            tested, labels = [], []
            for index in np.ndindex(x.shape):
                only = np.zeros(x.shape)
                only[index] = chosen[0][index]
                tested.append(only)
                labels.append(f"coordinate {list(index)}")
        compare = probe.along_imaginary if self.mode == "complex-step" else probe.along
        comparisons = []
        for direction, label in zip(tested, labels, strict=True):
            comparison = compare(i, direction, label)
            if not comparison.passed:
                raise self._error(probe, i, comparison, explained)
            comparisons.append(comparison)
        return comparisons

    def _error(
        self, probe: Probe, i: int, comparison: Comparison, explained: bool
    ) -> GradCheckError:
        if not explained:
            return GradCheckError(f"{self.check}: wrong")
        inputs = probe.problem.given
        again, options = self._to_do_again()
        code = snippet(self.check, self.fn, inputs, options, again._fails)
        error = GradCheckError(explain(self.check, probe, i, comparison, code))
        error.inputs = tuple(inputs)
        return error

    def _to_do_again(self) -> tuple[_Asked, dict[str, Any]]:
        """Return what to ask for, to see a failure again, and as which keyword arguments.

        Large cotangents are left to chance: they would fill the page.
        """
        given = self.cotangents
        listed = [] if given is None else given if isinstance(given, (tuple, list)) else [given]
        if sum(np.size(g) for g in functions.raw_inputs(listed)) > 64:
            given = None
        again = replace(self, cotangents=given)
        usual = {"mode": "auto", "directions": 1, "max_resolution": MAX_RESOLUTION, "rtol": 0.0}
        options = {k: getattr(self, k) for k, v in usual.items() if getattr(self, k) != v}
        if given is not None:
            options["cotangents"] = functions.raw_inputs(listed)
        return again, {**options, "seed": self.seed}

    def _fails(self, inputs: Sequence[Any]) -> bool:
        try:
            self.run(inputs, explained=False)
        except Inconclusive:
            return False
        except GradCheckError:
            return True
        return False


def _check_together(
    probe: Probe, chosen: dict[int, list[np.ndarray]]
) -> tuple[list[Comparison], list[int]]:
    """Return the comparisons for inputs varied together, and the inputs that these do not settle.

    Inputs whose share of the derivative is small are left out: they would not be seen.
    """
    if len(chosen) == 1:
        return [], list(chosen)
    sizes = {i: probe.size(i, directions[0]) for i, directions in chosen.items()}
    most = max(sizes.values())
    group = [i for i, size in sizes.items() if size > _SHARE * most]
    count = len(next(iter(chosen.values())))
    comparisons: list[Comparison] = []
    for k in range(count) if len(group) > 1 else ():
        line = {i: chosen[i][k] for i in group}
        found = probe.together(line, f"direction {k + 1} of {count}")
        if found is None:
            return [], list(chosen)
        comparisons.append(found)
    return comparisons, [i for i in chosen if not comparisons or i not in group]


#: How often inputs are nudged before a Hessian is called asymmetric, and by what share of them:
#: far enough that every rounding falls out differently, also one of 1 - x for a tiny x. What is
#: wrong hardly changes with so little; what is rounding does.
_NUDGES, _NUDGE = 32, 2.0**-26


def _require_symmetry(problem: SecondOrder, probe: Probe) -> None:
    """Raise GradCheckError unless <w, H v> = <v, H w>, H the Hessian of Σ <cotangent, output>."""
    free = problem.first.free
    v, w = (
        [backend.to_device(probe.direction(i, k), _device(problem.inputs[i])) for i in free]
        for k in (10_000, 10_001)
    )
    # Where the Hessian itself cancels, rounding is relative to the gradient's own terms.
    gradient = sum(
        _total(abs(a * b)) for d in (v, w) for a, b in zip(d, probe.outputs, strict=True)
    )

    def products(arrays: Sequence[Any]) -> tuple[float, float, float]:
        hv = problem.gradient(arrays, v)[: len(free)]
        hw = problem.gradient(arrays, w)[: len(free)]
        left = [a * b for a, b in zip(w, hv, strict=True)]
        right = [a * b for a, b in zip(v, hw, strict=True)]
        absolute = gradient + sum(_total(abs(a)) for a in (*left, *right))
        return sum(map(_total, left)), sum(map(_total, right)), absolute

    left, right, absolute = products(problem.inputs)
    # Rounding of the terms and of their sum; 16 units for the rule's own few operations.
    tolerance = 16 * float(np.finfo(np.float64).eps) * absolute
    base, widest = tolerance, 0.0
    nudge_rng = np.random.default_rng((probe.seed, 20_000))
    # A last bit that flips in one nudge of ten can be all there is: asked for often before a
    # verdict. 8 times the largest change of the asymmetry, as for the analytic derivative.
    for _ in range(_NUDGES):
        if abs(left - right) <= tolerance:
            return
        a, b, _ = products(nudged_all(problem.inputs, nudge_rng, _NUDGE))
        widest = max(widest, abs((a - b) - (left - right)))
        tolerance = base + 8 * widest
    if not abs(left - right) <= tolerance:
        raise GradCheckError(
            f"check_double_grad: {problem.first.name}: its Hessian is not symmetric: "
            f"<w, H v> = {left:.9g} but <v, H w> = {right:.9g} for random v, w (tolerance "
            f"{tolerance:.1e}: rounding, and how nudging the inputs changes that); some rule does "
            f"not belong to its forward"
        )


def _total(array: Any) -> float:
    return array.sum().item()


def _device(array: Any) -> str:
    return backend.device_of(array)


def _cotangents(name: str, outputs: Sequence[Any], given: Any, seed: int) -> list[Any]:
    """Return one float64 cotangent per output, on its device: those given, or random ones."""
    if given is None:
        return random_cotangents(outputs, seed, np.float64)
    listed = list(given) if isinstance(given, (tuple, list)) else [given]
    arrays = [
        backend.to_device(a.astype(backend.float64), _device(o))
        for a, o in zip(functions.raw_inputs(listed), outputs, strict=False)
    ]
    if [a.shape for a in arrays] != [o.shape for o in outputs] or len(listed) != len(outputs):
        raise ValueError(
            f"{name}: cotangents of shapes {[a.shape for a in functions.raw_inputs(listed)]}, but "
            f"outputs of shapes {[o.shape for o in outputs]}; give one per output, of its shape"
        )
    for cotangent, output in zip(arrays, outputs, strict=True):
        ones = backend.array_module(output).ones_like(output)
        if cotangent.size > 1 and _proportional(cotangent, ones):
            _warn_blind(name, "constant, as the loss sum(y) has it")
        elif cotangent.size > 1 and _proportional(cotangent, output):
            _warn_blind(name, "the output itself, as the loss sum(y**2) / 2 has it")
    return arrays


def _proportional(a: np.ndarray, b: np.ndarray) -> bool:
    aa, bb, ab = (dot(p, q) for p, q in ((a, a), (b, b), (a, b)))
    # The cosine is 1 within rounding; zeros, as y where gamma is 0, have no direction.
    return ab * ab >= (1 - 1e-12) * aa * bb > 0


def _warn_blind(name: str, what: str) -> None:
    if is_by_chance():
        return
    warnings.warn(
        f"{name}: the cotangent is {what}. Whole terms of a gradient vanish then (for batch norm "
        f"in training mode all of dx), and so would their faults; leave it out for a random one",
        BlindCheckWarning,
        stacklevel=8,
    )
