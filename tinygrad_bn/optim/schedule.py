"""Learning-rate schedules: how large the steps are, from the first to the last.

A schedule multiplies the learning rate that each group had when the schedule was made (its peak)
by a factor that depends on the number of the step. Call `schedule.step()` after each
`optimizer.step()`; the first factor is in force from the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinygrad_bn.backend.recording import each_time
from tinygrad_bn.optim.optimizer import Optimizer


class Schedule:
    """Sets the learning rates of `optimizer` to peak · factor(step); subclasses define `factor`.

    optimizer: its learning rates now are the peaks.
    total_steps: how many steps it is planned for; later ones keep the last factor.

    Raises ValueError for fewer than one.

    >>> import tinygrad_bn as tg
    >>> class Halving(tg.optim.Schedule):
    ...     def factor(self, step):
    ...         return 0.5**step
    >>> sgd = tg.optim.SGD([tg.nn.Parameter([0.0])], lr=1.0)
    >>> schedule = Halving(sgd, 10)
    >>> schedule.step()
    >>> sgd.lr
    0.5
    """

    def __init__(self, optimizer: Optimizer, total_steps: int):
        if total_steps < 1:
            raise ValueError(
                f"{type(self).__name__}: total_steps is {total_steps}, expected at least 1"
            )
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.count = 0
        self._apply()

    def factor(self, step: int) -> float:
        """Return what the peak is multiplied by at `step`, counted from 0."""
        raise NotImplementedError

    def step(self) -> None:
        """Go on to the next step's learning rate."""
        each_time(self._advance)

    def _advance(self) -> None:
        self.count += 1
        self._apply()

    def _apply(self) -> None:
        factor = self.factor(min(self.count, self.total_steps - 1))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands."""
        return {"count": self.count, "peaks": list(self.peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over where another schedule stood, and set the learning rates."""
        if len(state["peaks"]) != len(self.peaks):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the state is for {len(state['peaks'])} "
                f"parameter groups, expected {len(self.peaks)}"
            )
        self.count, self.peaks = int(state["count"]), list(state["peaks"])
        self._apply()


class CosineSchedule(Schedule):
    """A linear rise over `warmup` steps, then half a cosine down from the peak to peak · end.

    optimizer, total_steps: as of `Schedule`.
    warmup: step k < warmup has the factor (k + 1) / (warmup + 1).
    end: the factor of the last step.

    Source of the cosine: Loshchilov and Hutter 2017, equation 5, without restarts.

    >>> import tinygrad_bn as tg
    >>> sgd = tg.optim.SGD([tg.nn.Parameter([0.0])], lr=1.0)
    >>> schedule = tg.optim.CosineSchedule(sgd, 6, warmup=1)
    >>> for _ in range(6):
    ...     print(f"{sgd.lr:.2f}", end=" ")
    ...     schedule.step()
    0.50 1.00 0.85 0.50 0.15 0.00
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, *, warmup: int = 0, end: float = 0.0
    ):
        if not 0 <= warmup < max(1, total_steps):
            raise ValueError(
                f"CosineSchedule: warmup is {warmup} of {total_steps} steps, expected 0 or more, "
                f"and fewer than all"
            )
        self.warmup = warmup
        self.end = float(end)
        super().__init__(optimizer, total_steps)

    def factor(self, step: int) -> float:
        """Return what the peak is multiplied by at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.total_steps - 1 - self.warmup)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2


class OneCycle(Schedule):
    """A rise from peak · start to the peak over a share of the steps, then a fall to peak · end.

    optimizer, total_steps: as of `Schedule`.
    rise: the share of the steps before the peak, in [0, 1). Both parts are half cosines.
    start, end: the factors of the first and the last step.

    Source: Smith and Topin 2018, with cosines for straight lines.

    >>> import tinygrad_bn as tg
    >>> sgd = tg.optim.SGD([tg.nn.Parameter([0.0])], lr=1.0)
    >>> schedule = tg.optim.OneCycle(sgd, 5, rise=0.5, start=0.2)
    >>> for _ in range(5):
    ...     print(f"{sgd.lr:.2f}", end=" ")
    ...     schedule.step()
    0.20 0.60 1.00 0.50 0.00
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        rise: float = 0.3,
        start: float = 0.04,
        end: float = 0.0,
    ):
        if not 0 <= rise < 1:
            raise ValueError(f"OneCycle: rise is {rise}, expected a share of the steps in [0, 1)")
        self.rise = float(rise)
        self.start = float(start)
        self.end = float(end)
        super().__init__(optimizer, total_steps)

    def factor(self, step: int) -> float:
        """Return what the peak is multiplied by at `step`, counted from 0."""
        last = self.total_steps - 1
        top = self.rise * last
        if step < top:
            return _half_cosine(self.start, 1.0, step / top)
        # A schedule of a single step stays at the peak.
        return _half_cosine(1.0, self.end, (step - top) / (last - top) if last else 0.0)


def _half_cosine(begin: float, end: float, done: float) -> float:
    return begin + (end - begin) * (1 - math.cos(math.pi * done)) / 2
