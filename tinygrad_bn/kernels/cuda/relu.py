"""ReLU on a GPU: launches of `relu.cu`. The derivative takes one launch instead of two."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.layout import dense_order, inverse

#: Threads of a block, and what a launch can number.
THREADS, MOST_BLOCKS = 256, 2**31 - 1


def forward(x: Any) -> Any:
    """Return max(x, 0), in the order in memory of x, or NotImplemented."""
    return _run("relu", x)


def vjp(g: Any, out: Any) -> Any:
    """Return (g where out > 0, else 0,), or NotImplemented."""
    if g.dtype != out.dtype or g.shape != out.shape:
        return NotImplemented
    gx = _run("relu_gradient", g, out)
    return gx if gx is NotImplemented else (gx,)


def _run(name: str, *arrays: Any) -> Any:
    """Return what a kernel makes of arrays of one shape; laid out as the last of them."""
    like = arrays[-1]
    if like.dtype.name not in launch.ELEMENTS or not like.size or like.size > MOST_BLOCKS * THREADS:
        return NotImplemented
    xp = array_module(like)
    order = dense_order(like) or tuple(range(like.ndim))
    with launch.on_device_of(like):
        laid = [xp.ascontiguousarray(array.transpose(order)) for array in arrays]
        out = xp.empty(tuple(like.shape[i] for i in order), like.dtype)
        wide = 16 // like.itemsize
        vector = wide if launch.alignment(*laid, out) == 16 else 1
        element = launch.ELEMENTS[like.dtype.name]
        program = launch.program("relu.cu", ELEMENT=element, VECTOR=vector, THREADS=THREADS)
        blocks = -(-like.size // (vector * THREADS))
        program.launch(name, blocks, THREADS, 0, *laid, out, like.size)
    return out.transpose(inverse(order))
