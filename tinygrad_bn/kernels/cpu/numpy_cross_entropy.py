"""`cross_entropy` of matrices of logits: a few rows at a time, in cache, on several threads.

Each row is computed by the operations of the generic form, and the losses are added up at the end
as there, so the bits are its.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_bn.backend import extremes, saving
from tinygrad_bn.kernels.cpu import memory, threads

Array = Any

# Entries of a piece: of logits, of their logarithms and of a scratch copy; all stay in cache.
PIECE = 1 << 16
# Below this many entries the threads cost more than they save.
SMALLEST = 1 << 15
_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def forward(logits: Array, target: Array, *, reduction: str = "mean") -> Any:
    """Return what `ops.loss.cross_entropy` returns, or NotImplemented."""
    if not _serves(logits, target) or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    count, classes = logits.shape
    labels = target.ndim == 1
    if labels:
        range_ = extremes(target)
        if range_ is None or not 0 <= range_[0] <= range_[1] < classes:
            return NotImplemented  # the generic form says what is wrong
    logs, losses = memory.empty(logits.shape, logits.dtype), np.empty(count, logits.dtype)

    def work(rows: slice) -> None:
        logs_, target_ = logs[rows], target[rows]
        np.subtract(logits[rows], logits[rows].max(axis=1, keepdims=True), out=logs_)
        wide = threads.scratch("cross_entropy", logs_.shape, logs.dtype)
        np.exp(logs_, out=wide)
        logs_ -= np.log(wide.sum(axis=1, keepdims=True))
        if labels:
            np.negative(logs_[np.arange(len(logs_)), target_], out=losses[rows])
        else:
            # A target of 0 may meet a logarithm of -inf.
            wide.fill(0)
            np.multiply(target_, logs_, out=wide, where=target_ != 0)
            np.negative(wide.sum(axis=1), out=losses[rows])

    _for_rows(work, logits)
    return saving(_reduced(losses, reduction), logs=logs)


def vjp(
    g: Array, logits: Array, target: Array, logs: Array, reduction: str, needs: tuple[bool, ...]
) -> Any:
    """Return what the rule of `ops.loss.cross_entropy` returns, or NotImplemented."""
    if not _serves(logits, target) or logs is None or g.dtype != logits.dtype:
        return NotImplemented
    return _gradients(g, target, logs, reduction, needs)


def _gradients(
    g: Array, target: Array, logs: Array, reduction: str, needs: tuple[bool, ...]
) -> tuple[Array | None, Array | None]:
    labels = target.ndim == 1
    if reduction == "mean":
        g = g / len(logs)
    g = np.broadcast_to(g.reshape(-1, 1), (len(logs), 1))
    glogits = memory.empty(logs.shape, logs.dtype) if needs[0] else None
    gtarget = memory.empty(logs.shape, logs.dtype) if needs[1] and not labels else None

    def work(rows: slice) -> None:
        target_, g_ = target[rows], g[rows]
        if glogits is not None:
            out = glogits[rows]
            np.exp(logs[rows], out=out)
            if labels:
                out[np.arange(len(out)), target_] -= 1
            else:
                out *= target_.sum(axis=1, keepdims=True)
                out -= target_
            out *= g_
        if gtarget is not None:
            np.negative(logs[rows], out=gtarget[rows])
            gtarget[rows] *= g_

    _for_rows(work, logs)
    return glogits, gtarget


def _serves(logits: Array, target: Array) -> bool:
    if logits.ndim != 2 or logits.size < SMALLEST or logits.dtype not in _DTYPES:
        return False
    if target.ndim == 1:
        return target.shape == logits.shape[:1] and target.dtype.kind in "iu"
    return target.shape == logits.shape and target.dtype == logits.dtype


def _for_rows(work: Callable[[slice], None], logits: Array) -> None:
    """Run `work` for all rows, some at a time."""
    count, classes = logits.shape
    step = max(1, PIECE // classes)
    threads.parallel(lambda i: work(slice(i * step, (i + 1) * step)), math.ceil(count / step))


def _reduced(losses: Array, reduction: str) -> Array:
    if reduction == "none":
        return losses
    total = np.asarray(losses.sum())
    return np.asarray(total / losses.size) if reduction == "mean" else total
