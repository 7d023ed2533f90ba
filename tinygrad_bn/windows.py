"""Sliding windows over images, as plain integers: which entries a convolution or a pool looks at.

Everything that can be wrong with a kernel size, a stride or a padding is refused here, before
anything is computed. Nothing here touches an array; the generic ops and their fused kernels read
the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import index
from typing import NamedTuple

Pair = int | Sequence[int]

#: Layout -> the axes of batch, height, width, channels.
LAYOUTS = {"NCHW": (0, 2, 3, 1), "NHWC": (0, 1, 2, 3)}


class Windows(NamedTuple):
    """The sizes of an image batch and of the windows that slide over it; pairs are (rows, columns).

    padded: the size of an image with its padding. out: how many windows fit. groups: into how many
    parts a convolution splits the channels.
    """

    layout: str
    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    padded: tuple[int, int]
    out: tuple[int, int]
    groups: int = 1

    @property
    def axes(self) -> tuple[int, int, int, int]:
        """The axes of batch, height, width and channels."""
        return LAYOUTS[self.layout]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the image batch."""
        if self.layout == "NHWC":
            return (self.batch, *self.size, self.channels)
        return (self.batch, self.channels, *self.size)

    @property
    def positions(self) -> int:
        """How many windows there are in the whole batch."""
        return self.batch * self.out[0] * self.out[1]

    @property
    def place_dtype(self) -> str:
        """The smallest dtype that numbers the entries of a window."""
        size = self.kernel[0] * self.kernel[1]
        return "uint8" if size <= 2**8 else "uint16" if size <= 2**16 else "int32"

    def first_places(self) -> list[list[int]]:
        """Return, for each row and column of windows, the first place that is not padding."""
        rows, columns = (
            [max(p - s * k, 0) for k in range(n)]
            for p, s, n in zip(self.padding, self.stride, self.out, strict=True)
        )
        return [[i * self.kernel[1] + j for j in columns] for i in rows]

    def out_shape(self, channels: int) -> tuple[int, int, int, int]:
        """Return the shape of an output with `channels` channels, in this layout.

        >>> windows("pool", (8, 28, 28, 3), (2, 2), "NHWC", stride=2).out_shape(3)
        (8, 14, 14, 3)
        """
        if self.layout == "NHWC":
            return (self.batch, *self.out, channels)
        return (self.batch, channels, *self.out)

    def offsets(self) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
        """Yield (i, j, slices): row i and column j of every window, as slices of a padded image."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                rows, columns = (
                    slice(k * d, k * d + n * s, s)
                    for k, d, n, s in zip((i, j), self.dilation, self.out, self.stride, strict=True)
                )
                yield i, j, (rows, columns)


def pair(name: str, what: str, value: Pair, least: int) -> tuple[int, int]:
    """Return `value` as (rows, columns), each at least `least`; ValueError if it is no such pair.

    >>> pair("conv2d", "stride", 2, 1)
    (2, 2)
    """
    both = value if isinstance(value, Sequence) else (value, value)
    try:
        rows, columns = map(index, both)
    except (TypeError, ValueError):
        rows = columns = least - 1
    if rows < least or columns < least:
        raise ValueError(
            f"{name}: {what} is {value!r}; expected an integer >= {least} or a pair of them, "
            f"(rows, columns)"
        )
    return rows, columns


def windows(
    name: str,
    shape: Sequence[int],
    kernel: Pair,
    layout: str,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
) -> Windows:
    """Return the windows of size `kernel` over images of `shape`.

    name: what the messages call the caller.
    shape: (N, C, H, W) or (N, H, W, C), as `layout` says.

    out = floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1

    Raises ValueError for another rank, an unknown layout, and a kernel larger than a padded image.

    >>> windows("conv2d", (1, 3, 28, 28), (5, 5), "NCHW").out
    (24, 24)
    """
    return _windows(
        name,
        tuple(shape),
        layout,
        pair(name, "the kernel size", kernel, 1),
        pair(name, "stride", stride, 1),
        pair(name, "padding", padding, 0),
        pair(name, "dilation", dilation, 1),
    )


@lru_cache(maxsize=1024)
def _windows(
    name: str,
    shape: tuple[int, ...],
    layout: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Windows:
    if layout not in LAYOUTS:
        raise ValueError(f"{name}: unknown layout {layout!r}; expected one of {sorted(LAYOUTS)}")
    if len(shape) != 4:
        raise ValueError(
            f"{name}: the input has shape {shape}, of {len(shape)} axes; expected 4, "
            f"({', '.join(layout)}); for a single image add a batch axis with x[None]"
        )
    batch, height, width, channels = (shape[axis] for axis in LAYOUTS[layout])
    padded = (height + 2 * padding[0], width + 2 * padding[1])
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    if spans[0] > padded[0] or spans[1] > padded[1]:
        raise ValueError(
            f"{name}: a kernel of {kernel} with dilation {dilation} spans {spans} entries, but the "
            f"images in {shape} are {(height, width)} in layout {layout} and {padded} with padding "
            f"{padding}; use a smaller kernel or more padding, or check the layout"
        )
    out = tuple((p - s) // step + 1 for p, s, step in zip(padded, spans, stride, strict=True))
    return Windows(
        layout, batch, channels, (height, width), kernel, stride, padding, dilation, padded,
        (out[0], out[1]),
    )  # fmt: skip


def convolution_windows(
    shape: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    layout: str = "NCHW",
) -> Windows:
    """Return the windows of a `conv2d` of images of `shape` with `weight` (O, C/groups, KH, KW).

    Raises ValueError that says which sizes do not fit together, and what would.
    """
    weight = tuple(weight)
    if len(weight) != 4:
        raise ValueError(
            f"conv2d: weight has shape {weight}, of {len(weight)} axes; expected 4, "
            f"(O, C/groups, KH, KW), in every layout"
        )
    view = windows("conv2d", shape, weight[2:], layout, stride, padding, dilation)
    outputs, channels = weight[:2]
    asked = groups
    try:
        groups = index(groups)
    except TypeError:
        groups = 0
    if groups < 1 or view.channels % groups or outputs % groups:
        raise ValueError(
            f"conv2d: groups={asked!r} must be a positive integer that divides both the "
            f"{view.channels} input channels and the {outputs} output channels"
        )
    if view.channels != channels * groups:
        raise ValueError(
            f"conv2d: the input {tuple(shape)} has {view.channels} channels in layout {layout}, "
            f"but weight {weight} with groups={groups} expects {channels * groups}; check the "
            f"layout, or make weight {(outputs, view.channels // groups, *weight[2:])}"
        )
    if bias is not None and tuple(bias) != (outputs,):
        raise ValueError(
            f"conv2d: bias has shape {tuple(bias)}, expected {(outputs,)}, one value for each "
            f"output channel of weight {weight}"
        )
    return view if groups == 1 else view._replace(groups=groups)


def pool_windows(
    name: str,
    shape: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    layout: str = "NCHW",
) -> Windows:
    """Return the windows of a pool; stride None is the kernel size.

    Raises ValueError, besides for what `windows` refuses, if a window could lie in the padding
    alone.
    """
    stride = kernel_size if stride is None else stride
    view = windows(name, shape, kernel_size, layout, stride, padding)
    if view.padding[0] >= view.kernel[0] or view.padding[1] >= view.kernel[1]:
        raise ValueError(
            f"{name}: padding {view.padding} must be smaller than the kernel size {view.kernel}, "
            f"or some windows would hold nothing but padding; pad x beforehand if that is meant"
        )
    return view
