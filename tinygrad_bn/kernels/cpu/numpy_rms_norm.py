"""RMS norm in NumPy: layer norm's rows with their means left in."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import saving
from tinygrad_bn.kernels.cpu.numpy_layer_norm import normalize_rows, pull_back_rows
from tinygrad_bn.kernels.cpu.rows import Array, Axes


def forward(
    x: Array, weight: Array | None = None, *, axis: Axes, channels: Axes, eps: float
) -> Any:
    """Return what `ops.normalization.rms_norm` returns, or NotImplemented."""
    normalized = normalize_rows(x, weight, None, axis, channels, eps, centred=False)
    if normalized is None:
        return NotImplemented
    out, _, square = normalized
    return saving(out, square=square)


def vjp(
    g: Array,
    x: Array,
    weight: Array | None,
    square: Array,
    axis: Axes,
    channels: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.normalization.rms_norm` returns, or NotImplemented."""
    grads = pull_back_rows(g, x, weight, None, square, axis, channels, eps, needs)
    return NotImplemented if grads is None else grads
