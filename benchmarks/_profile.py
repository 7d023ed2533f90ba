"""Where the time of our training step goes, op by op.

An op is called itself or by `call_with_residuals`, and its rules are asked by `pull_back`; here
these methods are wrapped in a stopwatch for a while. Time is booked on the outermost op, so what an
op calls in its turn is its own expense.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from _measure import Turn

Row = tuple[str, str, float, float]  # op, "forward" or "backward", calls a step, ms a step


class Stopwatch:
    """Seconds and calls by (name, phase), booked on the outermost call."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self._running = False

    def around(self, function: Callable[..., Any], name: str | None, phase: str) -> Any:
        """Return `function`, timed; without a name it is that of the first argument."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                key = (name or args[0].name, phase)
                self.seconds[key] += perf_counter() - start
                self.calls[key] += 1
                self._running = False

        return timed


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a class or object inside the `with` block."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def profile(step: Callable[[], Turn], optimizer: Any, steps: int) -> tuple[list[Row], Turn]:
    """Return a row for each op and phase, the most expensive first, and the ms of whole phases.

    What the ops of a phase leave of it is the tape, the layers' Python and gradient bookkeeping.
    """
    from tinygrad_bn.op import Op

    watch = Stopwatch()
    phases: Turn = defaultdict(float)
    with (
        replaced(Op, __call__=watch.around(Op.__call__, None, "forward")),
        replaced(Op, call_with_residuals=watch.around(Op.call_with_residuals, None, "forward")),
        replaced(Op, pull_back=watch.around(Op.pull_back, None, "backward")),
        replaced(optimizer, step=watch.around(optimizer.step, type(optimizer).__name__, "update")),
    ):
        for _ in range(steps):
            for phase, taken in step().items():
                phases[phase] += 1e3 * taken / steps
    rows = [
        (name, phase, watch.calls[name, phase] / steps, 1e3 * taken / steps)
        for (name, phase), taken in watch.seconds.items()
    ]
    for phase, total in phases.items():
        rows.append(("(the rest)", phase, 1, total - sum(r[3] for r in rows if r[1] == phase)))
    return sorted(rows, key=lambda row: -row[3]), dict(phases)
