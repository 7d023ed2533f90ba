"""Compiled loops over a tensor in which every channel has numbers of its own.

The tensor lies flat, as (N, C, S): channel c holds S values in a row. Where S is 1 the channels are
neighbours. Either way the inner loop runs over neighbours in memory, and becomes vector
instructions:

    S > 1   along a channel's S values, with its numbers in registers
    S = 1   along the C channels, with their numbers in rows beside them

Vectors, and rows of sums, may be longer than C. Sums are kept in float64, also those of float32:
beside reading the memory, widening costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import compiled

Array = Any

# Rows of the vectors: y = (x - high) · scale + constant and gx = scale · g + slope · (x - high) +
# level. `high` is the mean, rounded to the dtype of x, so that x - high is exact where it matters.
HIGH, SCALE, CONSTANT, SLOPE, LEVEL = range(5)


# --- sums of x -----------------------------------------------------------------------------------


@compiled("T[:], f8[:], int, int, out f8[:, :]")
def add_moments(x: Array, shift: Array, C: int, S: int, total: Array) -> None:
    """Add Σ d and Σ d², for d = x - shift, to the rows of `total`."""
    if S > 1:
        for n in range(len(x) // (C * S)):
            for c in range(C):
                i = (n * C + c) * S
                first, second = _moments_of_run(x[i : i + S], shift[c])
                total[0, c] += first
                total[1, c] += second
    else:
        rows = len(x) // C
        for i in range(0, rows - 7, 8):  # by eights, so that the totals are read and written less
            _add_moments_of_eight(x[i * C : (i + 8) * C], C, shift, total[0], total[1])
        for i in range(rows - rows % 8, rows):
            _add_moments_of_row(x[i * C : (i + 1) * C], shift, total[0], total[1])


@compiled(sums=True)
def _moments_of_run(x, shift):
    first = second = 0.0
    for i in range(len(x)):
        d = np.float64(x[i]) - shift
        first += d
        second += d * d
    return first, second


@compiled()
def _add_moments_of_row(x, shift, first, second):
    for c in range(len(x)):
        d = np.float64(x[c]) - shift[c]
        first[c] += d
        second[c] += d * d


@compiled()
def _add_moments_of_eight(x, C, shift, first, second):
    x = x.reshape(8, C)
    for c in range(C):
        d0, d1 = np.float64(x[0, c]) - shift[c], np.float64(x[1, c]) - shift[c]
        d2, d3 = np.float64(x[2, c]) - shift[c], np.float64(x[3, c]) - shift[c]
        d4, d5 = np.float64(x[4, c]) - shift[c], np.float64(x[5, c]) - shift[c]
        d6, d7 = np.float64(x[6, c]) - shift[c], np.float64(x[7, c]) - shift[c]
        first[c] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
        squares = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
        second[c] += squares + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))


# --- y -------------------------------------------------------------------------------------------


@compiled("T[:], T[:, :], int, int, bool, out T[:]")
def normalize(x: Array, vectors: Array, C: int, S: int, relu: bool, y: Array) -> None:
    """Set y = (x - high) · scale + constant, or 0 where that is below 0, if `relu`; NaN stays."""
    if S > 1:
        for n in range(len(x) // (C * S)):
            for c in range(C):
                i = (n * C + c) * S
                high, scale, constant = vectors[HIGH, c], vectors[SCALE, c], vectors[CONSTANT, c]
                _normalize_run(x[i : i + S], high, scale, constant, relu, y[i : i + S])
    else:
        high, scale, constant = vectors[HIGH], vectors[SCALE], vectors[CONSTANT]
        rows = len(x) // C
        for n in range(0, rows - 3, 4):  # by fours, so that the vectors are read less often
            i, j = n * C, (n + 4) * C
            _normalize_four(x[i:j], C, high, scale, constant, relu, y[i:j])
        for n in range(rows - rows % 4, rows):
            i, j = n * C, (n + 1) * C
            _normalize_row(x[i:j], high, scale, constant, relu, y[i:j])


@compiled()
def _normalize_run(x, high, scale, constant, relu, y):
    for i in range(len(x)):
        y[i] = _normalized(x[i], high, scale, constant, relu)


@compiled()
def _normalize_row(x, high, scale, constant, relu, y):
    for c in range(len(x)):
        y[c] = _normalized(x[c], high[c], scale[c], constant[c], relu)


@compiled()
def _normalize_four(x, C, high, scale, constant, relu, y):
    x, y = x.reshape(4, C), y.reshape(4, C)
    for c in range(C):
        numbers = high[c], scale[c], constant[c]
        first = _normalized(x[0, c], *numbers, relu)
        second = _normalized(x[1, c], *numbers, relu)
        third = _normalized(x[2, c], *numbers, relu)
        fourth = _normalized(x[3, c], *numbers, relu)
        y[0, c], y[1, c], y[2, c], y[3, c] = first, second, third, fourth


@compiled()
def _normalized(x, high, scale, constant, relu):
    value = (x - high) * scale + constant
    return type(x)(0) if relu and value < 0 else value


# --- sums with the cotangent ---------------------------------------------------------------------


@compiled("T[:], T[:], T[:, :], int, int, bool, out f8[:, :]")
def add_products(
    g: Array, x: Array, vectors: Array, C: int, S: int, relu: bool, total: Array
) -> None:
    """Add Σ g and Σ g (x - high) to the rows of `total`; where y > 0 alone if `relu`."""
    if S > 1:
        for n in range(len(x) // (C * S)):
            for c in range(C):
                i = (n * C + c) * S
                high, scale, constant = vectors[HIGH, c], vectors[SCALE, c], vectors[CONSTANT, c]
                first, second = _products_of_run(
                    g[i : i + S], x[i : i + S], high, scale, constant, relu
                )
                total[0, c] += first
                total[1, c] += second
    else:
        high, scale, constant = vectors[HIGH], vectors[SCALE], vectors[CONSTANT]
        rows = len(x) // C
        for n in range(0, rows - 3, 4):
            i, j = n * C, (n + 4) * C
            _add_products_of_four(
                g[i:j], x[i:j], C, high, scale, constant, relu, total[0], total[1]
            )
        for n in range(rows - rows % 4, rows):
            i, j = n * C, (n + 1) * C
            _add_products_of_row(g[i:j], x[i:j], high, scale, constant, relu, total[0], total[1])


@compiled(sums=True)
def _products_of_run(g, x, high, scale, constant, relu):
    first = second = 0.0
    for i in range(len(x)):
        d = x[i] - high
        passed = _passed(g[i], d, scale, constant, relu)
        first += passed
        second += passed * d
    return first, second


@compiled()
def _add_products_of_row(g, x, high, scale, constant, relu, first, second):
    for c in range(len(x)):
        d = x[c] - high[c]
        passed = _passed(g[c], d, scale[c], constant[c], relu)
        first[c] += passed
        second[c] += passed * d


@compiled()
def _add_products_of_four(g, x, C, high, scale, constant, relu, first, second):
    g, x = g.reshape(4, C), x.reshape(4, C)
    for c in range(C):
        d0, d1, d2, d3 = x[0, c] - high[c], x[1, c] - high[c], x[2, c] - high[c], x[3, c] - high[c]
        g0 = _passed(g[0, c], d0, scale[c], constant[c], relu)
        g1 = _passed(g[1, c], d1, scale[c], constant[c], relu)
        g2 = _passed(g[2, c], d2, scale[c], constant[c], relu)
        g3 = _passed(g[3, c], d3, scale[c], constant[c], relu)
        first[c] += (g0 + g1) + (g2 + g3)
        second[c] += (g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)


@compiled()
def _passed(g, d, scale, constant, relu):
    """Return what ReLU lets through of g, in float64."""
    return np.float64(g) if not relu or d * scale + constant > 0 else 0.0


# --- gx ------------------------------------------------------------------------------------------


@compiled("T[:], T[:], T[:, :], int, int, bool, out T[:]")
def combine(g: Array, x: Array, vectors: Array, C: int, S: int, relu: bool, gx: Array) -> None:
    """Set gx = scale · g + slope · (x - high) + level, with g = 0 where y is not > 0, if `relu`."""
    if S > 1:
        for n in range(len(x) // (C * S)):
            for c in range(C):
                i = (n * C + c) * S
                high, scale, constant = vectors[HIGH, c], vectors[SCALE, c], vectors[CONSTANT, c]
                slope, level = vectors[SLOPE, c], vectors[LEVEL, c]
                _combine_run(
                    g[i : i + S], x[i : i + S], high, scale, constant, slope, level, relu,
                    gx[i : i + S],
                )  # fmt: skip
    else:
        high, scale, constant = vectors[HIGH], vectors[SCALE], vectors[CONSTANT]
        slope, level = vectors[SLOPE], vectors[LEVEL]
        rows = len(x) // C
        for n in range(0, rows - 3, 4):
            i, j = n * C, (n + 4) * C
            _combine_four(g[i:j], x[i:j], C, high, scale, constant, slope, level, relu, gx[i:j])
        for n in range(rows - rows % 4, rows):
            i, j = n * C, (n + 1) * C
            _combine_row(g[i:j], x[i:j], high, scale, constant, slope, level, relu, gx[i:j])


@compiled()
def _combine_run(g, x, high, scale, constant, slope, level, relu, gx):
    for i in range(len(x)):
        gx[i] = _combined(g[i], x[i], high, scale, constant, slope, level, relu)


@compiled()
def _combine_row(g, x, high, scale, constant, slope, level, relu, gx):
    for c in range(len(x)):
        numbers = high[c], scale[c], constant[c], slope[c], level[c]
        gx[c] = _combined(g[c], x[c], *numbers, relu)


@compiled()
def _combine_four(g, x, C, high, scale, constant, slope, level, relu, gx):
    g, x, gx = g.reshape(4, C), x.reshape(4, C), gx.reshape(4, C)
    for c in range(C):
        numbers = high[c], scale[c], constant[c], slope[c], level[c]
        first = _combined(g[0, c], x[0, c], *numbers, relu)
        second = _combined(g[1, c], x[1, c], *numbers, relu)
        third = _combined(g[2, c], x[2, c], *numbers, relu)
        fourth = _combined(g[3, c], x[3, c], *numbers, relu)
        gx[0, c], gx[1, c], gx[2, c], gx[3, c] = first, second, third, fourth


@compiled()
def _combined(g, x, high, scale, constant, slope, level, relu):
    d = x - high
    passed = g if not relu or d * scale + constant > 0 else type(g)(0)
    return scale * passed + (slope * d + level)
