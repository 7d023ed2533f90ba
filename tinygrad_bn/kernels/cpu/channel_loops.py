"""Compiled loops over a tensor in which every channel has numbers of its own.

The tensor lies flat, as (N, C, S): channel c holds S values in a row. Where S is 1 the channels are
neighbours. Either way the inner loop runs over neighbours in memory, and becomes vector
instructions:

    S > 1   along a channel's S values, with its numbers in registers
    S = 1   along the C channels, with their numbers in rows beside them, which the cache holds

In rows of C the loops go down several at once, so that the numbers beside them are read once for
all: down both halves of a tensor, or eight eighths of it. Each of these is read from its beginning
to its end, as memory is read fastest; down neighbouring rows it would be read in leaps. What these
leave over goes row by row, of which the last may be a part of one.

Vectors, and rows of sums, may be longer than C. Sums are kept in float64, also those of float32:
beside reading the memory, widening costs nothing. Half precision is computed in float32: in the
signatures, H is how an entry is stored (see `stored`) and T the dtype of the numbers beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import compiled
from tinygrad_bn.kernels.cpu.stored import narrowed, widened

Array = Any

# Rows of the vectors: y = (x - high) · scale + constant and gx = scale · g + slope · (x - high) +
# level. `high` is the mean, rounded to the dtype of x, so that x - high is exact where it matters.
HIGH, SCALE, CONSTANT, SLOPE, LEVEL = range(5)


@compiled()
def _parted(x, parts, C):
    """Return x as so many parts of rows of C, (parts, rows, C), and what is left over, flat."""
    rows = len(x) // C // parts
    end = parts * rows * C
    return x[:end].reshape(parts, rows, C), x[end:]


# --- sums of x -----------------------------------------------------------------------------------


@compiled("H[:], f8[:], int, int, out f8[:, :]")
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
        eighths, rest = _parted(x, 8, C)
        _add_moments_of_eighths(eighths, shift, total[0], total[1])
        for i in range(0, len(rest), C):
            _add_moments_of_row(rest[i : i + C], shift, total[0], total[1])


@compiled(sums=True)
def _moments_of_run(x, shift):
    first = second = 0.0
    for i in range(len(x)):
        d = np.float64(widened(x[i])) - shift
        first += d
        second += d * d
    return first, second


@compiled()
def _add_moments_of_row(x, shift, first, second):
    for c in range(len(x)):
        d = np.float64(widened(x[c])) - shift[c]
        first[c] += d
        second[c] += d * d


@compiled()
def _add_moments_of_eighths(x, shift, first, second):
    for n in range(x.shape[1]):
        for c in range(x.shape[2]):
            d0 = np.float64(widened(x[0, n, c])) - shift[c]
            d1 = np.float64(widened(x[1, n, c])) - shift[c]
            d2 = np.float64(widened(x[2, n, c])) - shift[c]
            d3 = np.float64(widened(x[3, n, c])) - shift[c]
            d4 = np.float64(widened(x[4, n, c])) - shift[c]
            d5 = np.float64(widened(x[5, n, c])) - shift[c]
            d6 = np.float64(widened(x[6, n, c])) - shift[c]
            d7 = np.float64(widened(x[7, n, c])) - shift[c]
            first[c] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
            squares = (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            second[c] += squares + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))


# --- y -------------------------------------------------------------------------------------------


@compiled("H[:], T[:, :], int, int, bool, out H[:]")
def normalize(x: Array, vectors: Array, C: int, S: int, relu: bool, y: Array) -> None:
    """Set y = (x - high) · scale + constant, or 0 where that is below 0, if `relu`; NaN stays."""
    if S > 1:
        for n in range(len(x) // (C * S)):
            for c in range(C):
                i = (n * C + c) * S
                high, scale, constant = vectors[HIGH, c], vectors[SCALE, c], vectors[CONSTANT, c]
                _normalize_run(x[i : i + S], high, scale, constant, relu, y[i : i + S])
    else:
        numbers = vectors[HIGH], vectors[SCALE], vectors[CONSTANT]
        (x_halves, x_rest), (y_halves, y_rest) = _parted(x, 2, C), _parted(y, 2, C)
        _normalize_halves(x_halves, *numbers, relu, y_halves)
        for i in range(0, len(x_rest), C):
            _normalize_row(x_rest[i : i + C], *numbers, relu, y_rest[i : i + C])


@compiled()
def _normalize_run(x, high, scale, constant, relu, y):
    for i in range(len(x)):
        y[i] = _normalized(x[i], high, scale, constant, relu)


@compiled()
def _normalize_row(x, high, scale, constant, relu, y):
    for c in range(len(x)):
        y[c] = _normalized(x[c], high[c], scale[c], constant[c], relu)


@compiled()
def _normalize_halves(x, high, scale, constant, relu, y):
    for n in range(x.shape[1]):
        for c in range(x.shape[2]):
            numbers = high[c], scale[c], constant[c]
            first = _normalized(x[0, n, c], *numbers, relu)
            second = _normalized(x[1, n, c], *numbers, relu)
            y[0, n, c], y[1, n, c] = first, second


@compiled()
def _normalized(x, high, scale, constant, relu):
    value = (widened(x) - high) * scale + constant
    return narrowed(type(high)(0) if relu and value < 0 else value, x)


# --- sums with the cotangent ---------------------------------------------------------------------


@compiled("H[:], H[:], T[:, :], int, int, bool, out f8[:, :]")
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
        numbers = vectors[HIGH], vectors[SCALE], vectors[CONSTANT]
        (g_halves, g_rest), (x_halves, x_rest) = _parted(g, 2, C), _parted(x, 2, C)
        _add_products_of_halves(g_halves, x_halves, *numbers, relu, total[0], total[1])
        for i in range(0, len(x_rest), C):
            j = i + C
            _add_products_of_row(g_rest[i:j], x_rest[i:j], *numbers, relu, total[0], total[1])


@compiled(sums=True)
def _products_of_run(g, x, high, scale, constant, relu):
    first = second = 0.0
    for i in range(len(x)):
        d = widened(x[i]) - high
        passed = _passed(g[i], d, scale, constant, relu)
        first += passed
        second += passed * d
    return first, second


@compiled()
def _add_products_of_row(g, x, high, scale, constant, relu, first, second):
    for c in range(len(x)):
        d = widened(x[c]) - high[c]
        passed = _passed(g[c], d, scale[c], constant[c], relu)
        first[c] += passed
        second[c] += passed * d


@compiled()
def _add_products_of_halves(g, x, high, scale, constant, relu, first, second):
    for n in range(x.shape[1]):
        for c in range(x.shape[2]):
            d0, d1 = widened(x[0, n, c]) - high[c], widened(x[1, n, c]) - high[c]
            g0 = _passed(g[0, n, c], d0, scale[c], constant[c], relu)
            g1 = _passed(g[1, n, c], d1, scale[c], constant[c], relu)
            first[c] += g0 + g1
            second[c] += g0 * d0 + g1 * d1


@compiled()
def _passed(g, d, scale, constant, relu):
    """Return what ReLU lets through of g, in float64."""
    return np.float64(widened(g)) if not relu or d * scale + constant > 0 else 0.0


# --- gx ------------------------------------------------------------------------------------------


@compiled("H[:], H[:], T[:, :], int, int, bool, out H[:]")
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
        numbers = vectors[HIGH], vectors[SCALE], vectors[CONSTANT], vectors[SLOPE], vectors[LEVEL]
        (g_halves, g_rest), (x_halves, x_rest) = _parted(g, 2, C), _parted(x, 2, C)
        gx_halves, gx_rest = _parted(gx, 2, C)
        _combine_halves(g_halves, x_halves, *numbers, relu, gx_halves)
        for i in range(0, len(x_rest), C):
            j = i + C
            _combine_row(g_rest[i:j], x_rest[i:j], *numbers, relu, gx_rest[i:j])


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
def _combine_halves(g, x, high, scale, constant, slope, level, relu, gx):
    for n in range(x.shape[1]):
        for c in range(x.shape[2]):
            numbers = high[c], scale[c], constant[c], slope[c], level[c]
            first = _combined(g[0, n, c], x[0, n, c], *numbers, relu)
            second = _combined(g[1, n, c], x[1, n, c], *numbers, relu)
            gx[0, n, c], gx[1, n, c] = first, second


@compiled()
def _combined(g, x, high, scale, constant, slope, level, relu):
    d = widened(x) - high
    passed = widened(g) if not relu or d * scale + constant > 0 else type(high)(0)
    return narrowed(scale * passed + (slope * d + level), x)
