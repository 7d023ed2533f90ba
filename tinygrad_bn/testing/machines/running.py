"""Run a state machine so many times, from a seed, and say after how many runs it failed."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import seed as seeded
from hypothesis.errors import HypothesisException
from hypothesis.stateful import run_state_machine_as_test

from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.report import Report
from tinygrad_bn.testing.search import fresh_seed


def run_machine(
    machine: Any,
    *,
    max_examples: int = 200,
    steps: int = 20,
    seed: int | None = None,
    shrink: bool = True,
) -> Report:
    """Return a report that `machine` found no fault in so many runs.

    machine: a subclass of Hypothesis' `RuleBasedStateMachine`.
    max_examples: how many runs. steps: how many rules each tries. seed: makes the same runs again;
    None makes others each time. shrink: look for a shorter failing run.

    Raises GradCheckError for whatever a rule raised; its `check` is the machine, `examples` the
    number of the first run that failed, and its notes tell the steps.

    >>> from tinygrad_bn.testing.machines import BatchNormMachine
    >>> run_machine(BatchNormMachine, max_examples=3, steps=5, seed=0).examples >= 3
    True
    """
    seed = fresh_seed(seed)
    started, failed = 0, 0

    class Counted(machine):
        def __init__(self) -> None:
            nonlocal started
            started += 1
            super().__init__()

        def teardown(self) -> None:
            nonlocal failed
            now = sys.exc_info()[1]
            # Those of Hypothesis itself end a run, they do not fail it.
            if isinstance(now, Exception) and not isinstance(now, HypothesisException):
                failed = failed or started  # it is run again, to be shown
            super().teardown()

    Counted.__name__ = Counted.__qualname__ = machine.__name__
    fixed = settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.normal,
        report_multiple_bugs=False,
        print_blob=False,
    )
    try:
        run_state_machine_as_test(seeded(seed)(Counted), settings=fixed)
    except Exception as error:
        wrong = GradCheckError(f"{machine.__name__} (seed={seed}): {type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            wrong.add_note(note)
        wrong.check, wrong.examples, wrong.seed = machine.__name__, failed or started, seed
        raise wrong from error
    return Report("run_machine", machine.__name__, examples=started, seed=seed)
