"""Floating arrays, clear of kinks; cotangents.

Up to 64 entries are drawn one by one, so that each of them shrinks. Larger arrays are expanded from
a seed: drawing a thousand entries is slow, and Hypothesis's own fill would make most of them equal,
which for batch norm means channels without variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinygrad_bn import backend
from tinygrad_bn.testing.cotangents import signed_uniform

Shape = tuple[int, ...]

#: Largest array whose entries are drawn one by one.
DRAWN = 64

#: Entries lie on a grid of so many points of the allowed range: exact in float16, and far enough
#: apart that no rounding merges two of them.
_GRID = 1024

_FLOATING = ("float64", "float32", "float16")


def seeds() -> st.SearchStrategy[int]:
    """Return a strategy for seeds of `numpy.random.default_rng`, shrinking to 0."""
    return st.integers(0, 2**32 - 1)


def dtypes() -> st.SearchStrategy[Any]:
    """Return a strategy for the floating dtypes, shrinking to float64.

    >>> from hypothesis import find
    >>> find(dtypes(), lambda dtype: True)
    dtype('float64')
    """
    return st.sampled_from(_FLOATING).map(backend.as_dtype)


def float_arrays(
    shape: Shape, dtype: Any = "float64", *, low: float = -2.0, high: float = 2.0
) -> st.SearchStrategy[np.ndarray]:
    """Return a strategy for arrays of `shape` with entries in [low, high], shrinking to zeros
    (or to `low`, where 0 is not allowed).

    >>> from hypothesis import find
    >>> find(float_arrays((3,)), lambda x: True)
    array([0., 0., 0.])
    """
    return away_from_kinks(shape, dtype, low=low, high=high)


@st.composite
def away_from_kinks(
    draw: st.DrawFn,
    shape: Shape,
    dtype: Any = "float64",
    *,
    low: float = -2.0,
    high: float = 2.0,
    kinks: Sequence[float] = (),
    margin: float | None = None,
) -> np.ndarray:
    """Return a strategy for arrays with entries in [low, high], none within `margin` of a kink.

    margin: None is a twentieth of the range: more than the steps of a difference quotient, once
        they have been halved a few times.

    The allowed intervals are laid end to end and drawn from, so nothing is ever filtered out.

    >>> from hypothesis import find
    >>> find(away_from_kinks((2,), kinks=(0.0,)), lambda x: x[0] < 0)
    array([-2. ,  0.2])
    """
    pieces = allowed_intervals(low, high, kinks, (high - low) / 20 if margin is None else margin)
    size = math.prod(shape)
    if size > DRAWN:
        positions = np.random.default_rng(draw(seeds())).random(size)
    else:
        simplest = _position_of_zero(pieces)
        ticks = draw(st.lists(st.integers(0, _GRID), min_size=size, max_size=size))
        # Tick 0 is the simplest value; the others follow it round the range.
        positions = np.asarray([(simplest + t / _GRID) % 1.0 for t in ticks], dtype=np.float64)
    return spread_over(positions, pieces).reshape(shape).astype(backend.as_dtype(dtype))


@st.composite
def distinct_arrays(
    draw: st.DrawFn,
    shapes: Sequence[Shape],
    dtype: Any = "float64",
    *,
    low: float = -2.0,
    high: float = 2.0,
) -> tuple[np.ndarray, ...]:
    """Return a strategy for arrays of these shapes, no two entries equal within or between them.

    For ops with kinks where two entries tie. Neighbouring values lie at least half of
    (high - low) / entries apart.

    >>> from hypothesis import find
    >>> a, b = find(distinct_arrays([(3,), (2,)]), lambda pair: True)
    >>> len({*a, *b})
    5
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    rng = np.random.default_rng(draw(seeds()))
    ranks = rng.permutation(total) + rng.uniform(0.25, 0.75, total)
    values = (low + (high - low) * ranks / max(total, 1)).astype(backend.as_dtype(dtype))
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


@st.composite
def cotangents(draw: st.DrawFn, shape: Shape, dtype: Any = "float64") -> np.ndarray:
    """Return a strategy for cotangents: random signs, magnitudes in [0.5, 1.5], never constant.

    Always from a seed: a shrunk cotangent would be constant, and a constant one sees little.

    >>> from hypothesis import find
    >>> g = find(cotangents((4,)), lambda g: True)
    >>> bool(np.all(np.abs(g) >= 0.5)), len(set(g)) > 1
    (True, True)
    """
    rng = np.random.default_rng(draw(seeds()))
    return signed_uniform(rng, 0.5, 1.5, shape).astype(backend.as_dtype(dtype))


def allowed_intervals(
    low: float, high: float, kinks: Sequence[float], margin: float
) -> list[tuple[float, float]]:
    """Return [low, high] without what is nearer than `margin` to a kink; ValueError if that is all.

    >>> allowed_intervals(-1.0, 1.0, [0.0], 0.25)
    [(-1.0, -0.25), (0.25, 1.0)]
    """
    pieces, start = [], low
    for kink in sorted(kinks):
        if kink - margin > start:
            pieces.append((start, min(kink - margin, high)))
        start = max(start, kink + margin)
    if start < high or not pieces:
        pieces.append((start, high))
    if any(b < a for a, b in pieces):
        raise ValueError(f"no room in [{low}, {high}] at distance {margin} from the kinks {kinks}")
    return pieces


def spread_over(positions: np.ndarray, pieces: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return positions in [0, 1] mapped onto the pieces laid end to end."""
    lengths = np.asarray([b - a for a, b in pieces])
    ends = np.cumsum(lengths)
    along = positions * ends[-1]
    which = np.minimum(np.searchsorted(ends, along, side="right"), len(pieces) - 1)
    starts = np.asarray([a for a, _ in pieces])
    return starts[which] + (along - (ends - lengths)[which])


def _position_of_zero(pieces: Sequence[tuple[float, float]]) -> float:
    """Return where in [0, 1] the allowed value nearest to 0 lies (of two, the positive one)."""
    total = sum(b - a for a, b in pieces)
    best, before = (math.inf, 0.0), 0.0
    for a, b in pieces:
        value = min(max(0.0, a), b)
        if abs(value) <= best[0]:
            best = (abs(value), (before + value - a) / total if total else 0.0)
        before += b - a
    return best[1]
