"""Pools: the largest entry or the mean of every window of an image.

A pool is a selection or a sum, so its derivative is the transpose of one: `scatter_windows` puts
what a window received back at the entry it had chosen, and `take_windows`, its transpose, reads
that entry. The two are each other's derivative, as are `avg_pool2d` and `avg_pool2d_input_grad`, so
gradients of any order need nothing else.
"""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module, is_floating, saving
from tinygrad_bn.domain import Domain, Integer, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.convolution import (
    channels_last,
    cropped,
    from_channels_last,
    padded,
    working_dtype,
)
from tinygrad_bn.windows import Pair, Windows, pool_windows

#: (shape of x, options): windows that touch, overlap, leave a rest or leave gaps, one and few of
#: them; both layouts. Draws begin with the first, which every kernel of a pool serves.
_CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 5, 4, 3), {"kernel_size": 2, "layout": "NHWC"}),
    ((2, 3, 4, 6), {"kernel_size": 2}),
    ((1, 2, 5, 6), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
    ((1, 6, 5, 2), {"kernel_size": 3, "stride": 2, "padding": 1, "layout": "NHWC"}),
    ((2, 1, 7, 5), {"kernel_size": (1, 2), "stride": 3}),
    ((1, 5, 6, 2), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "layout": "NHWC"}),
    ((2, 2, 4, 3), {"kernel_size": (4, 3)}),
    ((1, 3, 4, 2), {"kernel_size": 3, "stride": (1, 2), "padding": (0, 1), "layout": "NHWC"}),
)
_VIEWS = tuple(pool_windows("pool", x, **options) for x, options in _CASES)


def _out_shape(view: Windows) -> tuple[int, ...]:
    return view.out_shape(view.channels)


def _check_windows(name: str, view: Windows, **arrays: Any) -> None:
    for what, array in arrays.items():
        if array.shape != _out_shape(view):
            raise ValueError(
                f"{name}: {what} has shape {array.shape}, but windows of these sizes give "
                f"{_out_shape(view)}; pass one of that shape"
            )


# --- max ---------------------------------------------------------------------------------------


@op(domain=Domain((Real(),), tuple(case(x, **options) for x, options in _CASES), distinct=True))
def max_pool2d(
    x: Any,
    *,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    layout: str = "NCHW",
) -> Any:
    """Return the largest entry of every window; the first of equals takes the gradient.

    x: (N, C, H, W), or (N, H, W, C) with layout "NHWC". kernel_size, stride, padding: an integer or
    a pair (rows, columns); stride None is the kernel size; padding is smaller than the kernel and
    never wins. Returns (N, C, OH, OW) or (N, OH, OW, C), OH = ⌊(H + 2 padding - KH) / stride⌋ + 1.
    A window that holds NaN gives NaN, and its gradient goes to the first NaN.

    Hands out `places`: where in its window each largest entry stands, KW · row + column.

    Raises ValueError for sizes that do not fit together, before anything is computed.
    """
    view = pool_windows("max_pool2d", x.shape, kernel_size, stride, padding, layout)
    xp = array_module(x)
    floating = is_floating(x.dtype)
    least = -float("inf") if floating else int(xp.iinfo(x.dtype).min)
    images = padded(channels_last(x, layout), view, least)
    # Start at the first entry that is not padding: where all are -inf, that one is chosen.
    shape = (view.batch, *view.out, view.channels)
    places = xp.broadcast_to(_first_places(xp, view), shape)
    best = xp.full(shape, least, dtype=x.dtype)
    for i, j, window in view.offsets():
        entry = images[:, *window]
        wins = entry > best
        if floating:
            wins |= xp.isnan(entry) & ~xp.isnan(best)
        best = xp.where(wins, entry, best)
        # Not places[wins] = ...: CuPy would wait for the GPU to count them.
        places = xp.where(wins, i * view.kernel[1] + j, places)
    best, places = from_channels_last(best, layout), from_channels_last(places, layout)
    return saving(best, places=places, view=view)


def _first_places(xp: Any, view: Windows) -> Any:
    """Return, for each window, the first place that is not padding: (OH, OW, 1)."""
    rows, columns = (
        xp.maximum(p - s * xp.arange(n), 0)
        for p, s, n in zip(view.padding, view.stride, view.out, strict=True)
    )
    return (rows[:, None] * view.kernel[1] + columns)[..., None].astype(view.place_dtype)


@max_pool2d.def_vjp
def _(g: Any, places: Any, view: Windows) -> Any:
    return (scatter_windows(g, places, view=view),)


# Every case has at least two places in a window, and few enough for this dtype.
_PLACED = (Real(), Integer(0, 2, "uint8"))


@op(domain=Domain(_PLACED, tuple(case(_out_shape(v), _out_shape(v), view=v) for v in _VIEWS)))
def scatter_windows(y: Any, places: Any, *, view: Windows) -> Any:
    """Return images of zeros to which each window's y was added at its place.

    y, places: one entry for each window and channel; a place is KW · row + column in its window.
    """
    _check_windows("scatter_windows", view, y=y, places=places)
    xp = array_module(y)
    dtype, work = working_dtype(y)
    y = channels_last(y, view.layout).astype(work, copy=False)
    places = channels_last(places, view.layout)
    images = xp.zeros((view.batch, *view.padded, view.channels), dtype=work)
    for i, j, window in view.offsets():
        images[:, *window] += xp.where(places == i * view.kernel[1] + j, y, 0)
    return from_channels_last(cropped(images, view).astype(dtype, copy=False), view.layout)


@op(domain=Domain(_PLACED, tuple(case(v.shape, _out_shape(v), view=v) for v in _VIEWS)))
def take_windows(x: Any, places: Any, *, view: Windows) -> Any:
    """Return each window's entry of x at its place (0 where that is padding).

    places: one entry for each window and channel, KW · row + column in its window.
    """
    _check_windows("take_windows", view, places=places)
    xp = array_module(x)
    images = padded(channels_last(x, view.layout), view)
    places = channels_last(places, view.layout)
    y = xp.zeros(places.shape, dtype=x.dtype)
    for i, j, window in view.offsets():
        y = xp.where(places == i * view.kernel[1] + j, images[:, *window], y)
    return from_channels_last(y, view.layout)


scatter_windows.def_vjp(y=lambda g, places, view: take_windows(g, places, view=view))
take_windows.def_vjp(x=lambda g, places, view: scatter_windows(g, places, view=view))

# --- mean --------------------------------------------------------------------------------------


@op(
    domain=Domain(
        (Real(),),
        (
            *(case(x, **options) for x, options in _CASES),
            *(
                case(x, count_include_pad=False, **options)
                for x, options in _CASES
                if "padding" in options
            ),
        ),
    )
)
def avg_pool2d(
    x: Any,
    *,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    layout: str = "NCHW",
    count_include_pad: bool = True,
) -> Any:
    """Return the mean of every window.

    count_include_pad: whether padding counts as zeros, or not at all. The rest as in `max_pool2d`.
    float16 is summed in float32 and rounded once; integers give float64.
    """
    view = pool_windows("avg_pool2d", x.shape, kernel_size, stride, padding, layout)
    xp = array_module(x)
    dtype, work = working_dtype(x)
    if not is_floating(dtype):
        dtype = work = xp.result_type(dtype, float)
    images = padded(channels_last(x, layout).astype(work, copy=False), view)
    y = xp.zeros((view.batch, *view.out, view.channels), dtype=work)
    for _, _, window in view.offsets():
        y += images[:, *window]
    y = (y / _counts(xp, view, count_include_pad)).astype(dtype, copy=False)
    return saving(from_channels_last(y, layout), view=view)


def _counts(xp: Any, view: Windows, count_include_pad: bool) -> Any:
    """Return by what each window's sum is divided: a number, or integers (OH, OW, 1)."""
    if count_include_pad or view.padding == (0, 0):
        return view.kernel[0] * view.kernel[1]
    rows, columns = (
        xp.minimum(s * xp.arange(n) + k, p + size) - xp.maximum(s * xp.arange(n), p)
        for s, n, k, p, size in zip(
            view.stride, view.out, view.kernel, view.padding, view.size, strict=True
        )
    )
    return (rows[:, None] * columns)[..., None].astype("float32")  # exact: counts are small


@op(
    domain=Domain(
        (Real(),),
        (
            *(case(_out_shape(v), view=v) for v in _VIEWS),
            *(
                case(_out_shape(v), view=v, count_include_pad=False)
                for v in _VIEWS
                if any(v.padding)
            ),
        ),
    )
)
def avg_pool2d_input_grad(y: Any, *, view: Windows, count_include_pad: bool = True) -> Any:
    """Return the x with ⟨x, x'⟩ = ⟨y, avg_pool2d(x')⟩ for all x'."""
    _check_windows("avg_pool2d_input_grad", view, y=y)
    xp = array_module(y)
    dtype, work = working_dtype(y)
    share = channels_last(y, view.layout).astype(work, copy=False)
    share = share / _counts(xp, view, count_include_pad)
    images = xp.zeros((view.batch, *view.padded, view.channels), dtype=work)
    for _, _, window in view.offsets():
        images[:, *window] += share
    return from_channels_last(cropped(images, view).astype(dtype, copy=False), view.layout)


@avg_pool2d.def_vjp
def _(g: Any, view: Windows, count_include_pad: bool) -> Any:
    return (avg_pool2d_input_grad(g, view=view, count_include_pad=count_include_pad),)


@avg_pool2d_input_grad.def_vjp
def _(g: Any, view: Windows, count_include_pad: bool) -> Any:
    gy = avg_pool2d(
        g,
        kernel_size=view.kernel,
        stride=view.stride,
        padding=view.padding,
        layout=view.layout,
        count_include_pad=count_include_pad,
    )
    return (gy,)


max_pool2d.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_pooling",
    numpy="tinygrad_bn.kernels.cpu.numpy_pooling",
    cuda="tinygrad_bn.kernels.cuda.max_pool",
)
scatter_windows.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_scatter_windows",
    numpy="tinygrad_bn.kernels.cpu.numpy_scatter_windows",
    cuda="tinygrad_bn.kernels.cuda.scatter_windows",
)
avg_pool2d.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_avg_pool",
    numpy="tinygrad_bn.kernels.cpu.numpy_avg_pool",
    cuda="tinygrad_bn.kernels.cuda.avg_pool",
)
avg_pool2d_input_grad.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_avg_pool_input_grad",
    numpy="tinygrad_bn.kernels.cpu.numpy_avg_pool_input_grad",
    cuda="tinygrad_bn.kernels.cuda.avg_pool_input_grad",
)
