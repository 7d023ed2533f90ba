"""What is one number per channel between two passes over a tensor, in compiled loops.

A handful of numbers each, but written with NumPy they are dozens of small operations, which after a
pass over large arrays find none of Python's code in cache: for 1024 channels they took a tenth of
batch norm's time. Everything is float64 until it is written to a row of `vectors`, whose dtype is
that of x, or float32 for half precision.

A row holds a number for each channel, or, where the loops take the entries of whole samples for
channels (see `channels`), for each of these entries: C channels of `run` entries, `repeats` times.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.channel_loops import CONSTANT, HIGH, LEVEL, SCALE, SLOPE
from tinygrad_bn.kernels.cpu.compiled import compiled
from tinygrad_bn.kernels.cpu.stored import widened

Array = Any


@compiled("H[:], int, int, int, int, out f8[:]")
def first_values(x: Array, C: int, S: int, run: int, repeats: int, row: Array) -> None:
    """Set `row` to the first value of each channel; x: (N, C, S), flat."""
    for c in range(C):
        for i in range(c * run, (c + 1) * run):
            row[i] = widened(x[c * S])
    _repeat(row, C * run, repeats)


@compiled("f8[:, :, :], f8[:], int, int, int, int, out f8[:, :]")
def moments(
    sums: Array, shift: Array, C: int, run: int, repeats: int, count: int, found: Array
) -> None:
    """Set the rows of `found` (2, C) to mean and biased variance, from Σ d and Σ d², d = x - shift.

    sums: of each share, in rows; added up in the order of the shares.
    """
    for c in range(C):
        first, second = _folded(sums, 0, c, C, run, repeats), _folded(sums, 1, c, C, run, repeats)
        offset = first / count
        var = second / count - offset * offset
        found[0, c] = shift[c * run] + offset
        found[1, c] = 0.0 if var < 0 else var


@compiled("f8[:, :], f8[:], f8[:], f8, f8[:], f8[:], int, int, out T[:, :]")
def affine(
    found: Array, weight: Array, bias: Array, eps: float,
    variances: Array, numbers: Array, run: int, repeats: int, vectors: Array,
) -> bool:  # fmt: skip
    """Set high, scale and constant; return whether the dtype of `vectors` holds them all.

    found: rows of mean and variance. weight, bias: empty for none.
    variances, numbers: the least and the largest that can be held.
    """
    C = found.shape[1]
    for c in range(C):
        mean, var = found[0, c], found[1, c] + eps
        if not variances[0] <= var <= variances[1]:
            return False
        scale = 1 / np.sqrt(var)
        if len(weight):
            scale *= weight[c]
        vectors[HIGH, c * run] = mean
        constant = -(mean - np.float64(vectors[HIGH, c * run])) * scale
        if len(bias):
            constant += bias[c]
        if not (_held(mean, numbers) and _held(scale, numbers) and _held(constant, numbers)):
            return False
        for i in range(c * run, (c + 1) * run):
            vectors[HIGH, i], vectors[SCALE, i], vectors[CONSTANT, i] = mean, scale, constant
    for k in (HIGH, SCALE, CONSTANT):
        _repeat(vectors[k], C * run, repeats)
    return True


@compiled("f8[:, :, :], f8[:, :], f8[:], f8, int, f8[:], int, int, out T[:, :], out f8[:, :]")
def slopes(
    sums: Array, found: Array, weight: Array, eps: float, count: int,
    numbers: Array, run: int, repeats: int, vectors: Array, grads: Array,
) -> bool:  # fmt: skip
    """Set slope and level, and the rows of `grads` (2, C) to Σ g x̂ and Σ g; return as `affine`.

    sums: Σ g and Σ g (x - high) of each share. gx is γ s (g - mean(g) - x̂ mean(g x̂)), collected by
    powers of x - high.
    """
    C = found.shape[1]
    for c in range(C):
        sum_g, sum_gd = _folded(sums, 0, c, C, run, repeats), _folded(sums, 1, c, C, run, repeats)
        s = 1 / np.sqrt(found[1, c] + eps)
        low = found[0, c] - np.float64(vectors[HIGH, c * run])
        sum_gx = s * (sum_gd - low * sum_g)
        if not (np.isfinite(sum_g) and np.isfinite(sum_gx)):
            return False
        grads[0, c], grads[1, c] = sum_gx, sum_g
        scale = s * weight[c] if len(weight) else s
        slope = -scale * s * sum_gx / count
        level = -scale * sum_g / count - slope * low
        if not (_held(slope, numbers) and _held(level, numbers)):
            return False
        for i in range(c * run, (c + 1) * run):
            vectors[SLOPE, i], vectors[LEVEL, i] = slope, level
    for k in (SLOPE, LEVEL):
        _repeat(vectors[k], C * run, repeats)
    return True


@compiled()
def _folded(sums, k, c, C, run, repeats):
    total = 0.0
    for share in range(len(sums)):
        for repeat in range(repeats):
            start = (repeat * C + c) * run
            for i in range(start, start + run):
                total += sums[share, k, i]
    return total


@compiled()
def _repeat(row, period, repeats):
    for i in range(period, period * repeats):
        row[i] = row[i - period]


@compiled()
def _held(number, numbers):
    size = abs(number)
    return size <= numbers[1] and (size >= numbers[0] or size == 0)
