"""What the compiled kernels of pools share: what they serve, sizes for their loops, chunks.

They serve channels that lie side by side, which make long inner loops. Of one channel by itself a
row of windows is a dozen entries, less than a loop costs to begin: there blocks of NumPy took half
the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu.compiled import usable
from tinygrad_bn.kernels.cpu.planes import for_chunks
from tinygrad_bn.windows import Windows

Array = Any

# Below this many entries the generic form takes no longer than loading compiled code would.
SMALLEST = 1 << 12
_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def serves(images: Array, layout: str, fewest_channels: int) -> bool:
    """Return whether the loops serve these images, or outputs, in `layout`."""
    return (
        layout == "NHWC"
        and images.ndim == 4
        and images.dtype in _DTYPES
        and images.size >= SMALLEST
        and images.shape[3] >= fewest_channels
        and usable()
    )


def run(loop: Callable[..., None], *arrays: Array) -> None:
    """Call `loop` with a few images of all `arrays`, (N, ...), at a time, flat."""
    laid = [np.ascontiguousarray(array) for array in arrays]

    def work(first: int, last: int) -> None:
        loop(*(array[first:last].reshape(last - first, -1) for array in laid))

    for_chunks(work, max(laid, key=lambda array: array.nbytes))


def sizes(view: Windows) -> Array:
    """Return the integers that the loops go by."""
    pairs = (view.out, view.kernel, view.stride, view.padding)
    return np.array([*view.size, view.channels, *(n for pair in pairs for n in pair)], np.int64)


def counts(view: Windows, dtype: Any, count_include_pad: bool) -> Array:
    """Return how many entries of each window count: (OH, OW)."""
    if count_include_pad:
        return np.full(view.out, view.kernel[0] * view.kernel[1], dtype)
    rows, columns = (
        np.minimum(s * np.arange(n) + k, p + size) - np.maximum(s * np.arange(n), p)
        for s, n, k, p, size in zip(
            view.stride, view.out, view.kernel, view.padding, view.size, strict=True
        )
    )
    return np.multiply.outer(rows, columns).astype(dtype)
