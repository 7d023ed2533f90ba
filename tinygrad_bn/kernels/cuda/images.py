"""Images as the pooling kernels see them: (outer, rows, columns, inner), whatever the layout."""

from __future__ import annotations

import math
from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.windows import Windows

#: Threads of a block that makes one entry in each.
THREADS = 256
#: How many blocks a launch can number, and how large an `int` can be.
MOST = 2**31 - 1
#: Up to so many entries are numbered in 32 bits.
FEW = 2**31 - 1


def served(view: Windows, *arrays: Any) -> bool:
    """Return whether the kernels serve images of this dtype, of which there are some, all alike."""
    dtype = arrays[0].dtype
    return (
        dtype.name in launch.ELEMENTS
        and all(array.dtype == dtype and array.size for array in arrays)
        and math.prod(view.shape) // THREADS < MOST
        and max(view.padded) < MOST
    )


def contiguous(array: Any) -> Any:
    """Return an array in C order, copied if it is not."""
    return array_module(array).ascontiguousarray(array)


def run(name: str, view: Windows, out: Any, *arguments: Any) -> None:
    """Start a kernel of pooling.cu with a thread for each entry of `out`."""
    larger = max(math.prod(view.shape), out.size)
    program = launch.program(
        "pooling.cu",
        ELEMENT=launch.ELEMENTS[out.dtype.name],
        INDEX="unsigned" if larger <= FEW else "unsigned long long",
        THREADS=THREADS,
    )
    inner = view.channels if view.layout == "NHWC" else 1
    sizes = (*view.size, *view.kernel, *view.stride, *view.padding, *view.out)
    blocks = -(-out.size // THREADS)
    program.launch(name, blocks, THREADS, 0, *arguments, out.size, inner, *sizes)
