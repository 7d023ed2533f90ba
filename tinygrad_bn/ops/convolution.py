"""Two-dimensional convolution and its two transposes.

With windows p (one for each output pixel), kernel offsets k and weights W[o, c, k],

    conv2d               y[p, o]    = Σ_c Σ_k  x[p + k, c] W[o, c, k]
    conv2d_input_grad    x[q, c]    = Σ_o Σ_k  y[q - k, o] W[o, c, k]
    conv2d_weight_grad   W[o, c, k] = Σ_p      x[p + k, c] y[p, o]

are the three ways to leave one factor out of a single trilinear form T(x, W, y). Each is linear in
both of its inputs, and its derivative in one of them is another of the three. So these three ops
are closed under differentiation, and gradients of any order need nothing else.

(What is called convolution here does not flip the kernel, as in every deep-learning library.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinygrad_bn.backend import array_module, float32, is_floating, saving
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.linalg import matmul
from tinygrad_bn.ops.reduction import sum as sum_
from tinygrad_bn.windows import Pair, Windows, convolution_windows

Shape = tuple[int, ...]

#: (shape of x, of weight, options): strides that leave a rest, rectangles, groups, both layouts.
_CASES: tuple[tuple[Shape, Shape, dict[str, Any]], ...] = (
    ((2, 2, 5, 4), (3, 2, 3, 2), {}),
    ((2, 5, 4, 2), (3, 2, 3, 2), {"layout": "NHWC"}),
    ((1, 2, 4, 3), (2, 2, 1, 1), {}),
    ((1, 1, 3, 3), (1, 1, 3, 3), {}),
    ((2, 3, 6, 7), (2, 3, 3, 3), {"stride": 2, "padding": 1}),
    ((1, 6, 7, 2), (2, 2, 2, 3), {"stride": (2, 3), "padding": (0, 2), "layout": "NHWC"}),
    ((1, 2, 7, 6), (2, 2, 2, 3), {"dilation": (3, 2), "padding": (1, 0)}),
    ((2, 4, 5, 4), (6, 2, 2, 2), {"groups": 2}),
    ((1, 4, 3, 6), (4, 3, 2, 1), {"groups": 2, "layout": "NHWC"}),
    ((2, 4, 5, 3), (3, 1, 2, 2), {"groups": 3, "layout": "NHWC", "padding": 1, "stride": 3}),
)


def _cases(transpose: str = "") -> Iterator[Any]:
    """Yield the cases of `conv2d`, or of the transpose that gives "x" or "weight"."""
    for x, weight, options in _CASES:
        view = convolution_windows(x, weight, **options)
        y = view.out_shape(weight[0])
        if transpose == "x":
            yield case(y, weight, view=view)
        elif transpose == "weight":
            yield case(x, y, view=view)
        else:
            yield case(x, weight, None, **options)
            yield case(x, weight, (weight[0],), **options)


# --- shared by the three -----------------------------------------------------------------------


def channels_last(x: Any, layout: str) -> Any:
    """Return images (N, C, H, W) or (N, H, W, C) as (N, H, W, C), without copying."""
    return x if layout == "NHWC" else x.transpose((0, 2, 3, 1))


def from_channels_last(x: Any, layout: str) -> Any:
    """Return images (N, H, W, C) in `layout`, in C order."""
    return array_module(x).ascontiguousarray(x if layout == "NHWC" else x.transpose((0, 3, 1, 2)))


def padded(x: Any, view: Windows, value: float = 0) -> Any:
    """Return images (N, H, W, C) with `value` around them."""
    (ph, pw) = view.padding
    if not (ph or pw):
        return x
    widths = ((0, 0), (ph, ph), (pw, pw), (0, 0))
    return array_module(x).pad(x, widths, constant_values=value)


def cropped(x: Any, view: Windows) -> Any:
    """Return padded images (N, H, W, C) without their padding: the transpose of `padded`."""
    (ph, pw), (h, w) = view.padding, view.size
    return x[:, ph : ph + h, pw : pw + w]


def working_dtype(x: Any, *others: Any) -> tuple[Any, Any]:
    """Return the dtype of a result and the one to compute in: float16 is summed in float32."""
    xp = array_module(x)
    dtype = xp.result_type(*(array.dtype for array in (x, *others) if array is not None))
    narrow = is_floating(dtype) and dtype.itemsize < 4
    return dtype, float32 if narrow else dtype


def _by_group(x: Any, groups: int) -> Any:
    """Return (N, H, W, C) as one matrix of pixels by channels for each group: (G, N H W, C/G)."""
    *sizes, channels = x.shape
    pixels = sizes[0] * sizes[1] * sizes[2]
    return x.reshape((pixels, groups, channels // groups)).transpose((1, 0, 2))


def _from_groups(x: Any, sizes: Shape) -> Any:
    """Return (G, N H W, C/G) as (N, H, W, C)."""
    groups, _, channels = x.shape
    return x.transpose((1, 0, 2)).reshape((*sizes, groups * channels))


def _weight_matrices(weight: Any, groups: int) -> Any:
    """Return weights (O, C/G, KH, KW) as (KH, KW, G, C/G, O/G)."""
    outputs, channels, kh, kw = weight.shape
    split = weight.reshape((groups, outputs // groups, channels, kh, kw))
    return split.transpose((3, 4, 0, 2, 1))


def convolve(x: Any, weight: Any, view: Windows) -> Any:
    """Return `conv2d` of x and weight with the options of `view`."""
    return conv2d(
        x,
        weight,
        stride=view.stride,
        padding=view.padding,
        dilation=view.dilation,
        groups=view.groups,
        layout=view.layout,
    )


def _check_output(name: str, y: Any, outputs: int, view: Windows) -> None:
    if y.shape != view.out_shape(outputs):
        raise ValueError(
            f"{name}: y has shape {y.shape}, but the convolution of these sizes gives "
            f"{view.out_shape(outputs)}; pass a y of that shape"
        )


# --- the ops -----------------------------------------------------------------------------------


@op(domain=Domain((Real(), Real(), Real()), tuple(_cases())))
def conv2d(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    layout: str = "NCHW",
) -> Any:
    """Return y[n, p, o] = bias[o] + Σ_c Σ_k x[n, p · stride + k · dilation, c] weight[o, c, k].

    x: (N, C, H, W), or (N, H, W, C) with layout "NHWC". weight: (O, C/groups, KH, KW) in both.
    bias: (O,) or None. stride, padding, dilation: an integer, or a pair (rows, columns).

    Returns (N, O, OH, OW) or (N, OH, OW, O) in the inputs' dtype (float16 is summed in float32 and
    rounded once), OH = ⌊(H + 2 padding - dilation (KH - 1) - 1) / stride⌋ + 1.

    Raises ValueError for sizes that do not fit together, before anything is computed.
    """
    shape = None if bias is None else bias.shape
    view = convolution_windows(
        x.shape, weight.shape, shape, stride=stride, padding=padding, dilation=dilation,
        groups=groups, layout=layout,
    )  # fmt: skip
    outputs, groups = weight.shape[0], view.groups
    dtype, work = working_dtype(x, weight, bias)
    xp = array_module(x)
    images = padded(channels_last(x, layout).astype(work, copy=False), view)
    matrices = _weight_matrices(weight.astype(work, copy=False), groups)
    y = xp.zeros((groups, view.positions, outputs // groups), dtype=work)
    for i, j, window in view.offsets():
        y += matmul(_by_group(images[:, *window], groups), matrices[i, j])
    y = _from_groups(y, (view.batch, *view.out))
    if bias is not None:
        y = y + bias
    return saving(from_channels_last(y.astype(dtype, copy=False), layout), view=view)


@op(domain=Domain((Real(), Real()), tuple(_cases("x"))))
def conv2d_input_grad(y: Any, weight: Any, *, view: Windows) -> Any:
    """Return the x with ⟨x, x'⟩ = ⟨y, conv2d(x', weight)⟩ for all x': the transposed convolution.

    y: what `conv2d` over `view` returns. weight: as there. Returns images of `view.shape`.
    """
    _check_output("conv2d_input_grad", y, weight.shape[0], view)
    dtype, work = working_dtype(y, weight)
    y = _by_group(channels_last(y, view.layout).astype(work, copy=False), view.groups)
    weight = weight.astype(work, copy=False)
    matrices = _weight_matrices(weight, view.groups).transpose((0, 1, 2, 4, 3))
    images = array_module(y).zeros((view.batch, *view.padded, view.channels), dtype=work)
    for i, j, window in view.offsets():
        part = matmul(y, matrices[i, j])
        images[:, *window] += _from_groups(part, (view.batch, *view.out))
    return from_channels_last(cropped(images, view).astype(dtype, copy=False), view.layout)


@op(domain=Domain((Real(), Real()), tuple(_cases("weight"))))
def conv2d_weight_grad(x: Any, y: Any, *, view: Windows) -> Any:
    """Return the W with ⟨W, W'⟩ = ⟨y, conv2d(x, W')⟩ for all W'.

    x, y: an input and an output of `conv2d` over `view`. Returns (O, C/groups, KH, KW).
    """
    outputs = y.shape[view.axes[3]]
    _check_output("conv2d_weight_grad", y, outputs, view)
    dtype, work = working_dtype(x, y)
    xp = array_module(x)
    images = padded(channels_last(x, view.layout).astype(work, copy=False), view)
    y = _by_group(channels_last(y, view.layout).astype(work, copy=False), view.groups)
    per_group = (view.groups, view.channels // view.groups, outputs // view.groups)
    matrices = xp.empty((*view.kernel, *per_group), dtype=work)
    for i, j, window in view.offsets():
        pixels = _by_group(images[:, *window], view.groups)
        matrices[i, j] = matmul(pixels.transpose((0, 2, 1)), y)
    weight = matrices.transpose((2, 4, 3, 0, 1)).reshape((outputs, per_group[1], *view.kernel))
    return xp.ascontiguousarray(weight.astype(dtype, copy=False))


# Each one's derivative is one of the other two.

conv2d.def_vjp(
    x=lambda g, weight, view: conv2d_input_grad(g, weight, view=view),
    weight=lambda g, x, view: conv2d_weight_grad(x, g, view=view),
    bias=lambda g, layout: sum_(g, axis=(0, 1, 2) if layout == "NHWC" else (0, 2, 3)),
)
conv2d_input_grad.def_vjp(
    y=lambda g, weight, view: convolve(g, weight, view),
    weight=lambda g, y, view: conv2d_weight_grad(g, y, view=view),
)
conv2d_weight_grad.def_vjp(
    x=lambda g, y, view: conv2d_input_grad(y, g, view=view),
    y=lambda g, x, view: convolve(x, g, view),
)

conv2d.use_kernels(
    numpy="tinygrad_bn.kernels.cpu.numpy_convolution",
    cuda="tinygrad_bn.kernels.cuda.convolution",
)
conv2d_input_grad.use_kernels(
    numpy="tinygrad_bn.kernels.cpu.numpy_convolution_input_grad",
    cuda="tinygrad_bn.kernels.cuda.convolution_input_grad",
)
conv2d_weight_grad.use_kernels(
    numpy="tinygrad_bn.kernels.cpu.numpy_convolution_weight_grad",
    cuda="tinygrad_bn.kernels.cuda.convolution_weight_grad",
)
