"""The one random generator. Numbers are drawn on the host and moved, so that one seed gives the
same parameters on every device."""

from __future__ import annotations

import copy
import os
from functools import cache

import numpy as np

from tinygrad_bn.backend.recording import refuse

_seeded: np.random.Generator | None = None


@cache
def _unseeded() -> np.random.Generator:
    # Apart, so that a thread that draws does not put one in the place of what another has seeded.
    return np.random.default_rng()


def manual_seed(seed: int) -> None:
    """Seed everything random in this library: creation functions, initial parameters, shuffling.

    seed: an integer >= 0. Same seed, same machine: same numbers, to the bit.

    >>> manual_seed(0)
    >>> first = generator().random()
    >>> manual_seed(0)
    >>> first == generator().random()
    True
    """
    global _seeded
    _seeded = np.random.default_rng(seed)


def generator() -> np.random.Generator:
    """Return the library's generator (seeded from the system until `manual_seed` is called)."""
    refuse("draws random numbers on the host (as Dropout does)", "do without, or without capture")
    return _unseeded() if _seeded is None else _seeded


def _renew() -> None:
    """Take generators of its own in a forked child: one whose lock another thread held would wait
    for ever. A seeded one goes on as in the parent."""
    global _seeded
    _unseeded.cache_clear()
    _seeded = copy.deepcopy(_seeded)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
