"""Layers in a row that run as one.

`Sequential` calls its modules one after the other, but hands runs of plain layers that a kernel
serves to one function: convolution, batch norm and ReLU, with a max pool after them or without;
batch norm and ReLU. What comes out, gradients of any order included, is what the layers by
themselves give, within rounding.

A layer is plain if its class is exactly the library's own (a subclass may do anything) and nothing
looks at what goes through it (no hook, no other `forward` set on it or on its class). In
evaluation, and wherever no kernel answers, the layers are called as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from tinygrad_bn.backend.recording import watching
from tinygrad_bn.conv_block import conv_block_if_served
from tinygrad_bn.nn.activation import ReLU
from tinygrad_bn.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from tinygrad_bn.nn.convolution import Conv2d
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.pooling import MaxPool2d
from tinygrad_bn.windows import pair

_NORMS = (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d)
#: How a layer of each class runs, as the library has it.
_OWN = {cls: (cls.__call__, cls.forward) for cls in (Conv2d, *_NORMS, ReLU, MaxPool2d)}


def step(modules: Sequence[Module], at: int, x: Any) -> tuple[int, Any]:
    """Return how many modules from index `at` on were run, at least one, and x after them."""
    run: list[Any] = list(takewhile(is_plain, modules[at : at + 4]))
    kinds = [type(module) for module in run]
    if len(run) > 2 and kinds[0] is Conv2d and kinds[1] in _NORMS and kinds[2] is ReLU:
        pool = run[3] if kinds[3:] == [MaxPool2d] else None
        found = _conv_block(run[0], run[1], pool, x)
        if found is not None:
            return found
    # A step that is being captured wants to see each module.
    elif len(run) > 1 and kinds[0] in _NORMS and kinds[1] is ReLU and watching() is None:
        return 2, run[0].followed_by_relu(x)
    return 1, modules[at](x)


def is_plain(module: Module) -> bool:
    """Return whether calling `module` runs the library's `forward` for it and nothing else."""
    cls: Any = type(module)
    if cls not in _OWN or _OWN[cls] != (cls.__call__, cls.forward):
        return False
    return "forward" not in vars(module) and not module.has_hooks


def _conv_block(conv: Any, norm: Any, pool: Any, x: Any) -> tuple[int, Any] | None:
    """Return how many layers were run as one, and their result; None for none of them."""
    channels_last = conv.layout == "NHWC"
    if (
        not norm.takes_statistics
        or norm.num_features != conv.weight.shape[0]
        or 4 not in (norm.ranks or (4,))
        or norm.axis not in ((3, -1) if channels_last else (1, -3))
        or norm.groups != 1
        or conv.groups != 1
    ):
        return None
    side_by_side = None if pool is None else _side_by_side(pool, conv.layout)
    found = conv_block_if_served(
        x,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        pool=side_by_side,
        layout=conv.layout,
    )
    if found is None:
        return None
    out, statistics = found
    norm.take(statistics)
    watch: Any = watching()
    if watch is not None:
        for module in (conv, norm):
            watch.saw_module(module)
    return (3 if side_by_side is None else 4), out


def _side_by_side(pool: Any, layout: str) -> tuple[int, int] | None:
    """Return the size of the pool's windows, or None unless they stand side by side in `layout`."""
    size = pair("max_pool2d", "the kernel size", pool.kernel_size, 1)
    stride = pair("max_pool2d", "stride", pool.stride, 1)
    padding = pair("max_pool2d", "padding", pool.padding, 0)
    return size if pool.layout == layout and stride == size and padding == (0, 0) else None
