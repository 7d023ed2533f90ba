"""One derivative along one direction, numeric against analytic, with a tolerance that is derived.

A right gradient is accepted, and a wrong one is not, because nothing in the tolerance is tuned:

    |D - A| <= 4 truncation + 16 evaluation noise × gain + 8 analytic noise + rounding + underflow

4, as the truncation is itself an estimate from two neighbours in a tableau; 16 standard deviations,
as the noise is estimated from a few samples; 8 times the largest of three changes of the analytic
derivative under nudged inputs. See `differences.py` and `noise.py` for the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.testing.cotangents import fixed_random
from tinygrad_bn.testing.differences import Derivative, derivative
from tinygrad_bn.testing.errors import Inconclusive
from tinygrad_bn.testing.noise import nudged_all, nudges
from tinygrad_bn.testing.report import Comparison, Tolerance

Array = Any

_EPSILON = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)

#: A sum of squares between this and its inverse has lost none that count.
_SAFE = 1e-280

#: A step far too small for float64's digits, and just right for a complex step, which subtracts
#: nothing.
_COMPLEX_STEP = 2.0**-100

#: How fine the resolution must be for every one of several inputs that are varied together: a
#: hundred times finer than what is asked for by default, so that none hides behind the others.
_TOGETHER = 1e-5


class _Line:
    """A direction for one input, or for several that move together.

    moves: the direction of each, on its device. terms: what each entry adds to the analytic
    derivative along the line. sizes: the root of the sum of their squares, input by input.
    analytic, absolute: the sum of all terms, and of their absolute values.
    """

    def __init__(self, probe: Probe, directions: Mapping[int, np.ndarray], label: str):
        inputs = probe.problem.inputs
        self.label = label
        self.moves = {
            i: backend.to_device(d, backend.device_of(inputs[i])) for i, d in directions.items()
        }
        self.terms = {i: probe.gradients[i] * d for i, d in self.moves.items()}
        self.sizes = {i: _norm([t]) for i, t in self.terms.items()}
        self.analytic = sum(t.sum().item() for t in self.terms.values())
        self.absolute = sum(abs(t).sum().item() for t in self.terms.values())
        self.entries = sum(t.size for t in self.terms.values())


class Probe:
    """The scalar Σ <cotangent, output> of a problem, ready to be differentiated along directions.

    problem: a `FirstOrder` or `SecondOrder`. Arrays stay on the problem's device: only numbers come
        to the host, and of arrays only directions and nudges go to the device, each once.
    outputs, cotangents, gradients: of the problem, at its inputs.
    """

    def __init__(
        self,
        problem: Any,
        outputs: Sequence[Array],
        cotangents: Sequence[Array],
        gradients: Sequence[Array],
        *,
        max_resolution: float,
        rtol: float,
        seed: int,
    ):
        self.problem = problem
        self.cotangents = cotangents
        self.outputs = outputs
        self.max_resolution = max_resolution
        self.rtol = rtol
        self.seed = seed
        self.gradients = dict(zip(problem.free, gradients, strict=True))
        #: The size of the scalar's terms taken together: what its derivatives are measured by.
        self.natural = _norm(g * o for g, o in zip(cotangents, outputs, strict=True))
        self._scales: dict[int, tuple[float, float]] = {}
        self._noise: dict[int, float] = {}
        self._nudged_gradients: list[dict[int, Array]] | None = None

    def scale(self, i: int) -> float:
        """Return how far entries of input `i` lie apart: the size of a reasonable step."""
        return self._scale_and_size(i)[0]

    def _scale_and_size(self, i: int) -> tuple[float, float]:
        """Return that, and the root mean square of the entries."""
        if i not in self._scales:
            x = self.problem.inputs[i]
            deviation, size = (_norm([x - x.mean()]), _norm([x])) if x.size else (0.0, 0.0)
            deviation, size = (s / math.sqrt(max(x.size, 1)) for s in (deviation, size))
            scale = next((s for s in (deviation, size) if s > 0 and math.isfinite(s)), 1.0)
            self._scales[i] = scale, size
        return self._scales[i]

    def direction(self, i: int, k: int) -> np.ndarray:
        """Return random direction `k` for input `i`, of its shape and the size of its deviation.

        The entries are at least half as large as the largest, so a direction overlooks no
        coordinate, and their signs are random, so none is orthogonal to anything on purpose.
        """
        entries = fixed_random((self.seed, i, k), 0.5, 1.0, self.problem.inputs[i].shape)
        return entries * self.scale(i)

    def size(self, i: int, direction: np.ndarray) -> float:
        """Return the derivative that a direction like this one typically sees for input `i`."""
        return _Line(self, {i: direction}, "").sizes[i]

    def conditioning(self, i: int) -> tuple[float, float]:
        """Return how far rounding input `i` moves L, and nudging it did, in ε of the size of L."""
        unit = self.natural or 1.0
        rounded = _norm([self.gradients[i] * self.problem.inputs[i]])
        return rounded / unit, self._evaluation_noise(i) / (_EPSILON * unit)

    def along(self, i: int, direction: np.ndarray, label: str) -> Comparison:
        """Return the comparison for input `i` along `direction`.

        Raises Inconclusive at a kink and where the resolution is too coarse to tell.
        """
        line = _Line(self, {i: direction}, label)
        phi, floor = self._along(line), self._least_noise(line)
        first = derivative(phi, self._first_step(line, floor), 0.0, floor)
        comparison = self._compare(line, first, 4 * first.truncation, floor, 0.0)
        if (
            comparison.passed
            and self._fine(comparison)
            and not self._kinked(first, comparison, floor)
        ):
            return comparison
        # Not settled by the least tolerance: measure the noise, and ask a second tableau with other
        # steps, since the truncation estimate of the first may have been small by accident.
        noise = max(floor, self._evaluation_noise(i))
        second = derivative(phi, 0.37 * self._first_step(line, noise, rows=3), 0.0, floor)
        better = min(first, second, key=lambda d: 4 * d.truncation + 16 * noise * d.gain)
        truncation = 4 * better.truncation
        if math.isfinite(first.value) and math.isfinite(second.value):
            truncation += abs(first.value - second.value)
        comparison = self._compare(line, better, truncation, noise, self._analytic_noise(line))
        self._require_sight(comparison, (first, second), noise)
        return comparison

    def together(self, directions: Mapping[int, np.ndarray], label: str) -> Comparison | None:
        """Return the comparison for several inputs that move together, or None.

        None says that it does not settle all of them: a mismatch, a kink, or an input whose share
        of the derivative is too small to be seen beside the others'. One quotient in place of one
        for each input overlooks nothing else: errors of several inputs cancel along a random
        direction no more often than those of several entries do.
        """
        line = _Line(self, directions, label)
        floor = self._least_noise(line)
        found = derivative(self._along(line), self._first_step(line, floor), 0.0, floor)
        comparison = self._compare(line, found, 4 * found.truncation, floor, 0.0)
        settled = (
            comparison.passed
            and 0 < comparison.tolerance.total <= _TOGETHER * comparison.size
            and self._fine(comparison)
            and not self._kinked(found, comparison, floor)
        )
        return comparison if settled else None

    def along_imaginary(self, i: int, direction: np.ndarray, label: str) -> Comparison:
        """Return the comparison with Im L(x + ih·direction) / h, which subtracts nothing.

        Only for functions that are analytic and accept complex arrays. Raises Inconclusive where
        the resolution is too coarse to tell.
        """
        line = _Line(self, {i: direction}, label)
        arrays = list(self.problem.inputs)
        arrays[i] = arrays[i] + 1j * _COMPLEX_STEP * line.moves[i]
        outputs = self.problem.complex_value(arrays)
        value = sum(dot(g, o.imag) for g, o in zip(self.cotangents, outputs, strict=True))
        # Rounding is relative to the terms of the derivative, of which `natural` knows nothing.
        noise = _EPSILON * line.sizes[i]
        found = Derivative(value / _COMPLEX_STEP, 0.0, _COMPLEX_STEP, 1.0, 0.0, 0.0, 0.0)
        comparison = self._compare(line, found, 0.0, noise, self._analytic_noise(line))
        self._require_sight(comparison, (found,), noise)
        return comparison

    # --- the scalar --------------------------------------------------------------------------

    def _along(self, line: _Line) -> Callable[[float], float]:
        """Return t -> L(x + t · direction) - L(x).

        The difference is taken output by output, before the sum: there it costs no digits.
        """
        inputs = self.problem.inputs
        arrays = list(inputs)

        def phi(t: float) -> float:
            for i, direction in line.moves.items():
                arrays[i] = inputs[i] + t * direction
            return self._rise(self.problem.value(arrays))

        return phi

    def _rise(self, moved: Sequence[Array]) -> float:
        return sum(
            dot(g, there - here)
            for g, here, there in zip(self.cotangents, self.outputs, moved, strict=True)
        )

    def _first_step(self, line: _Line, noise: float, rows: int = 2) -> float:
        """Return the step along a line at which so many rows of the tableau are at their best.

        A step of 1 changes L by about its own size, or moves the inputs by theirs. Of the step h,
        in units of that, the second row's truncation is taken for h²/16 (the third's: h⁴/64) and
        it has the noise 4 · noise / h: equal at h = (64 · noise)^⅓, or (256 · noise)^⅕. Two rows
        give nine digits, unless the noise is above 1e-14.

        The analytic derivative only suggests it; a wrong one costs time, or at worst the verdict
        "inconclusive", since the tableau measures its own error.
        """
        typical = math.hypot(*line.sizes.values())
        reach, relative = 1.0, 1.0  # for a gradient of zeros: the largest step, as noise is all
        if math.isfinite(typical) and typical > 0 and self.natural > 0:
            scales = map(self._scale_and_size, line.moves)
            reach = min(self.natural / typical, *(max(1.0, size / s) for s, size in scales))
            relative = noise / (typical * reach)
        if rows == 2 and relative < 1e-14:
            step = (64 * relative) ** (1 / 3)
        else:
            step = min((256 * relative) ** 0.2, 1 / 16)
        # A power of two makes x ± t·d as exact as it can be. Of less than 1e-8, no digits are left.
        return 2.0 ** math.floor(math.log2(max(step * max(reach, 1e-8), 1e-9)))

    # --- noise -------------------------------------------------------------------------------

    def _least_noise(self, line: _Line) -> float:
        """Return the noise of L that no computation can avoid: rounding x + t·d, and its terms."""
        rounded = _norm(self.gradients[i] * self.problem.inputs[i] for i in line.moves)
        return _EPSILON * (self.natural + _finite(rounded))

    def _evaluation_noise(self, i: int) -> float:
        """Return the deviation of L when input `i` is nudged, and what was computed from all inputs
        is rounded anew, from eight samples of each.

        The latter is all there is where a function is flat: a softmax that is 1 but for 1e-20 is 1
        at the nudged inputs too, but 1 - softmax is rounding.
        """
        if i not in self._noise:
            arrays = list(self.problem.inputs)
            rises = []
            for near in nudges(arrays[i], np.random.default_rng(self.seed + 1), 8):
                arrays[i] = near
                rises.append(self._rise(self.problem.value(arrays)))
            self._noise[i] = math.hypot(_deviation(rises), self._rounding_noise)
        return self._noise[i]

    @cached_property
    def _rounding_noise(self) -> float:
        anew = self.problem.rounded_anew(np.random.default_rng(self.seed + 3), 8)
        return _deviation([self._rise(outputs) for outputs in anew])

    def _analytic_noise(self, line: _Line) -> float:
        """Return the largest change of the analytic derivative under nudges of all that goes in.

        The cotangents too: the gradient of what is linear is a sum of them, which may cancel.
        """
        problem = self.problem
        if self._nudged_gradients is None:
            rng = np.random.default_rng(self.seed + 2)
            self._nudged_gradients = []
            for _ in range(3):
                near = nudged_all(problem.inputs, rng), nudged_all(self.cotangents, rng)
                found = zip(problem.free, problem.gradient(*near), strict=True)
                self._nudged_gradients.append(dict(found))
        changes = (
            abs(sum(dot(g[i] - self.gradients[i], d) for i, d in line.moves.items()))
            for g in self._nudged_gradients
        )
        return max((c for c in changes if math.isfinite(c)), default=0.0)

    # --- verdicts ----------------------------------------------------------------------------

    def _compare(
        self,
        line: _Line,
        found: Derivative,
        truncation: float,
        noise: float,
        analytic_noise: float,
    ) -> Comparison:
        # Of several inputs, the one with the least share is what must still be seen.
        size = min(map(_finite, line.sizes.values()))
        if len(line.moves) == 1:
            size = max(size, _finite(abs(line.analytic)), _finite(abs(found.value)))
        tolerance = Tolerance(
            truncation,
            16 * noise * found.gain,
            # And the rounding of the terms on both sides, each in its own order.
            8 * analytic_noise + 8 * _EPSILON * _finite(line.absolute),
            _TINY * math.sqrt(line.entries) / found.step,
            self.rtol * size,
        )
        # A derivative below a millionth of L's own size is held to that size: a zero has none.
        against = max(size, 1e-6 * self.natural)
        own = tolerance.total - tolerance.given
        if against > 0:
            resolution = own / against
        elif any((self.gradients[i] != 0).any().item() for i in line.moves):
            resolution = math.inf  # what there is has gone below the smallest number
        else:  # zero everywhere: nothing to be seen, unless the quotient is lost in noise
            resolution = 0.0 if own <= 2 * tolerance.underflow else math.inf
        names = ", ".join(self.problem.names[i] for i in line.moves)
        return Comparison(
            names, line.label, line.analytic, found.value, tolerance, size, resolution
        )

    def _fine(self, comparison: Comparison) -> bool:
        return comparison.resolution <= self.max_resolution

    def _kinked(self, found: Derivative, comparison: Comparison, noise: float) -> bool:
        # A jump below 1e-4 of the derivative is left alone: it is not told from curvature at the
        # steps used, and where the tolerance is finer than it a mismatch brings it up anyway.
        threshold = 4 * found.jump_truncation + 16 * noise * found.jump_gain
        return abs(found.jump) > threshold + 1e-4 * comparison.size

    def _require_sight(
        self, comparison: Comparison, found: Sequence[Derivative], noise: float
    ) -> None:
        where = f"{self.problem.name}, {comparison.input}, {comparison.direction}"
        if all(self._kinked(d, comparison, noise) for d in found):
            raise Inconclusive(
                f"{where}: a kink lies here: the slopes from the right and from the left differ by "
                f"{found[-1].jump:.3g} however small the step (derivative "
                f"{comparison.numeric:.6g}), so no difference quotient can tell which "
                f"derivative is right; move the inputs away from the kink (equal "
                f"entries, zero, a limit)"
            )
        if not self._fine(comparison):
            raise Inconclusive(
                f"{where}: too coarse to tell right from wrong: numeric {comparison.numeric:.6g}, "
                f"analytic {comparison.analytic:.6g}, tolerance {comparison.tolerance}, which is "
                f"{comparison.resolution:.1e} of the derivative (limit {self.max_resolution:.0e}); "
                f"the function is too noisy, too steep or not smooth around these inputs"
            )


def _deviation(rises: Sequence[float]) -> float:
    """Return the root mean square; 0 where there is none, or it is not finite."""
    # hypot, as the square of a large number overflows and raises.
    return _finite(math.hypot(*rises) / math.sqrt(len(rises))) if rises else 0.0


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _norm(arrays: Iterable[Array]) -> float:
    """Return the root of the sum of all squares, also where squares leave the range of float64."""
    arrays = list(arrays)
    total = sum(dot(a, a) for a in arrays)
    if _SAFE < total < 1 / _SAFE:
        return math.sqrt(total)
    largest = max((abs(a).max().item() for a in arrays if a.size), default=0.0)
    if not 0 < largest < math.inf:
        return largest
    return largest * math.sqrt(sum(dot(a / largest, a / largest) for a in arrays))


def dot(a: Array, b: Array) -> float:
    """Return Σ a b as a number, summed where the arrays are."""
    return backend.array_module(a).vdot(a, b).item()
