"""Compiled loops as in `channel_loops`, over a tensor of which a mask says how often values count.

`share` holds p, the part that a value has in its channel's mean: for each sample and position, the
same in all channels, and 0 for what does not count. That is passed over, whatever it is: NaN times
0 would be NaN. The tensor lies flat, as (N, C, S), and `share` as (N, S):

    S > 1   along a channel's S values, with their shares beside them
    S = 1   along the C channels, which have one share together: where it is 0, nothing is read
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.channel_loops import CONSTANT, HIGH, LEVEL, SCALE, SLOPE
from tinygrad_bn.kernels.cpu.compiled import compiled
from tinygrad_bn.kernels.cpu.stored import narrowed, widened

Array = Any


# --- sums of x -----------------------------------------------------------------------------------


@compiled("H[:], f8[:], f8[:], int, int, out f8[:, :]")
def add_moments(x: Array, share: Array, shift: Array, C: int, S: int, total: Array) -> None:
    """Add Σ p d and Σ p d², for d = x - shift, to the rows of `total`."""
    if S > 1:
        for n in range(len(share) // S):
            p = share[n * S : (n + 1) * S]
            for c in range(C):
                i = (n * C + c) * S
                first, second = _moments_of_run(x[i : i + S], p, shift[c])
                total[0, c] += first
                total[1, c] += second
    else:
        for n in range(len(share)):
            if share[n] > 0:
                i = n * C
                _add_moments_of_row(x[i : i + C], share[n], shift, total[0], total[1])


@compiled(sums=True)
def _moments_of_run(x, p, shift):
    first = second = 0.0
    for i in range(len(x)):
        d = np.float64(widened(x[i])) - shift if p[i] > 0 else 0.0
        first += p[i] * d
        second += p[i] * d * d
    return first, second


@compiled()
def _add_moments_of_row(x, p, shift, first, second):
    for c in range(len(x)):
        d = np.float64(widened(x[c])) - shift[c]
        first[c] += p * d
        second[c] += p * d * d


# --- y -------------------------------------------------------------------------------------------


@compiled("H[:], f8[:], T[:, :], T[:], int, int, out H[:]")
def normalize(
    x: Array, share: Array, vectors: Array, otherwise: Array, C: int, S: int, y: Array
) -> None:
    """Set y = (x - high) · scale + constant where x counts, and `otherwise` elsewhere."""
    if S > 1:
        for n in range(len(share) // S):
            p = share[n * S : (n + 1) * S]
            for c in range(C):
                i = (n * C + c) * S
                high, scale, constant = vectors[HIGH, c], vectors[SCALE, c], vectors[CONSTANT, c]
                _normalize_run(x[i : i + S], p, high, scale, constant, otherwise[c], y[i : i + S])
    else:
        high, scale, constant = vectors[HIGH], vectors[SCALE], vectors[CONSTANT]
        for n in range(len(share)):
            i = n * C
            if share[n] > 0:
                _normalize_row(x[i : i + C], high, scale, constant, y[i : i + C])
            else:
                _fill_row(otherwise, y[i : i + C])


@compiled()
def _normalize_run(x, p, high, scale, constant, otherwise, y):
    for i in range(len(x)):
        value = (widened(x[i]) - high) * scale + constant
        y[i] = narrowed(value if p[i] > 0 else otherwise, x[i])


@compiled()
def _normalize_row(x, high, scale, constant, y):
    for c in range(len(x)):
        y[c] = narrowed((widened(x[c]) - high[c]) * scale[c] + constant[c], x[c])


@compiled()
def _fill_row(values, y):
    for c in range(len(y)):
        y[c] = narrowed(values[c], y[c])


# --- sums with the cotangent ---------------------------------------------------------------------


@compiled("H[:], H[:], f8[:], T[:, :], int, int, out f8[:, :]")
def add_products(
    g: Array, x: Array, share: Array, vectors: Array, C: int, S: int, total: Array
) -> None:
    """Add Σ g and Σ g (x - high), of what counts, and Σ g of all to the rows of `total`."""
    if S > 1:
        for n in range(len(share) // S):
            p = share[n * S : (n + 1) * S]
            for c in range(C):
                i = (n * C + c) * S
                first, second, every = _products_of_run(
                    g[i : i + S], x[i : i + S], p, vectors[HIGH, c]
                )
                total[0, c] += first
                total[1, c] += second
                total[2, c] += every
    else:
        for n in range(len(share)):
            i = n * C
            _add_row(g[i : i + C], total[2])
            if share[n] > 0:
                _add_row(g[i : i + C], total[0])
                _add_products_of_row(g[i : i + C], x[i : i + C], vectors[HIGH], total[1])


@compiled(sums=True)
def _products_of_run(g, x, p, high):
    first = second = every = 0.0
    for i in range(len(x)):
        wide = np.float64(widened(g[i]))
        every += wide
        passed = wide if p[i] > 0 else 0.0
        d = widened(x[i]) - high if p[i] > 0 else type(high)(0)
        first += passed
        second += passed * d
    return first, second, every


@compiled()
def _add_row(g, total):
    for c in range(len(g)):
        total[c] += np.float64(widened(g[c]))


@compiled()
def _add_products_of_row(g, x, high, total):
    for c in range(len(x)):
        total[c] += np.float64(widened(g[c])) * (widened(x[c]) - high[c])


# --- gx ------------------------------------------------------------------------------------------


@compiled("H[:], H[:], f8[:], T[:, :], int, int, out H[:]")
def combine(g: Array, x: Array, share: Array, vectors: Array, C: int, S: int, gx: Array) -> None:
    """Set gx = scale · g + p · (slope · (x - high) + level), and 0 where x does not count."""
    if S > 1:
        for n in range(len(share) // S):
            p = share[n * S : (n + 1) * S]
            for c in range(C):
                i = (n * C + c) * S
                high, scale = vectors[HIGH, c], vectors[SCALE, c]
                slope, level = vectors[SLOPE, c], vectors[LEVEL, c]
                _combine_run(
                    g[i : i + S], x[i : i + S], p, high, scale, slope, level, gx[i : i + S]
                )
    else:
        high, scale = vectors[HIGH], vectors[SCALE]
        slope, level = vectors[SLOPE], vectors[LEVEL]
        for n in range(len(share)):
            i = n * C
            if share[n] > 0:
                _combine_row(
                    g[i : i + C], x[i : i + C], share[n], high, scale, slope, level, gx[i : i + C]
                )
            else:
                gx[i : i + C] = 0


@compiled()
def _combine_run(g, x, p, high, scale, slope, level, gx):
    kind = type(high)
    for i in range(len(x)):
        value = scale * widened(g[i]) + kind(p[i]) * (slope * (widened(x[i]) - high) + level)
        gx[i] = narrowed(value if p[i] > 0 else kind(0), x[i])


@compiled()
def _combine_row(g, x, p, high, scale, slope, level, gx):
    part = high.dtype.type(p)
    for c in range(len(x)):
        value = slope[c] * (widened(x[c]) - high[c]) + level[c]
        gx[c] = narrowed(scale[c] * widened(g[c]) + part * value, x[c])
