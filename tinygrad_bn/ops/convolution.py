"""Two-dimensional convolution and its two transposes.

With windows p (one for each output pixel), kernel offsets k and weights W[o, c, k],

    conv2d               y[p, o]    = Σ_c Σ_k  x[p + k, c] W[o, c, k]
    conv2d_input_grad    x[q, c]    = Σ_o Σ_k  y[q - k, o] W[o, c, k]
    conv2d_weight_grad   W[o, c, k] = Σ_p      x[p + k, c] y[p, o]

are the three ways to leave one factor out of a single trilinear form T(x, W, y). Each is linear in
both of its inputs, and its derivative in one of them is another of the three. So these three ops are
closed under differentiation, and gradients of any order need nothing else.

(What is called convolution here does not flip the kernel, as in every deep-learning library.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinygrad_bn.backend import array_module, float32, is_floating
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.op import op
from tinygrad_bn.ops.reduction import sum as sum_
from tinygrad_bn.windows import Pair, Windows, windows

Shape = tuple[int, ...]

#: (shape of x, of weight, options): strides that leave a rest, rectangles, groups, both layouts.
_CASES: tuple[tuple[Shape, Shape, dict[str, Any]], ...] = (
    ((2, 2, 5, 4), (3, 2, 3, 2), {}),
    ((2, 5, 4, 2), (3, 2, 3, 2), {"layout": "NHWC"}),
    ((1, 2, 4, 3), (2, 2, 1, 1), {}),
    ((2, 3, 6, 7), (2, 3, 3, 3), {"stride": 2, "padding": 1}),
    ((1, 6, 7, 2), (2, 2, 2, 3), {"stride": (2, 3), "padding": (0, 2), "layout": "NHWC"}),
    ((1, 2, 7, 6), (2, 2, 2, 3), {"dilation": (3, 2), "padding": (1, 0)}),
    ((2, 4, 5, 4), (6, 2, 2, 2), {"groups": 2}),
    ((2, 4, 5, 3), (3, 1, 2, 2), {"groups": 3, "layout": "NHWC", "padding": 1, "stride": 3}),
    ((1, 1, 3, 3), (1, 1, 3, 3), {"bias": True}),
    ((2, 5, 4, 2), (3, 2, 3, 2), {"bias": True, "layout": "NHWC"}),
)


def _forward_cases() -> Iterator[Any]:
    for x, weight, options in _CASES:
        options = dict(options)
        bias = (weight[0],) if options.pop("bias", False) else None
        yield case(x, weight, bias, **options)


def _transpose_cases(option: str) -> Iterator[Any]:
    """Yield the cases of a transpose: one input's shape is replaced by the output's."""
    for x, weight, options in _CASES:
        options = {key: value for key, value in options.items() if key != "bias"}
        sizes = {key: value for key, value in options.items() if key not in ("groups", "layout")}
        y = windows("case", x, weight[2:], options.get("layout", "NCHW"), **sizes).shape(weight[0])
        if option == "input_shape":
            yield case(y, weight, input_shape=x, **options)
        else:
            yield case(x, y, kernel_size=weight[2:], **options)


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


def _checked(
    name: str, x_shape: Shape, weight_shape: Shape, groups: int, layout: str, **sizes: Pair
) -> Windows:
    """Return the windows of a convolution; ValueError that says which sizes do not fit."""
    if len(weight_shape) != 4:
        raise ValueError(
            f"{name}: weight has shape {weight_shape}, expected (O, C/groups, KH, KW) in every layout"
        )
    view = windows(name, x_shape, weight_shape[2:], layout, **sizes)
    outputs, channels = weight_shape[:2]
    if not isinstance(groups, int) or groups < 1 or view.channels % groups or outputs % groups:
        raise ValueError(
            f"{name}: groups={groups!r} must be a positive integer that divides both the "
            f"{view.channels} input channels and the {outputs} output channels"
        )
    if view.channels != channels * groups:
        raise ValueError(
            f"{name}: the input {x_shape} has {view.channels} channels in layout {layout}, but "
            f"weight {weight_shape} with groups={groups} expects {channels * groups}; check the "
            f"layout, or make weight {(outputs, view.channels // groups, *weight_shape[2:])}"
        )
    return view


def _check_output(name: str, y_shape: Shape, expected: Shape) -> None:
    if y_shape != expected:
        raise ValueError(
            f"{name}: y has shape {y_shape}, but a convolution of these sizes gives {expected}; "
            f"pass a y of that shape"
        )


# --- the ops -----------------------------------------------------------------------------------


@op(domain=Domain((Real(), Real(), Real()), tuple(_forward_cases())))
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
    Returns (N, O, OH, OW) or (N, OH, OW, O), OH = ⌊(H + 2 padding - dilation (KH - 1) - 1) / stride⌋ + 1,
    in the inputs' dtype; float16 is summed in float32 and rounded once.

    Raises ValueError for sizes that do not fit together, before anything is computed.
    """
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    view = _checked("conv2d", x.shape, weight.shape, groups, layout, **sizes)
    outputs = weight.shape[0]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(
            f"conv2d: bias has shape {bias.shape}, expected {(outputs,)}, one value for each of "
            f"weight's output channels"
        )
    dtype, work = working_dtype(x, weight, bias)
    xp = array_module(x)
    images = padded(channels_last(x, layout).astype(work, copy=False), view)
    matrices = _weight_matrices(weight.astype(work, copy=False), groups)
    y = xp.zeros((groups, view.positions, outputs // groups), dtype=work)
    for i, j, window in view.offsets():
        y += _by_group(images[:, *window], groups) @ matrices[i, j]
    y = _from_groups(y, (view.batch, *view.out))
    if bias is not None:
        y = y + bias
    return from_channels_last(y.astype(dtype, copy=False), layout)


@op(domain=Domain((Real(), Real()), tuple(_transpose_cases("input_shape"))))
def conv2d_input_grad(
    y: Any,
    weight: Any,
    *,
    input_shape: Shape,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    layout: str = "NCHW",
) -> Any:
    """Return the x of `input_shape` with ⟨x, x'⟩ = ⟨y, conv2d(x', weight)⟩ for all x'.

    It is known as the transposed convolution. y: what `conv2d` of an input of `input_shape` would
    have as shape; the rest as in `conv2d`.
    """
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    view = _checked("conv2d_input_grad", input_shape, weight.shape, groups, layout, **sizes)
    _check_output("conv2d_input_grad", y.shape, view.shape(weight.shape[0]))
    dtype, work = working_dtype(y, weight)
    xp = array_module(y)
    y = _by_group(channels_last(y, layout).astype(work, copy=False), groups)
    matrices = _weight_matrices(weight.astype(work, copy=False), groups).transpose((0, 1, 2, 4, 3))
    images = xp.zeros((view.batch, *view.padded, view.channels), dtype=work)
    for i, j, window in view.offsets():
        images[:, *window] += _from_groups(y @ matrices[i, j], (view.batch, *view.out))
    return from_channels_last(cropped(images, view).astype(dtype, copy=False), layout)


@op(domain=Domain((Real(), Real()), tuple(_transpose_cases("kernel_size"))))
def conv2d_weight_grad(
    x: Any,
    y: Any,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    layout: str = "NCHW",
) -> Any:
    """Return the W with ⟨W, W'⟩ = ⟨y, conv2d(x, W')⟩ for all W'.

    x, y: an input and an output of `conv2d`. Returns (O, C/groups, *kernel_size).
    """
    name = "conv2d_weight_grad"
    view = windows(name, x.shape, kernel_size, layout, stride, padding, dilation)
    outputs = y.shape[view.axes[3]] if y.ndim == 4 else 0
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    weight_shape = (outputs, view.channels // groups, *view.kernel)
    _checked(name, x.shape, weight_shape, groups, layout, **sizes)
    _check_output(name, y.shape, view.shape(outputs))
    dtype, work = working_dtype(x, y)
    xp = array_module(x)
    images = padded(channels_last(x, layout).astype(work, copy=False), view)
    y = _by_group(channels_last(y, layout).astype(work, copy=False), groups)
    per_group = (groups, view.channels // groups, outputs // groups)
    matrices = xp.empty((*view.kernel, *per_group), dtype=work)
    for i, j, window in view.offsets():
        matrices[i, j] = _by_group(images[:, *window], groups).transpose((0, 2, 1)) @ y
    weight = matrices.transpose((2, 4, 3, 0, 1)).reshape(weight_shape)
    return xp.ascontiguousarray(weight.astype(dtype, copy=False))


# --- their derivatives: each is one of the other two -------------------------------------------


def _conv2d_vjp_x(
    g: Any, weight: Any, x_shape: Shape, stride: Pair, padding: Pair, dilation: Pair, groups: int, layout: str
) -> Any:
    return conv2d_input_grad(
        g, weight, input_shape=x_shape,
        stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout,
    )  # fmt: skip


def _conv2d_vjp_weight(
    g: Any, x: Any, weight_shape: Shape, stride: Pair, padding: Pair, dilation: Pair, groups: int, layout: str
) -> Any:
    return conv2d_weight_grad(
        x, g, kernel_size=weight_shape[2:],
        stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout,
    )  # fmt: skip


def _conv2d_vjp_bias(g: Any, layout: str) -> Any:
    return sum_(g, axis=(0, 1, 2) if layout == "NHWC" else (0, 2, 3))


conv2d.def_vjp(x=_conv2d_vjp_x, weight=_conv2d_vjp_weight, bias=_conv2d_vjp_bias)


def _input_grad_vjp_y(
    g: Any, weight: Any, stride: Pair, padding: Pair, dilation: Pair, groups: int, layout: str
) -> Any:
    return conv2d(
        g, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout
    )


def _input_grad_vjp_weight(
    g: Any, y: Any, weight_shape: Shape, stride: Pair, padding: Pair, dilation: Pair, groups: int, layout: str
) -> Any:
    return conv2d_weight_grad(
        g, y, kernel_size=weight_shape[2:],
        stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout,
    )  # fmt: skip


conv2d_input_grad.def_vjp(y=_input_grad_vjp_y, weight=_input_grad_vjp_weight)


def _weight_grad_vjp_x(
    g: Any, y: Any, x_shape: Shape, stride: Pair, padding: Pair, dilation: Pair, groups: int, layout: str
) -> Any:
    return conv2d_input_grad(
        y, g, input_shape=x_shape,
        stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout,
    )  # fmt: skip


def _weight_grad_vjp_y(
    g: Any, x: Any, stride: Pair, padding: Pair, dilation: Pair, groups: int, layout: str
) -> Any:
    return conv2d(
        x, g, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout
    )


conv2d_weight_grad.def_vjp(x=_weight_grad_vjp_x, y=_weight_grad_vjp_y)
