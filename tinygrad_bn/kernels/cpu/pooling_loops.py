"""The loops of pools over images whose channels lie side by side (NHWC); arrays are C-contiguous.

images: (N, H · W · C). Results: (N, OH · OW · C). sizes: H, W, C, and the rows and columns of the
output, the window, the stride and the padding. A place is KW · row + column in a window.

The inner loop runs along the channels, and becomes vector instructions. Entries are taken in the
order in which the generic form takes them, and every operation is rounded by itself: the results
are the generic form's, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import compiled


@compiled("T[:, :], i8[:], u1[:, :], out T[:, :], out u1[:, :]", each_rounded=True)
def largest(images: Any, sizes: Any, starts: Any, best: Any, places: Any) -> None:
    """Set best and places to the first of the largest of each window, or to its first NaN.

    starts: (OH, OW), the first place of each window that is not padding.
    """
    H, W, C, OH, OW, KH, KW, SH, SW, PH, PW = _named(sizes)
    for n in range(len(images)):
        image = images[n]
        for i in range(OH):
            for j in range(OW):
                out = slice((i * OW + j) * C, (i * OW + j + 1) * C)
                top, won = best[n, out], places[n, out]
                top[:] = -np.inf
                won[:] = starts[i, j]
                for a in range(max(0, PH - i * SH), min(KH, H + PH - i * SH)):
                    for b in range(max(0, PW - j * SW), min(KW, W + PW - j * SW)):
                        start = ((i * SH + a - PH) * W + j * SW + b - PW) * C
                        _take_larger(image[start : start + C], np.uint8(a * KW + b), top, won)


@compiled(each_rounded=True)
def _named(sizes):
    return (
        sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8],
        sizes[9], sizes[10],
    )  # fmt: skip


@compiled(each_rounded=True)
def _take_larger(entry, place, best, won):
    for c in range(len(best)):
        value, top = entry[c], best[c]
        # A NaN takes the place of what is none, and keeps it.
        wins = value > top or (value != value and top == top)
        won[c] = place if wins else won[c]
        best[c] = value if wins else top


@compiled("T[:, :], u1[:, :], i8[:], out T[:, :]", each_rounded=True)
def scatter(y: Any, places: Any, sizes: Any, images: Any) -> None:
    """Set each entry of the images to the sum of the y of the windows that chose it."""
    H, W, C, OH, OW, KH, KW, SH, SW, PH, PW = _named(sizes)
    for n in range(len(images)):
        for r in range(H):
            row = images[n, r * W * C : (r + 1) * W * C]
            row[:] = 0
            for a in range(KH):
                i = _window_with(r, a, SH, PH, OH)
                for b in range(KW if i >= 0 else 0):
                    for j in range(max(0, (PW - b + SW - 1) // SW), OW):
                        start = (j * SW + b - PW) * C
                        if start >= W * C:
                            break
                        out = slice((i * OW + j) * C, (i * OW + j + 1) * C)
                        place = np.uint8(a * KW + b)
                        _add_chosen(y[n, out], places[n, out], place, row[start : start + C])


@compiled(each_rounded=True)
def _window_with(r, a, S, P, O):  # noqa: E741
    """Return the row of windows whose row a is row r of the image, or -1 for none."""
    i = (r + P - a) // S
    return i if 0 <= i < O and i * S == r + P - a else -1


@compiled(each_rounded=True)
def _add_chosen(gains, chosen, place, target):
    zero = target.dtype.type(0)
    for c in range(len(target)):
        target[c] += gains[c] if chosen[c] == place else zero


@compiled("T[:, :], i8[:], T[:, :], out T[:, :]", each_rounded=True)
def average(images: Any, sizes: Any, counts: Any, out: Any) -> None:
    """Set out to the sum of each window over its count, (OH, OW)."""
    H, W, C, OH, OW, KH, KW, SH, SW, PH, PW = _named(sizes)
    for n in range(len(images)):
        image = images[n]
        for i in range(OH):
            for j in range(OW):
                total = out[n, (i * OW + j) * C : (i * OW + j + 1) * C]
                total[:] = 0
                for a in range(max(0, PH - i * SH), min(KH, H + PH - i * SH)):
                    for b in range(max(0, PW - j * SW), min(KW, W + PW - j * SW)):
                        start = ((i * SH + a - PH) * W + j * SW + b - PW) * C
                        _add(image[start : start + C], total)
                for c in range(C):
                    total[c] /= counts[i, j]


@compiled(each_rounded=True)
def _add(entry, total):
    for c in range(len(total)):
        total[c] += entry[c]


@compiled("T[:, :], i8[:], T[:, :], out T[:, :]", each_rounded=True)
def spread(y: Any, sizes: Any, counts: Any, images: Any) -> None:
    """Set each entry of the images to the sum of y over its count for the windows it is in."""
    H, W, C, OH, OW, KH, KW, SH, SW, PH, PW = _named(sizes)
    for n in range(len(images)):
        for r in range(H):
            row = images[n, r * W * C : (r + 1) * W * C]
            row[:] = 0
            for a in range(KH):
                i = _window_with(r, a, SH, PH, OH)
                for b in range(KW if i >= 0 else 0):
                    for j in range(max(0, (PW - b + SW - 1) // SW), OW):
                        start = (j * SW + b - PW) * C
                        if start >= W * C:
                            break
                        out = slice((i * OW + j) * C, (i * OW + j + 1) * C)
                        _add_share(y[n, out], counts[i, j], row[start : start + C])


@compiled(each_rounded=True)
def _add_share(gains, count, target):
    for c in range(len(target)):
        target[c] += gains[c] / count
