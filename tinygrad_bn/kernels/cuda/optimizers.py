"""Steps of optimizers on a GPU, for all parameters at once: launches of `optimizers.cu`.

`optim` asks for these by family, as ops ask for their kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tinygrad_bn.kernels.cuda import launch

#: Threads of a block, and the elements that it updates.
THREADS, CHUNK = 256, 4096
#: Parameters of a launch: SLOTS in optimizers.cu.
SLOTS = 16

ELEMENTS = {"float32": "float", "float64": "double"}

#: A parameter, its gradient and one or two arrays of state, of one shape and dtype, in C order.
Arrays = Sequence[Any]


def served(p: Any, *others: Any) -> bool:
    """Return whether the kernels update a parameter `p`, given its gradient and its state."""
    return p.dtype.name in ELEMENTS and all(
        array.dtype == p.dtype and array.flags.c_contiguous for array in (p, *others)
    )


def number(value: Any) -> tuple[Any, float]:
    """Return what a kernel takes for a number: where it is in memory, or itself."""
    return (None, value) if isinstance(value, float) else (value, 0.0)


def run(name: str, parameters: Iterable[Arrays], *arguments: Any) -> None:
    """Start a kernel for all `parameters`, as often as their number asks for."""
    full = [arrays for arrays in parameters if arrays[0].size]
    for begin in range(0, len(full), SLOTS):
        some = full[begin : begin + SLOTS]
        like = some[0][0]
        slots: list[Any] = []
        blocks = 0
        for arrays in some:
            slots += [*arrays, *[None] * (4 - len(arrays)), arrays[0].size]
            blocks += -(-arrays[0].size // CHUNK)
        slots += [None, None, None, None, 0] * (SLOTS - len(some))
        with launch.on_device_of(like):
            program = launch.program(
                "optimizers.cu", ELEMENT=ELEMENTS[like.dtype.name], CHUNK=CHUNK, THREADS=THREADS
            )
            program.launch(name, blocks, THREADS, 0, *arguments, *slots)
