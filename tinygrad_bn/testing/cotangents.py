"""Random cotangents: what a check pulls back, so that no fault can hide.

Drawn independently of the output. With ones in their place, as the loss sum(y) has it, or with the
output itself, whole terms of a gradient vanish, and their faults with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tinygrad_bn import backend


def signed_uniform(
    rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]
) -> np.ndarray:
    """Return numbers of random sign, their magnitudes evenly spread over [low, high].

    >>> signed_uniform(np.random.default_rng(0), 0.5, 1.5, (3,))
    array([ 0.77, -0.96, -1.42])
    """
    # One draw decides magnitude and sign: choosing signs by themselves takes twice as long.
    u = rng.uniform(low - high, high - low, shape)
    return np.asarray(u + np.copysign(low, u))


def fixed_random(
    key: tuple[int, ...], low: float, high: float, shape: tuple[int, ...]
) -> np.ndarray:
    """Return what `signed_uniform` draws from a generator seeded with `key`, read-only.

    A check that runs on a thousand examples asks for the same numbers a thousand times, and seeding
    a generator takes longer than drawing from it: so small arrays are kept.
    """
    draw = _kept if math.prod(shape) <= 2**13 else _drawn
    return draw(key, low, high, shape)


def _drawn(key: tuple[int, ...], low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
    values = signed_uniform(np.random.default_rng(key), low, high, shape)
    values.flags.writeable = False
    return values


_kept = lru_cache(maxsize=128)(_drawn)


def random_cotangents(outputs: Sequence[Any], seed: int, dtype: Any = None) -> list[Any]:
    """Return a random cotangent for each raw output: of its shape and device, its dtype or `dtype`.

    >>> (g,) = random_cotangents([np.zeros((2, 3), np.float32)], 0)
    >>> g.dtype.name, bool((abs(g) >= 0.5).all())
    ('float32', True)
    """
    made = []
    for i, out in enumerate(outputs):
        values = fixed_random((seed, 7, i), 0.5, 1.5, out.shape).astype(dtype or out.dtype)
        made.append(backend.to_device(values, backend.device_of(out)))
    return made
