"""Convolution, batch norm, ReLU and max pool on a GPU: what `ops.fused.conv_block` defines.

Four launches forward: the convolution, the sums over its output, the channels' statistics, and the
rest. Backward: the sums, the channels' gradients, the gradient of the convolution's output, and
those of images and weights. See conv_block.cu. Statistics stay on the device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tinygrad_bn.backend import array_module, saving
from tinygrad_bn.kernels.cuda import channel_tiles, convolutions, images, launch
from tinygrad_bn.kernels.cuda.batch_norm import AFFINE, given, parameters_served
from tinygrad_bn.kernels.cuda.channel_tiles import tiles_for, view_of
from tinygrad_bn.windows import Pair, Windows, convolution_windows, pool_windows

#: Numbers of a channel's `Gradient`, and the largest window: one byte tells its entries, and NONE.
GRADIENT, MOST_ENTRIES = 3, 255


class Kept(NamedTuple):
    """What forward keeps for `vjp`: y, the convolution's output, its mean, and who won.

    affines: the factors of each channel's γ x̂ + β, as the kernels keep them.
    """

    view: Windows
    pool: Pool
    y: Any
    mean: Any
    affines: Any
    places: Any


class Pool(NamedTuple):
    """The windows on y, an array of `shape`, as conv_block.cu takes them.

    windows: rows and columns of one. out: how many there are. channels: of y.
    """

    shape: tuple[int, ...]
    layout: str
    windows: tuple[int, int]
    out: tuple[int, int]
    channels: int

    @property
    def axis(self) -> tuple[int]:
        """The axis of channels."""
        return (3 if self.layout == "NHWC" else 1,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the block's output."""
        if self.layout == "NHWC":
            return (self.shape[0], *self.out, self.channels)
        return (self.shape[0], self.channels, *self.out)

    @property
    def arguments(self) -> tuple[int, ...]:
        """What the kernels take."""
        last = self.layout == "NHWC"
        size = self.shape[1:3] if last else self.shape[2:]
        return (*size, *self.windows, *self.out, self.channels, self.channels if last else 1)


def _pool_on(view: Windows, pool: Pair | None, outputs: int) -> Pool | None:
    """Return the windows on the output of a convolution; None if a byte cannot number entries."""
    shape = view.out_shape(outputs)
    if pool is None:
        return Pool(shape, view.layout, (1, 1), view.out, outputs)
    windows = pool_windows("max_pool2d", shape, pool, layout=view.layout)
    if math.prod(windows.kernel) > MOST_ENTRIES:
        return None
    return Pool(shape, view.layout, windows.kernel, windows.out, outputs)


def forward(
    x: Any,
    kernel: Any,
    offset: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: Pair | None,
    layout: str,
) -> Any:
    """Return what `ops.fused.conv_block` returns, or NotImplemented."""
    view = convolution_windows(
        x.shape, kernel.shape, None if offset is None else offset.shape,
        stride=stride, padding=padding, dilation=dilation, layout=layout,
    )  # fmt: skip
    outputs = kernel.shape[0]
    both = (view.channels, outputs)  # forward and backward
    if not all(convolutions.served(view, outputs, summed, x, kernel) for summed in both):
        return NotImplemented
    on = _pool_on(view, pool, outputs)
    if view.positions < 2 or on is None or not parameters_served(offset, weight, bias):
        return NotImplemented
    xp = array_module(x)
    with launch.on_device_of(x):
        y = xp.empty(on.shape, x.dtype)
        x, kernel = xp.ascontiguousarray(x), xp.ascontiguousarray(kernel)
        convolutions.convolve(view, x, kernel, None, y)
        of_y: Any = view_of(y, on.axis, 1)
        tiles = tiles_for(of_y, (y,))
        if tiles is None:
            return NotImplemented
        partials = tiles.partials(y, 2)
        tiles.launch_sums("forward_sums", 2, y, None, None, None, partials)
        mean, var = (xp.empty(of_y.kept, "float64") for _ in range(2))
        reported = mean if offset is None else xp.empty(of_y.kept, "float64")
        affines = xp.empty((outputs, AFFINE), x.dtype)
        parameters = (*given(offset), *given(weight), *given(bias), float(eps))
        sizes = (of_y.values, of_y.inner, tiles.tile, tiles.members)
        arrays = (partials, y, mean, reported, var, affines)
        _of_channels(on, y, "channel_moments", *arrays, *parameters, *sizes)
        out, places = xp.empty(on.out_shape, x.dtype), xp.empty(on.out_shape, "uint8")
        _of_entries(on, y, "activate", out.size, y, affines, out, places)
    kept = Kept(view, on, y, mean, affines, places)
    return saving(out, mean=reported, var=var, count=of_y.values, kept=kept)


def vjp(
    g: Any,
    x: Any,
    kernel: Any,
    offset_dtype: Any,
    weight: Any,
    bias: Any,
    var: Any,
    kept: Kept | None,
    eps: float,
    needs: tuple[bool, ...],
    **options: Any,
) -> Any:
    """Return what the rule of `ops.fused.conv_block` returns, or NotImplemented."""
    if not isinstance(kept, Kept) or g.dtype != x.dtype:
        return NotImplemented
    view, on, y, mean, affines, places = kept
    needs = (*needs, False, False, False)[:5]
    xp = array_module(x)
    with launch.on_device_of(x):
        g = xp.ascontiguousarray(g)
        of_g: Any = view_of(g, on.axis, 1)
        # One entry a load, as with a mask. y is larger, and was not too large.
        tiles: Any = tiles_for(of_g, (g,), masked=True, program=_program(on, y))
        partials = tiles.partials(g, 2)
        tiles.launch_sums("pooled_sums", 2, g, places, y, mean, partials, *on.arguments)
        gradients = xp.empty((on.channels, GRADIENT), x.dtype)
        gweight, gbias = (
            xp.empty((on.channels,), "float64" if p is None else p.dtype) if need else None
            for p, need in zip((weight, bias), needs[3:], strict=True)
        )
        _of_channels(
            on, y, "channel_gradients", partials, mean, var, affines, gradients,
            *given(weight), *given(gweight), *given(gbias), float(eps), view.positions,
            tiles.tile, tiles.members,
        )  # fmt: skip
        gx = gkernel = None
        if needs[0] or needs[1]:
            gy = xp.empty(y.shape, y.dtype)
            arrays = (g, places, y, affines, gradients, gy)
            _of_entries(on, y, "spread", y.size, *arrays)
            if needs[0]:
                gx = xp.empty(view.shape, x.dtype)
                laid = xp.ascontiguousarray(kernel)
                convolutions.convolve(view, gy, laid, None, gx, transposed=True)
            if needs[1]:
                gkernel = xp.empty(kernel.shape, x.dtype)
                convolutions.weight_gradient(view, xp.ascontiguousarray(x), gy, gkernel)
        # What is added before a mean is taken off has no effect.
        goffset = xp.zeros(kernel.shape[:1], offset_dtype) if needs[2] else None
    return gx, gkernel, goffset, gweight, gbias


def _program(on: Pool, y: Any) -> launch.Program:
    run = 1 if on.layout == "NHWC" else math.prod(on.out)
    return launch.program(
        "conv_block.cu",
        ELEMENT=launch.ELEMENTS[y.dtype.name],
        VECTOR=1,
        COLUMNS=int(run * y.itemsize < channel_tiles.LONG_RUN),
        RELU=1,
        INDEX="unsigned" if y.size <= images.FEW else "unsigned long long",
        THREADS=channel_tiles.THREADS,
    )


def _of_channels(on: Pool, y: Any, name: str, *arguments: Any) -> None:
    """Start a kernel with a block for each channel, which adds up two sums."""
    threads = channel_tiles.THREADS
    _program(on, y).launch(name, on.channels, threads, 2 * 8 * threads, *arguments)


def _of_entries(on: Pool, y: Any, name: str, count: int, *arguments: Any) -> None:
    """Start a kernel with a thread for each of `count` entries."""
    threads = channel_tiles.THREADS
    blocks = -(-count // threads)
    _program(on, y).launch(name, blocks, threads, 0, *arguments, count, *on.arguments)
