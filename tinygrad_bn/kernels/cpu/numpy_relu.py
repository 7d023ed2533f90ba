"""ReLU in NumPy, a cache-sized piece at a time, on several threads.

The cotangent passes where the output is positive. `np.where` decides that entry by entry, and on
random signs the processor guesses wrong half of the time; multiplying by a mask would make NaN of
an infinite cotangent. So the mask is spread to all bits of an entry, and g's bits are and-ed with
it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.kernels.cpu import memory, threads
from tinygrad_bn.kernels.cpu.channel_blocks import dense_order

Array = np.ndarray

# Entries handled at a time: g, the output, the mask and the result stay in the last cache, and few
# calls of NumPy are needed, between which threads wait for each other.
PIECE = 1 << 18
# Below this many entries one plain NumPy call is quicker than the threads.
SMALLEST = 1 << 15

_BITS = {
    np.dtype(np.float16): np.int16,
    np.dtype(np.float32): np.int32,
    np.dtype(np.float64): np.int64,
}


def forward(x: Array) -> Any:
    """Return max(x, 0), or NotImplemented."""
    if x.size < SMALLEST or x.dtype not in _BITS:
        return NotImplemented
    order = dense_order(x)
    if order is None:
        return NotImplemented
    laid = x.transpose(order)
    out = memory.empty(laid.shape, x.dtype)
    source, target = laid.reshape(-1), out.reshape(-1)

    def work(i: int) -> None:
        piece = slice(i * PIECE, (i + 1) * PIECE)
        np.maximum(source[piece], 0, out=target[piece])

    threads.parallel(work, -(-x.size // PIECE))
    return _back(out, order)


def vjp(g: Array, out: Array) -> Any:
    """Return (g where out > 0, else 0,), or NotImplemented."""
    same = g.dtype == out.dtype and g.strides == out.strides
    if out.size < SMALLEST or out.dtype not in _BITS or not same:
        return NotImplemented
    order = dense_order(out)
    if order is None:
        return NotImplemented
    bits = _BITS[out.dtype]
    gx = memory.empty(tuple(out.shape[i] for i in order), out.dtype)
    sign, source = out.transpose(order).reshape(-1), g.transpose(order).reshape(-1).view(bits)
    target = gx.reshape(-1).view(bits)

    def work(i: int) -> None:
        piece = slice(i * PIECE, (i + 1) * PIECE)
        positive = np.greater(sign[piece], 0).view(np.int8)
        mask = threads.scratch("relu", positive.shape, bits)
        np.negative(positive, out=mask, casting="same_kind", dtype=bits)  # 1 becomes all ones
        np.bitwise_and(mask, source[piece], out=target[piece])

    threads.parallel(work, -(-out.size // PIECE))
    return (_back(gx, order),)


def _back(laid: Array, order: tuple[int, ...]) -> Array:
    """Return an array laid out in `order` with its axes as they were."""
    return laid if order == tuple(range(laid.ndim)) else laid.transpose(np.argsort(order))
