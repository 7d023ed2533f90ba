"""`conv2d` in chunks: the windows of a few images laid out in cache, times the weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu import memory
from tinygrad_bn.kernels.cpu.columns import Columns, chunks, pixels, serves, weight_matrix
from tinygrad_bn.kernels.cpu.threads import parallel
from tinygrad_bn.windows import convolution_windows

Array = Any


def forward(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Any:
    """Return what `ops.convolution.conv2d` returns, or NotImplemented."""
    if not serves(x, weight, bias):
        return NotImplemented
    view = convolution_windows(
        x.shape, weight.shape, None if bias is None else bias.shape, **options
    )
    outputs = weight.shape[0]
    if view.groups != 1 or not (view.positions and view.channels and outputs):
        return NotImplemented
    columns = Columns(x, view)
    matrix = weight_matrix(weight)
    y = memory.empty(view.out_shape(outputs), x.dtype)
    tasks = chunks(view, columns.row_bytes())

    def multiply(index: int) -> None:
        part = pixels(y, view, tasks[index])
        if view.layout == "NHWC":
            np.matmul(columns(tasks[index]), matrix, out=part)
        else:  # the transpose of both sides, so that the result lies in C order
            windows = columns(tasks[index]).transpose(0, 2, 1)
            np.matmul(matrix.T, windows, out=part.transpose(0, 2, 1))
        if bias is not None:
            part += bias

    parallel(multiply, len(tasks))
    return saving(y, view=view)
