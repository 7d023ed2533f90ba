"""Convolution, batch norm, ReLU and max pool, a few images at a time: what `ops.fused` defines.

Two passes forward. The first lays the windows of a few images out in cache, multiplies them with
the kernel and adds the result, still in cache, to the statistics. The second, which knows the
statistics, normalizes, cuts off at 0 and takes the maxima. Two passes backward: the sums over g and
g x̂, then everything else, of which no gradient of the convolution's output is ever in memory.

The passes are here, the loops in them in `conv_block_loops`, the order of pixels that makes both
short in `conv_block_plan`. What is called middle is the convolution's output in that order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import conv_block_loops as loops
from tinygrad_bn.kernels.cpu import conv_block_plan, memory
from tinygrad_bn.kernels.cpu.columns import serves, weight_matrix
from tinygrad_bn.kernels.cpu.compiled import usable
from tinygrad_bn.kernels.cpu.conv_block_plan import Array, Plan, plan_for
from tinygrad_bn.kernels.cpu.numpy_batch_norm import in_range
from tinygrad_bn.kernels.cpu.threads import num_threads, parallel, scratch
from tinygrad_bn.windows import Pair, convolution_windows


class Kept(NamedTuple):
    """What forward keeps for `vjp`: the convolution's output and its mean, and who won."""

    plan: Plan
    middle: Array
    mean: Array
    places: Array


def forward(
    x: Array,
    kernel: Array,
    offset: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: Pair | None,
    layout: str,
) -> Any:
    """Return what `ops.fused.conv_block` returns, or NotImplemented."""
    if not serves(x, kernel, offset) or not x.size:
        return NotImplemented
    view = convolution_windows(
        x.shape, kernel.shape, None if offset is None else offset.shape,
        stride=stride, padding=padding, dilation=dilation, layout=layout,
    )  # fmt: skip
    plan = plan_for(view, pool, kernel.shape[0], x.itemsize)
    if plan is None or not usable():
        return NotImplemented
    middle = memory.empty((view.batch, plan.pixels * plan.outputs), x.dtype)
    with np.errstate(all="ignore"):  # what leaves the range of floats is seen in the variance
        mean, var = _convolve(plan, x, np.ascontiguousarray(weight_matrix(kernel)), middle)
        if not in_range(var + eps):
            return NotImplemented
        reported = mean if offset is None else mean + offset
        vectors = _affine(mean, var + eps, weight, bias, x.dtype)
        # The loops compare, which drops a NaN: only finite vectors make none.
        if not all(np.isfinite(vector).all() for vector in (reported, *vectors)):
            return NotImplemented
        places = memory.empty((view.batch, plan.plane), np.uint8)
        out = _activate(plan, middle, vectors, places)
    shape = (1, 1, 1, -1) if layout == "NHWC" else (1, -1, 1, 1)
    return saving(
        out,
        mean=reported.reshape(shape),
        var=var.reshape(shape),
        count=view.batch * plan.pixels,
        kept=Kept(plan, middle, mean, places),
    )


# --- forward -------------------------------------------------------------------------------------


def _convolve(plan: Plan, x: Array, matrix: Array, middle: Array) -> tuple[Array, Array]:
    """Fill `middle` with the convolution; return mean and biased variance of each channel."""
    add_sums = loops.add_sums.of(x.dtype)
    shares = _Shares(plan, len(x))
    parts: list[Any] = [None] * shares.count

    def work(share: int) -> None:
        total = np.zeros((2, plan.outputs))
        shift, wide = None, np.empty(0)
        sums = np.empty((2, plan.width), x.dtype)
        for images in shares.chunks(share):
            pixels = middle[images].reshape(-1, plan.pixels, plan.outputs)
            np.matmul(_windows(plan, x[images]), matrix, out=pixels)
            if shift is None:
                # Within the data, so the sums do not cancel; a constant channel is its own mean.
                shift = pixels[0].mean(axis=0, dtype=np.float64).astype(x.dtype)
                wide = plan.spread(shift, x.dtype)
            sums.fill(0)
            add_sums(middle[images].reshape(-1), wide, sums)
            total += plan.folded(sums)
        parts[share] = (shares.size(share) * plan.pixels, shift, *total)

    parallel(work, shares.count)
    return _merged(parts)


def _merged(parts: list[tuple[int, Array, Array, Array]]) -> tuple[Array, Array]:
    """Return mean and biased variance from (count, shift, Σ d, Σ d²) of each part.

    Source: Chan, Golub and LeVeque 1979, equation 2.1.
    """
    count, mean, square = 0, np.zeros(()), np.zeros(())
    for n, shift, first, second in parts:
        of_part = shift.astype(np.float64) + first / n
        apart = of_part - mean
        square = square + np.maximum(second - first * first / n, 0.0)
        square = square + apart * apart * (count * n / (count + n))
        count += n
        mean = mean + apart * (n / count)
    return mean, square / count


def _affine(
    mean: Array, var: Array, weight: Array | None, bias: Array | None, dtype: Any
) -> tuple[Array, ...]:
    """Return high, scale and constant: (middle - high) scale + constant is batch norm's output.

    var: with eps in it.
    """
    scale = 1 / np.sqrt(var)
    if weight is not None:
        scale = scale * weight
    high = mean.astype(dtype)
    constant = (high - mean) * scale if bias is None else bias + (high - mean) * scale
    return high, scale.astype(dtype), constant.astype(dtype)


def _activate(plan: Plan, middle: Array, vectors: tuple[Array, ...], places: Array) -> Array:
    """Return the block's output, and fill `places`; vectors: of `_affine`."""
    dtype = middle.dtype
    vectors = tuple(plan.spread(v, dtype) for v in vectors)
    last = plan.view.layout == "NHWC"
    size = (*plan.pooled, plan.outputs) if last else (plan.outputs, *plan.pooled)
    out = memory.empty((len(middle), *size), dtype)
    pool = loops.pool.of(dtype)
    shares = _Shares(plan, len(middle))

    def work(share: int) -> None:
        for images in shares.chunks(share):
            part = out[images]
            if last:
                pool(
                    middle[images],
                    plan.entries,
                    *vectors,
                    places[images],
                    part.reshape(len(part), -1),
                )
                continue
            pixels = scratch("pixels", (len(part), plan.plane), dtype)
            pool(middle[images], plan.entries, *vectors, places[images], pixels)
            np.copyto(part, pixels.reshape(-1, *plan.pooled, plan.outputs).transpose(0, 3, 1, 2))

    parallel(work, shares.count)
    return out


# --- backward ------------------------------------------------------------------------------------


def vjp(
    g: Array,
    x: Array,
    kernel: Array,
    offset_dtype: Any,
    weight: Array | None,
    bias: Array | None,
    var: Array,
    kept: Any,
    eps: float,
    needs: tuple[bool, ...],
    **options: Any,
) -> Any:
    """Return what the rule of `ops.fused.conv_block` returns, or NotImplemented."""
    if not isinstance(kept, Kept) or g.dtype != x.dtype:
        return NotImplemented
    with np.errstate(all="ignore"):
        return _vjp(g, x, kernel, offset_dtype, weight, var, kept, eps, needs)


def _vjp(
    g: Array,
    x: Array,
    kernel: Array,
    offset_dtype: Any,
    weight: Array | None,
    var: Array,
    kept: Kept,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    plan, middle, mean, places = kept
    count = len(middle) * plan.pixels
    s = 1 / np.sqrt(var.ravel() + eps)
    high = mean.astype(x.dtype)
    low = mean - high
    sum_g, sum_gd = _sums(plan, g, places, middle, high)
    sum_gx = s * (sum_gd - low * sum_g)
    gx = gkernel = None
    if needs[0] or needs[1]:
        # γ s (g - mean(g) - x̂ mean(g x̂)), collected by powers of middle - high
        scale = s if weight is None else s * weight
        slope = -scale * s * sum_gx / count
        constant = -scale * sum_g / count - slope * low
        vectors = (high, scale, slope, constant)
        gx, gkernel = _through(plan, g, places, middle, vectors, x, kernel, needs)
    return (
        gx,
        gkernel,
        # What is added before a mean is taken off has no effect.
        np.zeros(len(kernel), offset_dtype) if needs[2] else None,
        sum_gx if needs[3] else None,
        sum_g if needs[4] else None,
    )


def _sums(plan: Plan, g: Array, places: Array, middle: Array, high: Array) -> tuple[Array, Array]:
    """Return Σ g and Σ g (middle - high) of each channel, float64."""
    add_sums = loops.add_pooled_sums.of(g.dtype)
    wide = plan.spread(high, g.dtype)
    shares = _Shares(plan, len(g))
    totals = np.zeros((shares.count, 2, plan.outputs))

    def work(share: int) -> None:
        sums = np.empty((2, plan.width), g.dtype)
        for images in shares.chunks(share):
            sums.fill(0)
            cotangents = _flat(plan, g[images])
            add_sums(cotangents, places[images], middle[images], plan.entries, wide, sums)
            totals[share] += plan.folded(sums)

    parallel(work, shares.count)
    first, second = totals.sum(axis=0)
    return first, second


def _through(
    plan: Plan,
    g: Array,
    places: Array,
    middle: Array,
    vectors: tuple[Array, ...],
    x: Array,
    kernel: Array,
    needs: tuple[bool, ...],
) -> tuple[Array | None, Array | None]:
    """Return the gradients of x and of the kernel, where they are needed."""
    dtype = x.dtype
    combine = loops.combine.of(dtype)
    matrix = np.ascontiguousarray(weight_matrix(kernel).T)
    wide = [plan.spread(v, dtype) for v in vectors]
    gx = memory.empty(x.shape, dtype) if needs[0] else None
    shares = _Shares(plan, len(g))
    sums = np.zeros((shares.count, plan.window, plan.outputs))

    def work(share: int) -> None:
        for images in shares.chunks(share):
            cotangents = _flat(plan, g[images])
            gmiddle = scratch("gmiddle", (len(cotangents), plan.pixels * plan.outputs), dtype)
            combine(cotangents, places[images], middle[images], plan.entries, *wide, gmiddle)
            pixels = gmiddle.reshape(-1, plan.pixels, plan.outputs)
            if needs[1]:
                windows = _windows(plan, x[images])
                sums[share] += np.matmul(windows.transpose(0, 2, 1), pixels).sum(axis=0)
            if gx is not None:
                columns = scratch("columns", (len(pixels), plan.pixels, plan.window), dtype)
                np.matmul(pixels, matrix, out=columns)
                _add_back(plan, columns, gx[images])

    parallel(work, shares.count)
    if not needs[1]:
        return gx, None
    outputs, channels, kh, kw = kernel.shape
    total = sums.sum(axis=0).reshape(kh, kw, channels, outputs)
    return gx, np.ascontiguousarray(total.transpose(3, 2, 0, 1), dtype)


# --- images --------------------------------------------------------------------------------------


class _Shares:
    """The images of a batch, in order: a share for each thread, in chunks that fit in cache."""

    def __init__(self, plan: Plan, images: int):
        self.images = images
        self.count = min(num_threads(), images)
        self.step = max(1, conv_block_plan.CHUNK_BYTES // plan.image_bytes)

    def size(self, share: int) -> int:
        return self._first(share + 1) - self._first(share)

    def chunks(self, share: int) -> list[slice]:
        last = self._first(share + 1)
        starts = range(self._first(share), last, self.step)
        return [slice(start, min(start + self.step, last)) for start in starts]

    def _first(self, share: int) -> int:
        return self.images * share // self.count


def _windows(plan: Plan, x: Array) -> Array:
    """Return the windows of images in either layout, (b, pixels, window), in scratch memory."""
    size = (plan.window, plan.pixels) if plan.by_entry else (plan.pixels, plan.window)
    columns = scratch("columns", (len(x), *size), x.dtype)
    lay_out = loops.lay_out_by_entry if plan.by_entry else loops.lay_out
    lay_out.of(x.dtype)(_padded(plan, x), *plan.geometry, columns)
    return columns.transpose(0, 2, 1) if plan.by_entry else columns


def _padded(plan: Plan, x: Array) -> Array:
    """Return images, in either layout, as (b, padded rows · columns · channels)."""
    view = plan.view
    x = x.transpose(view.axes)
    (ph, pw), (h, w) = view.padding, view.size
    if not (ph or pw) and x.flags.c_contiguous:
        return x.reshape(len(x), -1)
    images = scratch("padded", (len(x), *view.padded, view.channels), x.dtype)
    if ph or pw:
        images.fill(0)
    np.copyto(images[:, ph : ph + h, pw : pw + w], x)
    return images.reshape(len(x), -1)


def _add_back(plan: Plan, columns: Array, gx: Array) -> None:
    """Set gx, images in their layout, to the sums of their windows."""
    add_back, view = loops.add_back.of(gx.dtype), plan.view
    (ph, pw), (h, w) = view.padding, view.size
    if not (ph or pw) and view.layout == "NHWC":
        add_back(columns, *plan.geometry, gx.reshape(len(gx), -1))
        return
    images = scratch("padded", (len(gx), *view.padded, view.channels), gx.dtype)
    add_back(columns, *plan.geometry, images.reshape(len(gx), -1))
    np.copyto(gx.transpose(view.axes), images[:, ph : ph + h, pw : pw + w])


def _flat(plan: Plan, g: Array) -> Array:
    """Return cotangents, in either layout, as (b, plane)."""
    g = g.transpose(plan.view.axes)
    if g.flags.c_contiguous:
        return g.reshape(len(g), -1)
    pixels = scratch("pixels", g.shape, g.dtype)
    np.copyto(pixels, g)
    return pixels.reshape(len(g), -1)
