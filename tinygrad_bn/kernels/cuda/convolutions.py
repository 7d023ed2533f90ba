"""Which program and how many blocks a convolution on a GPU takes; see convolution.cu.

None of the choices here has been measured on a device yet: they are reckoned.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.windows import Windows

#: More taps (channels · KH · KW, of what is summed over) are left to cuBLAS, by the generic form:
#: 128 channels of 3 x 3. Their table takes 18 KB of shared memory.
MOST_TAPS = 1152
#: Pixels of a thread: 128 for a block.
PIXELS = 4
#: Factors of each pixel that are in shared memory at once: DEPTH in convolution.cu.
DEPTH = 8
#: Blocks that the gradient of the weights gives each multiprocessor.
BLOCKS_PER_MULTIPROCESSOR = 4
#: Pixels of a share: enough to be worth a block's while, and few enough for sums in float32.
FEWEST_PIXELS, MOST_PIXELS = 128, 4096
#: Warps of a block, which add up shares side by side.
TOTAL_WARPS = 16
#: What is counted in 32 bits: entries of an image, pixels around it, blocks.
MOST = 2**31 - 1

#: The dtypes that are multiplied here, and the bytes of a `Tap`.
ELEMENTS = {"float32": "float", "float64": "double"}
TAP_BYTES = 16


def served(view: Windows, outputs: int, summed: int, *arrays: Any) -> bool:
    """Return whether the kernels serve a convolution.

    outputs: its output channels. summed: the channels that are summed over.
    """
    dtype = arrays[0].dtype
    image = max(view.channels * math.prod(view.size), outputs * math.prod(view.out))
    return (
        view.groups == 1
        and dtype.name in ELEMENTS
        and all(array is None or (array.dtype == dtype and array.size) for array in arrays)
        and summed * math.prod(view.kernel) <= MOST_TAPS
        and max(image, *view.padded, *view.stride) <= MOST // 2
        and view.batch * image // 32 <= MOST
    )


class Block(NamedTuple):
    """How many warps a block has, and output channels a thread; how many blocks share the channels.

    Chosen so that few channels are computed in vain: 20 are 5 warps of 4, 50 are 7 of 8.
    """

    warps: int
    outputs: int
    tiles: int

    @property
    def channels(self) -> int:
        """Output channels of a block."""
        return self.warps * self.outputs


def block_for(channels: int) -> Block:
    """Return the block for so many output channels.

    >>> block_for(50)
    Block(warps=7, outputs=8, tiles=1)
    """
    outputs = 4 if channels <= 32 else 8
    tiles = -(-channels // (8 * outputs))
    return Block(-(-channels // (tiles * outputs)), outputs, tiles)


def _program(dtype: Any, block: Block, taps: int = 1, strided: bool = False) -> launch.Program:
    return launch.program(
        "convolution.cu",
        ELEMENT=ELEMENTS[dtype.name],
        WARPS=block.warps,
        OUTPUTS=block.outputs,
        PIXELS=PIXELS,
        TAPS=taps,
        STRIDED=int(strided),
    )


def _sizes(view: Windows, outputs: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return (channels, rows, columns) of x and of y."""
    return (view.channels, *view.size), (outputs, *view.out)


def convolve(
    view: Windows, x: Any, weight: Any, bias: Any, y: Any, *, transposed: bool = False
) -> None:
    """Fill y with the convolution of x; transposed: with the images whose convolution x is.

    All arrays are in C order.
    """
    channels, outputs = weight.shape[1], weight.shape[0]
    window = math.prod(view.kernel)
    source, target = _sizes(view, outputs)
    step, origin = view.stride, tuple(-p for p in view.padding)
    tap, apart = view.dilation, (1, 1)
    strides = channels * window, window
    if transposed:
        source, target = target, source
        step, origin = (1, 1), view.padding
        tap, apart = tuple(-d for d in view.dilation), view.stride
        strides = window, channels * window
    block = block_for(target[0])
    program = _program(x.dtype, block, strided=apart != (1, 1))
    shared = 2 * DEPTH * (32 * PIXELS + block.channels) * x.itemsize
    shared += source[0] * window * TAP_BYTES
    pixels = view.batch * target[1] * target[2]
    program.launch(
        "convolve",
        -(-pixels // (32 * PIXELS)) * block.tiles,
        32 * block.warps,
        shared,
        *(x, weight, bias, y),
        *(int(view.layout == "NHWC"), view.batch, *source, *target, *strides),
        *(*view.kernel, *step, *origin, *tap, *apart),
    )


def weight_gradient(view: Windows, x: Any, y: Any, weight: Any) -> None:
    """Fill `weight` with the weights' gradient, from images and cotangents in C order."""
    outputs, count = weight.shape[0], weight.size
    taps = count // outputs
    block = block_for(outputs)
    each = 1 if taps <= 32 else 2
    program = _program(x.dtype, block, taps=each)
    tiles = block.tiles * -(-taps // (32 * each))
    wanted = -(-BLOCKS_PER_MULTIPROCESSOR * program.device.multiprocessors // tiles)
    pixels = view.positions
    shares = max(min(wanted, -(-pixels // FEWEST_PIXELS)), -(-pixels // MOST_PIXELS))
    partials = array_module(x).empty((shares, outputs, taps), x.dtype)
    source, target = _sizes(view, outputs)
    rows = (block.channels + 4) + (32 * each + 1)
    origin = tuple(-p for p in view.padding)
    program.launch(
        "weight_sums",
        shares * tiles,
        32 * block.warps,
        32 * rows * x.itemsize + 32 * each * TAP_BYTES,
        *(x, y, partials, int(view.layout == "NHWC"), shares, view.batch, *source, *target),
        *(*view.kernel, *view.stride, *origin, *view.dilation),
    )
    threads = 32 * TOTAL_WARPS
    program.launch(
        "weight_total", -(-count // 32), threads, 8 * threads, partials, weight, shares, count
    )
