"""Steps of optimizers on a GPU, for all parameters at once: launches of `optimizers.cu`.

`optim` asks for these by family, as ops ask for their kernels.

A launch finds its parameters, gradients and state by a table on the device. Parameters and state
stay where they are. Gradients are made anew in every backward pass, mostly where they were before:
what an allocator is asked for in the same order, it gives in the same order. So tables are kept and
found again by what they say, and a step whose arrays are where those of a recent one were is one
launch. One whose arrays have moved writes a table first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.backend.recording import lasting, watching
from tinygrad_bn.kernels.cuda import launch

#: Threads of a block, and the elements that it updates.
THREADS, CHUNK = 256, 4096
#: Words that one launch writes into a table: `set_words` in optimizers.cu.
WORDS = 64
#: Tables that are kept: of some groups, dtypes and devices, each with gradients here and there.
TABLES = 64

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
    """Start a kernel for all `parameters`, which are of one dtype and on one device."""
    rows = [arrays for arrays in parameters if arrays[0].size]
    if not rows:
        return
    like = rows[0][0]
    address = launch.runtime().address
    sizes = [arrays[0].size for arrays in rows]
    ends = accumulate(-(-size // CHUNK) for size in sizes)
    words = [*ends, *sizes]
    for column in range(4):
        words += [address(a[column]) if column < len(a) else 0 for a in rows]
    with launch.on_device_of(like):
        table = _table(array_module(like), like.dtype.name, tuple(words))
        blocks = words[len(rows) - 1]
        _program(like.dtype.name).launch(name, blocks, THREADS, 0, *arguments, table, len(rows))


def _program(dtype: str) -> launch.Program:
    return launch.program("optimizers.cu", ELEMENT=ELEMENTS[dtype], CHUNK=CHUNK, THREADS=THREADS)


def _table(xp: Any, dtype: str, words: tuple[int, ...]) -> Any:
    """Return an array of these words on the current device, one that was made before if it can be.

    Another stream would not wait for it to be written, nor its memory, once given back, for that
    stream. So each stream has tables of its own. One that a graph reads is the graph's.
    """
    runtime = launch.runtime()
    if watching() is not None:
        return lasting(lambda: _written(xp, dtype, words))
    return _kept(xp, dtype, words, runtime, runtime.current_device(), runtime.current_stream())


def _written(xp: Any, dtype: str, words: tuple[int, ...], *key: Any) -> Any:
    table = xp.empty((-(-len(words) // WORDS) * WORDS,), "int64")
    for begin in range(0, len(words), WORDS):
        some = words[begin : begin + WORDS]
        padding = (0,) * (WORDS - len(some))
        _program(dtype).launch("set_words", 1, 1, 0, table[begin:], *some, *padding)
    return table


_kept = lru_cache(TABLES)(_written)
