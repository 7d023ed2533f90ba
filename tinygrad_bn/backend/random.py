"""The one random generator. Numbers are drawn on the host and moved, so that one seed gives the
same parameters on every device."""

from __future__ import annotations

import numpy as np

from tinygrad_bn.backend.recording import refuse

_generator: np.random.Generator | None = None


def manual_seed(seed: int) -> None:
    """Seed everything random in this library: creation functions, initial parameters, shuffling.

    seed: an integer >= 0. Same seed, same machine: same numbers, to the bit.

    >>> manual_seed(0)
    >>> first = generator().random()
    >>> manual_seed(0)
    >>> first == generator().random()
    True
    """
    global _generator
    _generator = np.random.default_rng(seed)


def generator() -> np.random.Generator:
    """Return the library's generator (seeded from the system until `manual_seed` is called)."""
    global _generator
    refuse("draws random numbers on the host (as Dropout does)", "do without, or without capture")
    if _generator is None:
        _generator = np.random.default_rng()
    return _generator
