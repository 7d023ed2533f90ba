"""How timings are taken: side by side, in turns, after a warm-up, as medians with their spread.

A machine speeds up and slows down while it is being measured. So contenders take turns, A B A B,
and what is reported as a ratio is the median of the ratios of turns that stood next to each other:
what slows both alike leaves it alone. (Other work on the machine does not: who waits for several
threads suffers more. Measure on an idle one.) A turn is a few runs that are not timed, in which
caches and threads settle, and a few that are.

    contenders = {"ours": Contender(...), "theirs": Contender(...)}
    times = take_turns(contenders, Plan(rounds=40))
    summarize(ratios(times["ours"], times["theirs"]))

A contender is a `Contender`, here or in a process of its own (`_process.Remote`).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar, Protocol

Turn = dict[str, float]  # seconds by phase


@dataclass(frozen=True)
class Plan:
    """How often to measure.

    rounds: turns of each contender that count; warm_up: turns before these.
    settle: untimed runs at the start of a turn; count: timed runs in it, whose median is taken.
    """

    rounds: int
    warm_up: int = 3
    settle: int = 1
    count: int = 1


class Contender:
    """Something to be timed: the methods named in `phases`, called one after another.

    What cannot be taken apart is one phase. Phases may hand on to each other through `self`.
    """

    phases: ClassVar[tuple[str, ...]]

    def turn(self, settle: int, count: int) -> Turn:
        """Return the median seconds of each phase over `count` runs, after `settle` untimed."""
        methods = [getattr(self, phase) for phase in self.phases]
        seconds: list[list[float]] = [[] for _ in methods]
        for i in range(-settle, count):
            for method, taken in zip(methods, seconds, strict=True):
                start = perf_counter()
                method()
                end = perf_counter()
                if i >= 0:
                    taken.append(end - start)
        return {p: statistics.median(s) for p, s in zip(self.phases, seconds, strict=True)}


class TakesTurns(Protocol):
    """What `take_turns` asks of a contender."""

    def turn(self, settle: int, count: int) -> Turn:
        """Return the seconds of each phase."""
        ...


def take_turns(contenders: Mapping[str, Any], plan: Plan) -> dict[str, list[Turn]]:
    """Return the turns of each contender, taken A B A B ..., without those of the warm-up."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for i in range(-plan.warm_up, plan.rounds):
        for name, contender in contenders.items():
            turn = contender.turn(plan.settle, plan.count)
            if i >= 0:
                turns[name].append(turn)
    return turns


def seconds(turns: Sequence[Turn], phase: str | None = None) -> list[float]:
    """Return the seconds of one phase in each turn, or of all phases together."""
    return [sum(turn.values()) if phase is None else turn[phase] for turn in turns]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ours / theirs, pair by pair; below 1, ours took less."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Summary:
    """The middle of some values, their quartiles, their least, and how many they are."""

    median: float
    low: float
    high: float
    least: float
    count: int

    def scaled(self, factor: float) -> Summary:
        """Return the summary of the values times `factor`: seconds as milliseconds, say."""
        return Summary(
            self.median * factor,
            self.low * factor,
            self.high * factor,
            self.least * factor,
            self.count,
        )

    def __str__(self) -> str:
        digits = 2 if self.median < 100 else 0
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def summarize(values: Sequence[float]) -> Summary:
    """Return median, quartiles and least of `values`."""
    if len(values) < 2:
        return Summary(values[0], values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, low, high, min(values), len(values))


def peak_memory() -> float:
    """Return the largest resident memory this process has had, in MB."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6
