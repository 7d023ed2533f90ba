"""Cases for convolutions and pools, and what they are by definition: loops, in float64."""

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st


class Conv(NamedTuple):
    x: np.ndarray  # (N, C, H, W) or (N, H, W, C)
    weight: np.ndarray
    bias: np.ndarray | None
    y: np.ndarray  # a cotangent
    options: dict[str, Any]


def to_layout(x, layout):
    """Return images (N, C, H, W) in `layout`, in C order."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if layout == "NHWC" else x


def to_nchw(x, layout):
    return x.transpose(0, 3, 1, 2) if layout == "NHWC" else x


def out_size(size, kernel, stride, padding, dilation=1):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@st.composite
def convolutions(draw, dtype=np.float64, most=3, most_groups=3):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = lambda low, high: st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731
    kernel, stride, dilation = draw(pairs(1, 3)), draw(pairs(1, 3)), draw(pairs(1, 2))
    padding, extra = draw(pairs(0, 2)), draw(pairs(0, 3))
    # As small as fits the kernel, and up to three more: strides that leave a rest come up.
    h, w = (
        max(1, d * (k - 1) + 1 - 2 * p) + e
        for k, d, p, e in zip(kernel, dilation, padding, extra, strict=True)
    )
    groups, per_group = draw(st.integers(1, most_groups)), draw(pairs(1, most))
    batch = draw(st.integers(1, most))
    layout = draw(st.sampled_from(["NCHW", "NHWC"]))
    x = rng.normal(size=(batch, groups * per_group[0], h, w)).astype(dtype)
    weight = rng.normal(size=(groups * per_group[1], per_group[0], *kernel)).astype(dtype)
    bias = rng.normal(size=len(weight)).astype(dtype) if draw(st.booleans()) else None
    size = [out_size(*s) for s in zip((h, w), kernel, stride, padding, dilation, strict=True)]
    y = rng.normal(size=(batch, len(weight), *size)).astype(dtype)
    options = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "layout": layout,
    }  # fmt: skip
    return Conv(to_layout(x, layout), weight, bias, to_layout(y, layout), options)


def naive_conv2d(x, weight, bias, *, stride, padding, dilation, groups, layout):
    x = to_nchw(x, layout).astype(np.float64)
    weight = weight.astype(np.float64)
    outputs, per_group, kh, kw = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    oh = out_size(x.shape[2], kh, stride[0], 0, dilation[0])
    ow = out_size(x.shape[3], kw, stride[1], 0, dilation[1])
    y = np.zeros((len(x), outputs, oh, ow))
    for n, o, i, j in np.ndindex(y.shape):
        group = o // (outputs // groups)
        for c, a, b in np.ndindex(per_group, kh, kw):
            row, column = i * stride[0] + a * dilation[0], j * stride[1] + b * dilation[1]
            y[n, o, i, j] += x[n, group * per_group + c, row, column] * weight[o, c, a, b]
        if bias is not None:
            y[n, o, i, j] += bias[o]
    return to_layout(y, layout)


class Pool(NamedTuple):
    x: np.ndarray
    y: np.ndarray  # a cotangent
    options: dict[str, Any]


@st.composite
def pools(draw, dtype=np.float64, values=None, most=3):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pairs = lambda low, high: st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731
    kernel, stride, extra = draw(pairs(1, 3)), draw(pairs(1, 4)), draw(pairs(0, 4))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    h, w = (max(1, k - 2 * p) + e for k, p, e in zip(kernel, padding, extra, strict=True))
    shape = (draw(st.integers(1, most)), draw(st.integers(1, most)), h, w)
    layout = draw(st.sampled_from(["NCHW", "NHWC"]))
    x = rng.normal(size=shape) if values is None else rng.choice(values, size=shape)
    size = [out_size(*s) for s in zip((h, w), kernel, stride, padding, strict=True)]
    y = rng.normal(size=(*shape[:2], *size))
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "layout": layout}
    return Pool(to_layout(x.astype(dtype), layout), to_layout(y.astype(dtype), layout), options)


def windows_of(x, *, kernel_size, stride, padding, layout):
    """Yield (index of the output, the window's entries as [(index in x, value)]), both NCHW."""
    x = to_nchw(x, layout)
    sizes = zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    oh, ow = (out_size(*s) for s in sizes)
    for n, c, i, j in np.ndindex(*x.shape[:2], oh, ow):
        entries = []
        for a, b in np.ndindex(*kernel_size):
            row, column = i * stride[0] + a - padding[0], j * stride[1] + b - padding[1]
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                entries.append(((n, c, row, column), x[n, c, row, column]))
        yield (n, c, i, j), entries
