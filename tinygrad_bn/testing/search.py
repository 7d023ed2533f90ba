"""Look for an input on which a test fails, with Hypothesis, in bounded time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from tinygrad_bn.testing.errors import GradCheckError, Inconclusive

#: Calls of the test that shrinking may take. A hundred bring a batch norm down to a channel or two;
#: what is left would be prettier, not easier to understand.
SHRINKS = 100


@dataclass
class Search:
    """What a search did: how many examples it `tried`, and how many of them were `rejected`."""

    tried: int = 0
    rejected: int = 0
    reason: str = ""


def search(
    test: Callable[[Any], object],
    strategy: Any,
    *,
    max_examples: int,
    seed: int,
    shrink: bool = True,
) -> Search:
    """Return how many inputs drawn from `strategy` `test` passed; raise what it raises, shrunk.

    test: raises GradCheckError on an input that it finds wrong, and Inconclusive to reject one.

    The same seed draws the same inputs while the same modules are loaded: Hypothesis also tries
    numbers that it finds in their code. The error has `examples`: how many inputs had been drawn
    when the first one failed.

    Raises ModuleNotFoundError without Hypothesis.
    """
    # Hypothesis is an extra, and the strategies' package is its one loader.
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Flaky

    from tinygrad_bn.testing import strategies  # noqa: F401

    done = Search()
    failed: set[Any] = set()
    last: GradCheckError | None = None
    calls_since = 0

    # Hypothesis's own reports and limits are for tests that a person runs by themselves: here the
    # error says it all, and a slow example is no fault.
    @seeded(seed)
    @settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        nonlocal calls_since, last
        if failed:
            calls_since += 1
            # Out of calls: only what failed already fails, which ends the search for less.
            if calls_since > SHRINKS and fingerprint(drawn) not in failed:
                return
        else:
            done.tried += 1
        try:
            test(drawn)
        except Inconclusive as error:
            # Counted and passed over. Hypothesis would draw up to ten others in its place, which
            # takes as long as ten; who calls this looks at the share.
            done.rejected += not failed
            done.reason = str(error)
        except GradCheckError as error:
            failed.add(fingerprint(drawn))
            error.examples, error.seed = done.tried, seed
            last = error
            raise

    try:
        run()
    except Flaky:
        # The same input failed and then passed: the function is not the same each time, or its
        # input prints an address. It was wrong once, which is what counts.
        if last is None:
            raise
        raise last from None
    return done


def fresh_seed(seed: int | None) -> int:
    """Return `seed`, or a random one for None: 0 where the loaded Hypothesis profile asks for the
    same examples in every run."""
    if seed is not None:
        return seed
    from hypothesis import settings

    from tinygrad_bn.testing import strategies  # noqa: F401

    return 0 if settings().derandomize else random.SystemRandom().getrandbits(32)


def fingerprint(value: Any) -> Any:
    """Return something hashable that is equal for equal inputs, arrays included.

    >>> fingerprint([np.ones(2), {"axis": 1}]) == fingerprint([np.ones(2), {"axis": 1}])
    True
    """
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (tuple, list)):
        return tuple(map(fingerprint, value))
    if isinstance(value, Mapping):
        return tuple((key, fingerprint(value[key])) for key in value)
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(fingerprint(getattr(value, field.name)) for field in fields(value))
    return repr(value)
