"""What `verify_batch_norm` asks of a batch norm in training: values, gradients, running state.

A check is a function of a candidate and one drawn batch; it raises GradCheckError. What "right"
means, and how far from it is still right, is in `batch_norm_reference`.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np

from tinygrad_bn.tape import TensorBase
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.batch_norm_candidate import Candidate, Pass
from tinygrad_bn.testing.batch_norm_reference import (
    WIDE,
    Expected,
    excess,
    expected,
    statistic_excess,
)
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.layouts import LAYOUTS

#: The layouts up to here hold the same values.
_KEEPING = sum(layout.keeps_values for layout in LAYOUTS)

NAMES = {
    "y": "the output",
    "gx": "the gradient of x",
    "gweight": "the gradient of weight",
    "gbias": "the gradient of bias",
}


def want(d: Any, **options: Any) -> Expected:
    """Return the reference's answer for drawn inputs."""
    chosen = {"eps": d.eps, "axis": d.axis, **options}
    return expected(d.x, d.weight, d.bias, d.cotangent, **chosen)


def require(right: Expected, **got: np.ndarray) -> None:
    """Raise GradCheckError unless each named result is as near to the reference as it must be."""
    for name, value in got.items():
        over, where = excess(name, value, right)
        if not over <= 1:
            raise GradCheckError(
                f"{NAMES[name]} is wrong {where} (longdouble reference): {over:.3g} times as far "
                f"off as rounding explains in {value.dtype}"
            )


def one_of(n: int, d: Any) -> int:
    """Return a number below n that depends on the batch alone: a variant for a check to take."""
    return zlib.crc32(d.cotangent.tobytes()) % n


def forward(candidate: Candidate, d: Any) -> None:
    """The output in training, against the formula; x's dtype and shape."""
    require(want(d), y=Pass(candidate, d).y)


def gradients(candidate: Candidate, d: Any) -> None:
    """The gradients of x, weight and bias in training, whichever of them are asked for."""
    # All together mostly; a rule may also be asked for one alone.
    alone = {0: (True, False, False), 1: (False, True, False), 2: (False, False, True)}
    every = (True, True, True)
    lacking = d.weight is None or d.bias is None
    chosen = every if lacking else alone.get(one_of(6, d), every)
    require(want(d), **Pass(candidate, d, needs=chosen).gradients())


def state(candidate: Candidate, d: Any) -> None:
    """The running statistics: r ← (1 - momentum) r + momentum · new, in place, once a call."""
    right = want(d)
    features: dict[str, Any] = {}
    corrections = [1]
    if "correction" in candidate.takes:
        corrections = [None, 0, 1]
    correction = corrections[one_of(len(corrections), d)]
    if correction is not None and "correction" in candidate.takes:
        features["correction"] = correction
    m = d.count
    unbiased = right.var * (WIDE(m) / (m - (1 if correction is None else correction)))
    wanted = _moved(d, right.mean, unbiased)
    arrays = _state_arrays(d)
    before = [a.copy() for a in arrays]
    # As Tensors or as arrays, of which the candidate may get views with gaps.
    running: Any = tuple(Tensor(a) for a in arrays) if one_of(2, d) else tuple(arrays)
    done = Pass(candidate, d, running=running, **features)
    _require_state(d, arrays, wanted, before, right, "after one call")
    for s in running:
        if isinstance(s, TensorBase) and s.requires_grad:
            raise GradCheckError("the running statistics require grad now; they hold on to a graph")
    require(right, y=done.y)
    kept = [a.copy() for a in arrays]
    require(right, **done.gradients())
    for name, a, b in zip(("running_mean", "running_var"), arrays, kept, strict=True):
        if not np.array_equal(a, b):
            raise GradCheckError(f"{name} was moved again by the backward pass")
    second = replace(d, running_mean=kept[0], running_var=kept[1])
    Pass(candidate, second, running=running, **features)
    wanted = _moved(second, right.mean, unbiased)
    _require_state(second, arrays, wanted, kept, right, "after a second call")


def _state_arrays(d: Any) -> list[np.ndarray]:
    """Return copies of the running statistics: every other entry of a wider array."""
    wide = [np.repeat(a, 2) for a in (d.running_mean, d.running_var)]
    return [a[::2] for a in wide]


def _moved(d: Any, mean: np.ndarray, var: np.ndarray) -> list[np.ndarray]:
    momentum = WIDE(d.momentum)
    pairs = ((d.running_mean, mean), (d.running_var, var))
    return [(1 - momentum) * old.astype(WIDE) + momentum * new for old, new in pairs]


def _require_state(
    d: Any,
    arrays: list[np.ndarray],
    wanted: list[np.ndarray],
    before: list[np.ndarray],
    right: Expected,
    when: str,
) -> None:
    sizes = (right.scales["mean"], right.scales["var"])
    for name, a, w, old, size in zip(
        ("running_mean", "running_var"), arrays, wanted, before, sizes, strict=True
    ):
        scale = np.abs(old.astype(WIDE)) + size
        over, where = statistic_excess(a, w, scale)
        if not over <= 1:
            still = d.momentum > 0 and np.array_equal(a, old)
            hint = "; it was not written to in place" if still else ""
            raise GradCheckError(
                f"{name} {when} is wrong {where} (it was {old.tolist()}, momentum {d.momentum} "
                f"weights the new value){hint}"
            )


def without_state(candidate: Candidate, d: Any) -> None:
    """Without running statistics the batch's are used, in training or not."""
    require(want(d), y=(done := Pass(candidate, d, training=False)).y, **done.gradients())


def constant(candidate: Candidate, d: Any) -> None:
    """Constant channels give exactly beta; one value per channel has no variance and is refused."""
    if d.count == 1:
        arrays = [d.running_mean.copy(), d.running_var.copy()]
        try:
            Pass(candidate, d, running=(Tensor(arrays[0]), Tensor(arrays[1])))
        except ValueError:
            if np.array_equal(arrays[0], d.running_mean):
                return
            raise GradCheckError("a batch that was refused moved running_mean") from None
        raise GradCheckError(
            "x with one value per channel was accepted in training; its variance is 0 whatever it "
            "is: raise ValueError"
        )
    done = Pass(candidate, d)
    x = np.moveaxis(d.x, d.axis, 0).reshape(d.channels, -1)
    y = np.moveaxis(done.y, d.axis, 0).reshape(d.channels, -1)
    for c in np.flatnonzero(np.ptp(x, axis=1) == 0):
        beta = 0.0 if d.bias is None else d.bias[c]
        if not (y[c] == beta).all():
            raise GradCheckError(
                f"channel {c} is constant ({x[c, 0]:.9g}) and gives {y[c].tolist()!r:.60}, "
                f"expected exactly beta, {float(beta):.9g}"
            )
    require(want(d), y=done.y, **done.gradients())


def nan(candidate: Candidate, d: Any) -> None:
    """A NaN or an infinity stays in the channel it came in, which it fills with NaN."""
    for value in (np.nan, np.inf):
        x = d.x.copy()
        last = np.moveaxis(x, d.axis, 0)[-1]
        last[(0,) * last.ndim] = value
        _require_nan_in_last_channel(candidate, replace(d, x=x))


def _require_nan_in_last_channel(candidate: Candidate, d: Any) -> None:
    done = Pass(candidate, d, running=True)
    got = {"y": done.y, **done.gradients()}
    right = want(d)
    for name, value in got.items():
        bad = np.isnan(np.moveaxis(value, d.axis, 0) if value.ndim > 1 else value)
        if bad[:-1].any():
            raise GradCheckError(f"{NAMES[name]} has NaN in channels without any in x")
        if name != "gbias" and not bad[-1].all():
            raise GradCheckError(f"{NAMES[name]} hides a NaN of x: its channel must be NaN")
    require(right, **got)
    if np.isnan(done.state[0][:-1]).any() or np.isnan(done.state[1][:-1]).any():
        raise GradCheckError("a NaN in one channel reached the running statistics of another")


def empty(candidate: Candidate, d: Any) -> None:
    """An empty batch gives an empty result, zero gradients, and moves nothing."""
    axis = d.reduced_axes[0]
    nothing = replace(d, x=d.x.take([], axis), cotangent=d.cotangent.take([], axis))
    done = Pass(candidate, nothing, running=True)
    for name, value in done.gradients().items():
        if value.size and not (value == 0).all():
            raise GradCheckError(f"{NAMES[name]} of an empty batch is {value.tolist()}, expected 0")
    for name, after in zip(("running_mean", "running_var"), done.state, strict=True):
        if not np.array_equal(after, getattr(d, name)):
            raise GradCheckError(f"an empty batch moved {name} to {after.tolist()}")


def magnitudes(candidate: Candidate, d: Any) -> None:
    """x so large or small that its squares leave float32, with eps to match."""
    k = 100 if d.x.flat[0] > 0 else -100
    forward(candidate, d := replace(d, x=np.ldexp(d.x, k), eps=d.eps * 4.0**k))
    gradients(candidate, d)


def large(candidate: Candidate, d: Any) -> None:
    """Thousands of values, in some layout: what fused kernels serve."""
    layout = LAYOUTS[one_of(_KEEPING, d)]
    # The layout is of the array that a Tensor wraps; the reference does not mind it.
    state(candidate, replace(d, x=layout(d.x), cotangent=layout(d.cotangent)))


def mixed_dtypes(candidate: Candidate, d: Any) -> None:
    """Half precision x with float32 vectors: y as x, statistics in full, gradients as inputs."""
    vectors = ("weight", "bias", "running_mean", "running_var")
    wide = {n: getattr(d, n).astype(np.float32) for n in vectors if getattr(d, n) is not None}
    state(candidate, replace(d, **wide))
