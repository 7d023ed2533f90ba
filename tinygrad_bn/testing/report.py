"""What a checker returns: what it compared, how finely, and what its tolerance is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """How far a right gradient may be from its difference quotient, part by part.

    truncation: of the extrapolated difference quotient.
    evaluation: the rounding noise of the function, magnified by the division by the step.
    analytic: the rounding noise of the gradient itself.
    underflow: the spacing of the smallest numbers, divided by the step.
    given: what the caller added.

    >>> Tolerance(truncation=1e-9, evaluation=2e-9).total
    3e-09
    """

    truncation: float = 0.0
    evaluation: float = 0.0
    analytic: float = 0.0
    underflow: float = 0.0
    given: float = 0.0

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.truncation + self.evaluation + self.analytic + self.underflow + self.given

    def __str__(self) -> str:
        parts = [f"{name} {value:.1e}" for name, value in vars(self).items() if value]
        return f"{self.total:.1e} ({' + '.join(parts) or 'no part'})"


@dataclass(frozen=True)
class Comparison:
    """One derivative along one direction, analytic against numeric.

    input: the name of the input that was varied.
    direction: "direction 1 of 1", or an entry such as "coordinate [0, 2]".
    analytic, numeric: the two derivatives. tolerance: how far apart they may be.
    size: the derivative that a random direction would typically see; relative errors refer to it.
    resolution: the smallest relative error that would have been noticed, `tolerance / size`.

    >>> import numpy as np
    >>> from tinygrad_bn import testing
    >>> (one,) = testing.check_grad(lambda x: x * x, np.array([0.5, 1.0])).comparisons
    >>> one.direction, one.passed
    ('direction 1 of 1', True)
    """

    input: str
    direction: str
    analytic: float
    numeric: float
    tolerance: Tolerance
    size: float
    resolution: float

    @property
    def error(self) -> float:
        """The difference between analytic and numeric."""
        return abs(self.numeric - self.analytic)

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (NaN never is)."""
        return self.error <= self.tolerance.total


@dataclass(frozen=True)
class Report:
    """What a checker did.

    check: the name of the checker.
    function: the name of what was checked.
    comparisons: every derivative that was compared; none for checks that compare none.
    vacuous: inputs whose gradient is zero within the noise. Right as that may be, a wrong rule that
        also gives zero there would not have been seen.
    notes: what was compared, in words.
    examples: how many inputs were tried, by checks that draw them.
    checks: for each check of several, its name and how many examples it had.
    seed: with which the same examples are drawn again.

    >>> print(Report("check_pure", "tanh", notes=("2 calls bitwise equal",)))
    check_pure(tanh): passed; 2 calls bitwise equal
    """

    check: str
    function: str
    comparisons: tuple[Comparison, ...] = ()
    vacuous: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    examples: int = 0
    checks: tuple[tuple[str, int], ...] = ()
    seed: int | None = None

    @property
    def resolution(self) -> float:
        """The coarsest resolution of all comparisons; 0.0 without any."""
        return max((c.resolution for c in self.comparisons), default=0.0)

    @property
    def directions(self) -> int:
        """How many derivatives were compared."""
        return len(self.comparisons)

    @property
    def tolerance(self) -> Tolerance:
        """The tolerance of the coarsest comparison."""
        if not self.comparisons:
            return Tolerance()
        return max(self.comparisons, key=lambda c: c.resolution).tolerance

    def __str__(self) -> str:
        facts = [f"{self.check}({self.function}): passed"]
        if self.comparisons:
            facts.append(
                f"{self.directions} derivatives, resolution {self.resolution:.1e}, "
                f"tolerance {self.tolerance}"
            )
        if self.examples:
            facts.append(f"{self.examples} examples, seed {self.seed}")
        if self.vacuous:
            facts.append(f"zero gradient for {', '.join(self.vacuous)}")
        return "; ".join((*facts, *self.notes))
