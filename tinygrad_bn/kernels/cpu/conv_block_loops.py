"""The loops of a convolution block; arrays are C-contiguous.

images: (b, padded rows · columns · channels). columns: (b, pixels, window). middle, gmiddle:
(b, pixels · outputs). out, g, places: (b, windows · outputs); a place is 1 + the number of the
entry that won, or 0 where none is above 0. Vectors hold a value per channel, repeated to the width
of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import compiled


@compiled("T[:, :], i8[:, :], i8[:], int, out T[:, :, :]")
def lay_out(images: Any, fields: Any, taps: Any, run: Any, columns: Any) -> None:
    """Copy the windows of all pixels into columns."""
    for n in range(len(images)):
        image = images[n]
        for f in range(len(fields)):
            pixel, rows, count, origin, row_step, column_step = fields[f]
            for i in range(rows):
                for j in range(count):
                    window = columns[n, pixel]
                    start = origin + i * row_step + j * column_step
                    for t in range(len(taps)):
                        source = image[start + taps[t] : start + taps[t] + run]
                        target = window[t * run : (t + 1) * run]
                        for k in range(run):
                            target[k] = source[k]
                    pixel += 1


@compiled("T[:, :], i8[:, :], i8[:], int, out T[:, :, :]")
def lay_out_by_entry(images: Any, fields: Any, taps: Any, run: Any, columns: Any) -> None:
    """Copy the windows of all pixels into columns (b, window, pixels): for short windows.

    The pixels of a field's row look at entries that are a step apart. So each image is first dealt
    out to as many rows as the step is long, in which these entries are neighbours.
    """
    step, size = fields[0, 5], images.shape[1]
    dealt = np.empty((step, size // step + 1), images.dtype)
    for n in range(len(images)):
        image = images[n]
        for q in range(step):
            for m in range((size - q + step - 1) // step):
                dealt[q, m] = image[m * step + q]
        for t in range(len(taps) * run):
            entries = columns[n, t]
            for f in range(len(fields)):
                pixel, rows, count, origin, row_step, column_step = fields[f]
                start = origin + taps[t // run] + t % run
                m, q = start // step, start % step
                for i in range(rows):
                    target = entries[pixel : pixel + count]
                    if column_step == step:
                        source = dealt[q, m : m + count]
                        for j in range(count):
                            target[j] = source[j]
                    else:
                        first = start + i * row_step
                        for j in range(count):
                            target[j] = image[first + j * column_step]
                    pixel += count
                    m += row_step // step
                    q += row_step % step
                    if q >= step:
                        q -= step
                        m += 1


@compiled("T[:, :, :], i8[:, :], i8[:], int, out T[:, :]")
def add_back(columns: Any, fields: Any, taps: Any, run: Any, images: Any) -> None:
    """Set images to the sums of their windows, the transpose of `lay_out`."""
    for n in range(len(images)):
        image = images[n]
        image[:] = 0
        for f in range(len(fields)):
            pixel, rows, count, origin, row_step, column_step = fields[f]
            for i in range(rows):
                for j in range(count):
                    window = columns[n, pixel]
                    start = origin + i * row_step + j * column_step
                    for t in range(len(taps)):
                        target = image[start + taps[t] : start + taps[t] + run]
                        source = window[t * run : (t + 1) * run]
                        for k in range(run):
                            target[k] += source[k]
                    pixel += 1


@compiled("T[:], T[:], out T[:, :]")
def add_sums(middle: Any, shift: Any, sums: Any) -> None:
    """Add Σ d and Σ d², d = middle - shift, over rows as wide as shift."""
    first, second = sums[0], sums[1]
    width = len(shift)
    for start in range(0, len(middle), width):
        row = middle[start : start + width]
        for j in range(width):
            d = row[j] - shift[j]
            first[j] += d
            second[j] += d * d


@compiled("T[:, :], int, T[:], T[:], T[:], out u1[:, :], out T[:, :]")
def pool(
    middle: Any, entries: Any, high: Any, scale: Any, constant: Any, places: Any, out: Any
) -> None:
    """Set out to the largest (middle - high) scale + constant of each window, or to 0."""
    width, plane = len(high), out.shape[1]
    for n in range(len(out)):
        for start in range(0, plane, width):
            best = out[n, start : min(start + width, plane)]
            won = places[n, start : start + len(best)]
            best[:] = 0
            won[:] = 0
            # Four at a time, best and won stay in registers: the windows of 2 by 2.
            for e in range(0, entries - 3, 4):
                first = e * plane + start
                a = middle[n, first : first + len(best)]
                b = middle[n, first + plane : first + plane + len(best)]
                c = middle[n, first + 2 * plane : first + 2 * plane + len(best)]
                d = middle[n, first + 3 * plane : first + 3 * plane + len(best)]
                for j in range(len(best)):
                    y, k = best[j], won[j]
                    z = (a[j] - high[j]) * scale[j] + constant[j]
                    k = e + 1 if z > y else k
                    y = z if z > y else y
                    z = (b[j] - high[j]) * scale[j] + constant[j]
                    k = e + 2 if z > y else k
                    y = z if z > y else y
                    z = (c[j] - high[j]) * scale[j] + constant[j]
                    k = e + 3 if z > y else k
                    y = z if z > y else y
                    z = (d[j] - high[j]) * scale[j] + constant[j]
                    won[j] = e + 4 if z > y else k
                    best[j] = z if z > y else y
            for e in range(entries - entries % 4, entries):
                values = middle[n, e * plane + start : e * plane + start + len(best)]
                for j in range(len(best)):
                    z = (values[j] - high[j]) * scale[j] + constant[j]
                    won[j] = e + 1 if z > best[j] else won[j]
                    best[j] = z if z > best[j] else best[j]


@compiled("T[:, :], u1[:, :], T[:, :], int, T[:], out T[:, :]")
def add_pooled_sums(g: Any, places: Any, middle: Any, entries: Any, high: Any, sums: Any) -> None:
    """Add Σ g and Σ g (middle - high), over the entries that won, to sums (2, width)."""
    first, second = sums[0], sums[1]
    width, plane = len(high), g.shape[1]
    for n in range(len(g)):
        for start in range(0, plane, width):
            cotangent = g[n, start : min(start + width, plane)]
            won = places[n, start : start + len(cotangent)]
            for e in range(entries):
                values = middle[n, e * plane + start : e * plane + start + len(cotangent)]
                for j in range(len(cotangent)):
                    v = cotangent[j] if won[j] == e + 1 else cotangent.dtype.type(0)
                    first[j] += v
                    second[j] += v * (values[j] - high[j])


@compiled("T[:, :], u1[:, :], T[:, :], int, T[:], T[:], T[:], T[:], out T[:, :]")
def combine(
    g: Any,
    places: Any,
    middle: Any,
    entries: Any,
    high: Any,
    scale: Any,
    slope: Any,
    constant: Any,
    gmiddle: Any,
) -> None:
    """Set gmiddle to (middle - high) slope + constant, plus scale · g where an entry won."""
    width, plane = len(high), g.shape[1]
    for n in range(len(g)):
        for start in range(0, plane, width):
            cotangent = g[n, start : min(start + width, plane)]
            won = places[n, start : start + len(cotangent)]
            for e in range(entries):
                values = middle[n, e * plane + start : e * plane + start + len(cotangent)]
                result = gmiddle[n, e * plane + start : e * plane + start + len(cotangent)]
                for j in range(len(cotangent)):
                    v = cotangent[j] * scale[j] if won[j] == e + 1 else cotangent.dtype.type(0)
                    result[j] = (values[j] - high[j]) * slope[j] + constant[j] + v
        rest = entries * plane
        for start in range(rest, middle.shape[1], width):
            stop = min(start + width, middle.shape[1])
            values, result = middle[n, start:stop], gmiddle[n, start:stop]
            for j in range(stop - start):
                result[j] = (values[j] - high[j]) * slope[j] + constant[j]
