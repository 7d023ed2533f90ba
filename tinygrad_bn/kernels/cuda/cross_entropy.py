"""Softmax cross-entropy on a GPU: launches of `cross_entropy.cu`.

Nothing here waits for the GPU: a label out of range, which nobody looks for unless `check_data` is
on, gives a loss of NaN.
"""

from __future__ import annotations

import math
from typing import Any

from tinygrad_bn.backend import array_module, extremes, saving
from tinygrad_bn.kernels.cuda import launch

#: Threads of a block, and what a launch can number.
THREADS, MOST_BLOCKS = 256, 2**31 - 1
_REDUCTIONS = ("mean", "sum", "none")


def forward(logits: Any, target: Any, *, reduction: str = "mean") -> Any:
    """Return what `ops.loss.cross_entropy` returns, or NotImplemented."""
    kind = _kind(logits, target)
    if kind is None or reduction not in _REDUCTIONS:
        return NotImplemented
    if kind:
        range_ = extremes(target)
        if range_ is not None and not 0 <= range_[0] <= range_[1] < logits.shape[1]:
            return NotImplemented  # the generic form says what is wrong
    xp = array_module(logits)
    positions, blocks = _blocks(logits)
    with launch.on_device_of(logits):
        logits, target = xp.ascontiguousarray(logits), xp.ascontiguousarray(target)
        work = "float64" if logits.dtype.name == "float64" else "float32"
        logs = xp.empty(logits.shape, work)
        losses = partials = None
        if reduction == "none":
            losses = xp.empty((logits.shape[0], *logits.shape[2:]), logits.dtype)
        else:
            partials = xp.empty((blocks,), "float64")
        arguments = (logits, target, kind, logs, losses, partials)
        _launch("log_likelihood", logits, *arguments)
        if partials is not None:
            losses = xp.empty((), logits.dtype)
            divisor = float(positions if reduction == "mean" else 1)
            shared = 8 * THREADS
            call = (partials, losses, blocks, divisor)
            _program(logits).launch("total_loss", 1, THREADS, shared, *call)
    return saving(losses, logs=logs)


def vjp(
    g: Any, logits: Any, target: Any, logs: Any, reduction: str, needs: tuple[bool, ...]
) -> Any:
    """Return what the rule of `ops.loss.cross_entropy` returns, or NotImplemented."""
    kind = _kind(logits, target)
    if kind is None or logs is None or g.dtype != logits.dtype or not logs.flags.c_contiguous:
        return NotImplemented
    xp = array_module(logits)
    positions, _ = _blocks(logits)
    with launch.on_device_of(logits):
        glogits, gtarget = (
            xp.empty(logits.shape, logits.dtype) if need and wanted else None
            for need, wanted in zip(needs, (True, kind == 0), strict=True)
        )
        g, target = xp.ascontiguousarray(g), xp.ascontiguousarray(target)
        divisor = float(positions if reduction == "mean" else 1)
        arguments = (g, int(reduction == "none"), logs, target, kind, glogits, gtarget, divisor)
        _launch("likelihood_gradient", logits, *arguments)
    return glogits, gtarget


def _kind(logits: Any, target: Any) -> int | None:
    """Return how kernels read the target, see `Target` in cross_entropy.cu; None if they do not."""
    shape = logits.shape
    if len(shape) < 2 or logits.dtype.name not in launch.ELEMENTS or not logits.size:
        return None
    if logits.size // THREADS > MOST_BLOCKS // 32:
        return None
    if target.shape == shape:
        return 0 if target.dtype == logits.dtype else None
    if target.shape != (shape[0], *shape[2:]) or target.dtype.kind not in "iu":
        return None
    return target.itemsize if target.dtype.kind == "u" else -target.itemsize


def _blocks(logits: Any) -> tuple[int, int]:
    """Return the positions of logits, and how many blocks see to them."""
    positions = logits.size // logits.shape[1]
    return positions, -(-positions * _lanes(logits) // THREADS)


def _lanes(logits: Any) -> int:
    return 32 if math.prod(logits.shape[2:]) == 1 else 1


def _program(logits: Any) -> launch.Program:
    element = launch.ELEMENTS[logits.dtype.name]
    return launch.program(
        "cross_entropy.cu", ELEMENT=element, LANES=_lanes(logits), THREADS=THREADS
    )


def _launch(name: str, logits: Any, *arguments: Any) -> None:
    positions, blocks = _blocks(logits)
    sizes = (positions, logits.shape[1], math.prod(logits.shape[2:]))
    _program(logits).launch(name, blocks, THREADS, 8 * THREADS, *arguments, *sizes)
