"""Rounding noise, measured rather than guessed: what moving the inputs by a unit or two does.

A computation cannot be more accurate than its answer to inputs that are rounded differently; so
how far the answer moves under such a change is the tolerance that conditioning alone asks for. What
is computed on the way is rounded as well, which no change of the inputs shows where the function is
flat; where it can be reached, it is moved too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend

Array = Any


def nudged(array: Array, rng: np.random.Generator) -> Array:
    """Return `array` with every entry moved by -2 to 2 units in the last place, in the same layout.

    >>> x = np.ones(3)
    >>> bool(np.all(np.abs(nudged(x, np.random.default_rng(0)) - 1) <= 4.5e-16))
    True
    """
    return next(nudges(array, rng, 1))


def nudges(
    array: Array, rng: np.random.Generator, times: int, unit: float | None = None
) -> Iterator[Array]:
    """Yield `array` nudged `times` times. What is random goes to the array's device once.

    unit: of each entry, by which it is moved -2 to 2 times; None is one in the last place.
    """
    unit = backend.machine_epsilon(array.dtype) if unit is None else unit
    drawn = rng.integers(-2, 3, (times, *array.shape), dtype=np.int8)
    for steps in backend.to_device(drawn, backend.device_of(array)):
        # Computed in float64 and rounded once, so that a narrow dtype moves by whole units too.
        wide = array.astype(backend.float64)
        result = backend.array_module(array).empty_like(array)
        result[...] = wide + wide * (steps.astype(backend.float64) * unit)
        yield result


def nudged_all(
    arrays: Sequence[Array], rng: np.random.Generator, unit: float | None = None
) -> list[Array]:
    """Return every floating array nudged, by units as `nudges` has them, the others as they are."""
    return [
        next(nudges(a, rng, 1, unit)) if a is not None and backend.is_floating(a.dtype) else a
        for a in arrays
    ]


def rounded_anew(value: Any, rng: np.random.Generator, exact: Sequence[Array]) -> Any:
    """Return what an op has kept as another rounding could have left it.

    value: an array, a tuple of what may be arrays, or anything else, which is returned as it is.
    exact: arrays that were given, not computed, and so are returned as they are.

    Every entry of a floating array moves by a unit in the last place of the largest, or not at all:
    an entry is what is left of terms of that size, as the logarithm of a probability near 1 is.

    >>> y = np.array([1.0, 0.0])
    >>> sorted({rounded_anew(y, np.random.default_rng(i), [])[1].item() for i in range(9)})
    [-2.220446049250313e-16, 0.0, 2.220446049250313e-16]
    """
    if isinstance(value, tuple):
        return tuple([rounded_anew(v, rng, exact) for v in value])
    if not backend.is_array(value) or not backend.is_floating(value.dtype) or value.size == 0:
        return value
    if any(value is array for array in exact):
        return value
    xp = backend.array_module(value)
    largest = xp.where(xp.isfinite(value), xp.abs(value), 0).max()
    signs = rng.integers(-1, 2, value.shape, dtype=np.int8)
    moves = backend.to_device(signs, backend.device_of(value)).astype(value.dtype)
    return value + moves * (largest * backend.machine_epsilon(value.dtype))


def spread(
    function: Callable[[Sequence[Array]], Sequence[np.ndarray]],
    arrays: Sequence[Array],
    at: Sequence[np.ndarray],
    draws: int = 3,
    seed: int = 0,
) -> list[float]:
    """Return, for each array that `function` returns, how far nudged inputs move it (max norm).

    at: what `function` returns for `arrays` themselves.
    """
    rng = np.random.default_rng(seed)
    widest = [0.0] * len(at)
    for _ in range(draws):
        for i, (moved, here) in enumerate(zip(function(nudged_all(arrays, rng)), at, strict=True)):
            if here.size:
                apart = np.abs(moved.astype(np.float64) - here.astype(np.float64))
                finite = apart[np.isfinite(apart)]
                widest[i] = max(widest[i], float(finite.max()) if finite.size else 0.0)
    return widest


def rounding_tolerance(want: np.ndarray, moved_by: float) -> float:
    """Return how far two right computations of `want` may lie apart (max norm).

    16 times what nudging the inputs does (the largest of three draws, and intermediate results are
    rounded too), plus the rounding of sums taken in another order: ε per level of a pairwise sum.
    """
    finite = want[np.isfinite(want)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    epsilon = backend.machine_epsilon(want.dtype)
    return 16 * moved_by + 8 * epsilon * largest * (1 + math.log2(1 + want.size))
