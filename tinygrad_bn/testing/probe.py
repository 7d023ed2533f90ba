"""One derivative along one direction, numeric against analytic, with a tolerance that is derived.

A right gradient is accepted, and a wrong one is not, because nothing in the tolerance is tuned:

    |D - A| <= 4 truncation + 16 evaluation noise × gain + 8 analytic noise + rounding + underflow

4, as the truncation is itself an estimate from two neighbours in a tableau; 16 standard deviations,
as the noise is estimated from a few samples; 8 times the largest of three changes of the analytic
derivative under nudged inputs. See `differences.py` and `noise.py` for the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn.testing.differences import Derivative, derivative
from tinygrad_bn.testing.errors import Inconclusive
from tinygrad_bn.testing.noise import nudged, nudged_all
from tinygrad_bn.testing.report import Comparison, Tolerance

_EPSILON = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)

#: A step far too small for float64's digits, and just right for a complex step, which subtracts
#: nothing.
_COMPLEX_STEP = 2.0**-100


class Probe:
    """The scalar Σ <cotangent, output> of a problem, ready to be differentiated along directions.

    problem: a `FirstOrder` or `SecondOrder`.
    cotangents: one array per output.
    """

    def __init__(
        self,
        problem: Any,
        cotangents: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
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
        self.gradients = dict(
            zip(problem.free, problem.gradient(problem.inputs, cotangents), strict=True)
        )
        #: The size of the scalar's terms taken together: what its derivatives are measured by.
        self.natural = _norm(g * o for g, o in zip(cotangents, outputs, strict=True))
        self._noise: dict[int, float] = {}
        self._nudged_gradients: list[dict[int, np.ndarray]] | None = None

    def scale(self, i: int) -> float:
        """Return how far entries of input `i` lie apart: the size of a reasonable step."""
        x = self.problem.inputs[i]
        deviation = float(np.std(x)) if x.size > 1 else 0.0
        size = float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0
        return next((s for s in (deviation, size) if s > 0 and math.isfinite(s)), 1.0)

    def direction(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """Return a random direction for input `i`, of its shape and of the size of its deviation.

        The entries are at least half as large as the largest, so a direction overlooks no
        coordinate, and their signs are random, so none is orthogonal to anything on purpose.
        """
        shape = self.problem.inputs[i].shape
        entries = rng.uniform(0.5, 1.0, shape) * rng.choice((-1.0, 1.0), shape)
        return entries * self.scale(i)

    def along(self, i: int, direction: np.ndarray, label: str) -> Comparison:
        """Return the comparison for input `i` along `direction`.

        Raises Inconclusive at a kink and where the resolution is too coarse to tell.
        """
        phi = self._along(i, direction)
        step = self._first_step(i, direction)
        floor = self._least_noise(i)
        first = derivative(phi, step, 0.0)
        comparison = self._compare(i, direction, label, first, 4 * first.truncation, floor, 0.0)
        if (
            comparison.passed
            and self._fine(comparison)
            and not self._kinked(first, comparison, floor)
        ):
            return comparison
        # Not settled by the least tolerance: measure the noise, and ask a second tableau with other
        # steps, since the truncation estimate of the first may have been small by accident.
        noise = max(floor, self._evaluation_noise(i))
        second = derivative(phi, 0.37 * step, 0.0)
        better = min(first, second, key=lambda d: 4 * d.truncation + 16 * noise * d.gain)
        truncation = 4 * better.truncation
        if math.isfinite(first.value) and math.isfinite(second.value):
            truncation += abs(first.value - second.value)
        analytic_noise = self._analytic_noise(i, direction)
        comparison = self._compare(i, direction, label, better, truncation, noise, analytic_noise)
        self._require_sight(i, comparison, (first, second), noise)
        return comparison

    def along_imaginary(self, i: int, direction: np.ndarray, label: str) -> Comparison:
        """Return the comparison with Im L(x + ih·direction) / h, which subtracts nothing.

        Only for functions that are analytic and accept complex arrays.
        """
        arrays = list(self.problem.inputs)
        arrays[i] = arrays[i] + 1j * _COMPLEX_STEP * direction
        outputs = self.problem.complex_value(arrays)
        value = sum(
            float(np.sum(g * o.imag)) for g, o in zip(self.cotangents, outputs, strict=True)
        )
        # Rounding is relative to the terms of the derivative, of which `natural` knows nothing.
        noise = _EPSILON * _norm([self.gradients[i] * direction])
        found = Derivative(value / _COMPLEX_STEP, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
        analytic_noise = self._analytic_noise(i, direction)
        return self._compare(i, direction, label, found, 0.0, noise, analytic_noise)

    # --- the scalar --------------------------------------------------------------------------

    def _along(self, i: int, direction: np.ndarray) -> Callable[[float], float]:
        """Return t -> L(x + t · direction) - L(x).

        The difference is taken output by output, before the sum: there it costs no digits.
        """
        arrays = list(self.problem.inputs)
        x = arrays[i]

        def phi(t: float) -> float:
            arrays[i] = x + t * direction
            return self._rise(arrays)

        return phi

    def _rise(self, arrays: Sequence[Any]) -> float:
        moved = self.problem.value(arrays)
        total = 0.0
        for g, here, there in zip(self.cotangents, self.outputs, moved, strict=True):
            total += float(np.vdot(g, there - here))
        return total

    def _first_step(self, i: int, direction: np.ndarray) -> float:
        """Return a step along `direction` that changes L by about a sixteenth of its size.

        That is small enough for three rows of the tableau to settle a smooth function.

        The analytic derivative only suggests it; a wrong one costs time, or at worst the verdict
        "inconclusive", since the tableau measures its own error.
        """
        typical = _norm([self.gradients[i] * direction])
        reach = 1.0
        if math.isfinite(typical) and typical > 0 and self.natural > 0:
            size = float(np.sqrt(np.mean(np.square(self.problem.inputs[i]))))
            reach = min(self.natural / typical, max(1.0, size / self.scale(i)))
        # A power of two makes x ± t·d as exact as it can be. 1e-8: less has no digits left.
        return 2.0 ** math.floor(math.log2(0.0625 * max(reach, 1e-8)))

    # --- noise -------------------------------------------------------------------------------

    def _least_noise(self, i: int) -> float:
        """Return the noise of L that no computation can avoid: rounding x + t·d, and its terms."""
        rounded = _norm([self.gradients[i] * self.problem.inputs[i]])
        return _EPSILON * (self.natural + _finite(rounded))

    def _evaluation_noise(self, i: int) -> float:
        """Return the deviation of L when input `i` is nudged, from eight samples."""
        if i not in self._noise:
            rng = np.random.default_rng(self.seed + 1)
            arrays = list(self.problem.inputs)
            total = 0.0
            for _ in range(8):
                arrays[i] = nudged(self.problem.inputs[i], rng)
                total += self._rise(arrays) ** 2
            self._noise[i] = math.sqrt(total / 8) if math.isfinite(total) else 0.0
        return self._noise[i]

    def _analytic_noise(self, i: int, direction: np.ndarray) -> float:
        """Return the largest change of the analytic derivative under nudges of all that goes in.

        The cotangents too: the gradient of what is linear is a sum of them, which may cancel.
        """
        if self._nudged_gradients is None:
            rng = np.random.default_rng(self.seed + 2)
            problem = self.problem
            self._nudged_gradients = [
                dict(
                    zip(
                        problem.free,
                        problem.gradient(
                            nudged_all(problem.inputs, rng), nudged_all(self.cotangents, rng)
                        ),
                        strict=True,
                    )
                )
                for _ in range(3)
            ]
        here = self.gradients[i]
        changes = (abs(float(np.vdot(g[i] - here, direction))) for g in self._nudged_gradients)
        return max((c for c in changes if math.isfinite(c)), default=0.0)

    # --- verdicts ----------------------------------------------------------------------------

    def _compare(
        self,
        i: int,
        direction: np.ndarray,
        label: str,
        found: Derivative,
        truncation: float,
        noise: float,
        analytic_noise: float,
    ) -> Comparison:
        terms = self.gradients[i] * direction
        analytic = float(terms.sum())
        sizes = (abs(analytic), abs(found.value), _norm([terms]))
        size = max((s for s in sizes if math.isfinite(s)), default=0.0)
        tolerance = Tolerance(
            truncation,
            16 * noise * found.gain,
            # And the rounding of the terms on both sides, each in its own order.
            8 * analytic_noise + 8 * _EPSILON * _finite(float(np.abs(terms).sum())),
            _TINY * math.sqrt(terms.size) / found.step,
            self.rtol * size,
        )
        # A derivative below a millionth of L's own size is held to that size: a zero has none.
        against = max(size, 1e-6 * self.natural)
        own = tolerance.total - tolerance.given
        if against > 0:
            resolution = own / against
        else:  # zero everywhere: nothing to be seen, unless the quotient is lost in noise
            resolution = 0.0 if own <= 2 * tolerance.underflow else math.inf
        return Comparison(
            self.problem.names[i], label, analytic, found.value, tolerance, size, resolution
        )

    def _fine(self, comparison: Comparison) -> bool:
        return comparison.resolution <= self.max_resolution

    def _kinked(self, found: Derivative, comparison: Comparison, noise: float) -> bool:
        # A jump below 1e-4 of the derivative is left alone: it is not told from curvature at the
        # steps used, and where the tolerance is finer than it a mismatch brings it up anyway.
        threshold = 4 * found.jump_truncation + 16 * noise * found.jump_gain
        return abs(found.jump) > threshold + 1e-4 * comparison.size

    def _require_sight(
        self, i: int, comparison: Comparison, found: Sequence[Derivative], noise: float
    ) -> None:
        where = f"{self.problem.name}, {self.problem.names[i]}, {comparison.direction}"
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


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _norm(arrays: Any) -> float:
    """Return the root of the sum of all squares."""
    return math.sqrt(sum(float(np.vdot(a, a)) for a in map(np.ascontiguousarray, arrays)))
