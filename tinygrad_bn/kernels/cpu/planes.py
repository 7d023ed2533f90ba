"""Image batches for the pooling kernels: one form for both layouts, in chunks that fit in cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.threads import num_threads, parallel
from tinygrad_bn.windows import Windows

Array = Any

#: What one chunk of images may take; the kernels hold half as much again in scratch.
CHUNK_BYTES = 2**20


def planes(x: Array, view: Windows) -> Array:
    """Return images in C order as (N, H, W, C), or, channels first, as (N C, H, W, 1): a view."""
    x = np.ascontiguousarray(x)
    if view.layout == "NHWC":
        return x
    n, c, h, w = x.shape
    return x.reshape(n * c, h, w, 1)


def for_chunks(work: Any, x: Array) -> None:
    """Run `work(first, last)` over all planes of x, in parallel."""
    count = len(x)
    step = CHUNK_BYTES // max(1, x[0].nbytes)
    step = max(1, min(step, -(-count // (4 * num_threads()))))
    parallel(lambda i: work(i * step, min((i + 1) * step, count)), -(-count // step))


def offsets(view: Windows) -> list[tuple[np.uint8, tuple[slice, slice, slice]]]:
    """Return (place, index): padded planes at that index are the windows' entries at that place."""
    everything = slice(None)
    return [
        (np.uint8(i * view.kernel[1] + j), (everything, rows, columns))
        for i, j, (rows, columns) in view.offsets()
    ]
