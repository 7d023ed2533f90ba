"""What `verify_batch_norm` asks of masks, ghost batches and several channel axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tinygrad_bn.autograd import grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.agreement import check_layouts
from tinygrad_bn.testing.batch_norm_candidate import Candidate, Pass, plain_function
from tinygrad_bn.testing.batch_norm_checks import one_of, require, want
from tinygrad_bn.testing.batch_norm_samples import sampled
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.gradients import check_double_grad


def masks(candidate: Candidate, d: Any) -> None:
    """A mask leaves values out, or counts them several times: y, gradients, running statistics."""
    _check(candidate, d, frequencies(d))


def groups(candidate: Candidate, d: Any) -> None:
    """Ghost batches are normalized each by itself; the state makes one step to their average."""
    _check(candidate, in_parts(d), None, 2)


def masked_groups(candidate: Candidate, d: Any) -> None:
    """A mask within ghost batches."""
    d = in_parts(d)
    _check(candidate, d, frequencies(d, 2), 2)


def too_few(candidate: Candidate, d: Any) -> None:
    """A batch or ghost batch of less than two values gives bias and moves no statistic; two do."""
    d = replace(d, momentum=d.momentum or 0.25)
    for few in range(3):
        _check(candidate, d, frequencies(d, 1, few))
        if "groups" in candidate.takes:
            both = in_parts(d)
            _check(candidate, both, frequencies(both, 2, few), 2)


def _check(candidate: Candidate, d: Any, frequency: Any, parts: int = 1) -> None:
    features: dict[str, Any] = {}
    if frequency is not None:
        # What does not count may be anything.
        filler = (np.nan, np.inf, 0.0)[one_of(3, d)]
        hidden = np.broadcast_to(frequency == 0, d.x.shape)
        d = replace(d, x=np.where(hidden, d.x.dtype.type(filler), d.x))
        features["mask"] = frequency
    if parts > 1:
        features["groups"] = parts
    correction = 1
    if "correction" in candidate.takes:
        features["correction"] = correction = one_of(2, d)
    right, step = sampled(d, frequency=frequency, groups=parts, correction=correction)
    done = Pass(candidate, d, running=True, **features)
    require(right, y=done.y, **done.gradients())
    what = "a mask" if parts == 1 else f"groups={parts}" + " and a mask" * (frequency is not None)
    before = (d.running_mean, d.running_var)
    step.require(before, done.state, d.momentum, f"after a call with {what}")


def second_order(candidate: Candidate, d: Any) -> None:
    """Gradients of the gradients with mask and ghost batches, whatever masked slots hold."""
    features: dict[str, Any] = {}
    if "groups" in candidate.takes:
        d, features["groups"] = in_parts(d), 2
    if "mask" in candidate.takes:
        features["mask"] = frequencies(d, features.get("groups", 1))
    given = [d.x, d.weight, d.bias]

    def fn(x: Any, weight: Any = None, bias: Any = None) -> Any:
        return candidate(x, None, weight, bias, training=True, eps=d.eps, axis=d.axis, **features)

    fn.__name__ = candidate.name
    check_double_grad(fn, *given, directions=1, cotangents=d.cotangent)
    if "mask" in features:
        hidden = np.broadcast_to(features["mask"] == 0, d.x.shape)
        spoilt = [np.where(hidden, np.nan, d.x), *given[1:]]
        for a, b in zip(_twice(fn, spoilt, d), _twice(fn, given, d), strict=True):
            if not np.array_equal(a, b):
                raise GradCheckError(
                    "the second derivative depends on what a masked slot holds: NaN there gives "
                    f"{a.ravel()[:4].tolist()}..., numbers give {b.ravel()[:4].tolist()}..."
                )


def masked_layouts(candidate: Candidate, d: Any) -> None:
    """Right, and the same however x lies in memory: a mask goes by its axes."""
    d = in_positions(d)
    mask = frequencies(d, whole=False)
    right, _ = sampled(d, frequency=mask)
    done = Pass(candidate, d, mask=mask)
    require(right, y=done.y, **done.gradients())
    check_layouts(plain_function(candidate, d, True, mask=mask), d.x, d.weight, d.bias)


def _twice(fn: Callable[..., Any], given: list[Any], d: Any) -> list[np.ndarray]:
    """Return the gradients of the sum of the squares of the gradients."""
    tensors = [None if a is None else Tensor(a.copy(), requires_grad=True) for a in given]
    wanted = [t for t in tensors if t is not None]
    first = grad(fn(*tensors), wanted, Tensor(d.cotangent), create_graph=True)
    second = grad(sum((g * g).sum() for g in first), wanted, allow_unused=True)
    return [g.numpy() for g in second if g is not None]


def several_axes(candidate: Candidate, d: Any) -> None:
    """Two channel axes, in any order and place, are one channel axis that was cut in two."""
    channels = d.channels
    # Two sizes that differ, and neither γ nor means alike: what changes places would not be seen.
    a = next(n for n in (2, 3, 1) if channels % n == 0)
    sizes = (a, channels // a)
    if d.weight is not None:
        d = replace(d, weight=np.linspace(-1.5, 1.25, channels).astype(d.weight.dtype))
    axis = d.axis % d.x.ndim
    along = tuple(channels if i == axis else 1 for i in range(d.x.ndim))
    apart = np.linspace(-1, 1, channels, dtype=d.x.dtype).reshape(along)
    d = replace(d, x=d.x + apart * np.abs(d.x).max())
    # Cut the channel axis, and sometimes carry its second part to the end.
    last = d.x.ndim if one_of(2, d) else axis + 1

    def cut(x: np.ndarray) -> np.ndarray:
        split = x.reshape((*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))
        return np.ascontiguousarray(np.moveaxis(split, axis + 1, last))

    def joined(y: np.ndarray) -> np.ndarray:
        return np.moveaxis(y, last, axis + 1).reshape(d.x.shape)

    def cut_all(d: Any, turned: bool) -> Any:
        named = ("weight", "bias", "running_mean", "running_var")
        vectors = {name: getattr(d, name) for name in named}
        vectors = {name: v if v is None else v.reshape(sizes) for name, v in vectors.items()}
        axes = (last - d.x.ndim - 1, axis) if turned else (axis, last)
        return replace(d, x=cut(d.x), cotangent=cut(d.cotangent), axis=axes, **vectors)

    running, bare = (d.running_mean, d.running_var), replace(d, weight=None, bias=None)
    turned = not one_of(3, d)
    wide = cut_all(d, turned)
    try:
        done = Pass(candidate, wide, running=True)
        found = done.gradients()
        vectors = {name: v.reshape(-1) for name, v in found.items() if name != "gx"}
        require(want(d), y=joined(done.y), gx=joined(found["gx"]), **vectors)
        after = [s.reshape(-1) for s in done.state]
        sampled(d)[1].require(running, after, d.momentum, "after a call")
        require(want(bare), y=joined(Pass(candidate, cut_all(bare, turned)).y))
        wide = cut_all(d, not turned)
        evaluated = Pass(candidate, wide, training=False, running=True)
        require(want(d, given=running), y=joined(evaluated.y))
    except GradCheckError as error:
        raise GradCheckError(f"with axis={wide.axis} of x {list(wide.x.shape)}: {error}") from None


def frequencies(d: Any, parts: int = 1, few: int | None = None, whole: bool = True) -> np.ndarray:
    """Return a mask for a batch: of samples or of single values; counts, booleans or weights.

    parts: into how many groups the batch will be cut; each is left at least two values that count.
    few: how many values one of the parts is left instead.
    whole: whether it may be one of samples.
    """
    rng = np.random.default_rng(d.x.size)
    kind = one_of(4, d)
    shape = [1 if i == d.axis % d.x.ndim else n for i, n in enumerate(d.x.shape)]
    if whole and kind % 2 and d.x.shape[0] >= 3 * parts:
        shape = [n if i == 0 else 1 for i, n in enumerate(shape)]
    often = rng.integers(0, 3, shape).astype(d.x.dtype)
    spoilt = one_of(parts, d) if few is not None else None
    for i, part in enumerate(np.split(often, parts)):
        values = part.reshape(-1)  # a view: the first axis was cut
        some = rng.permutation(values.size)[: few if i == spoilt else 2]
        if i == spoilt:
            values[:] = 0
        values[some] = 1 + values[some] % 2
    if kind == 0:
        return often > 0
    return often * d.x.dtype.type(0.75) if kind == 1 else often


def in_parts(d: Any) -> Any:
    """Return a batch of two parts that differ: x, and x turned round, stretched and shifted."""
    other = d.x[::-1].astype(np.float64) * 1.5
    other = (other + other.std()).astype(d.x.dtype)
    return replace(
        d,
        x=np.concatenate([d.x, other]),
        cotangent=np.concatenate([d.cotangent, d.cotangent * 0.5]),
    )


def in_positions(d: Any) -> Any:
    """Return a batch with one axis more, of three positions: x, turned round, and stretched."""

    def stacked(a: np.ndarray) -> np.ndarray:
        many = [a, a[::-1], (a.astype(np.float64) * 1.5).astype(a.dtype)]
        return np.stack(many, axis=1 if d.axis == -1 else a.ndim)

    return replace(d, x=stacked(d.x), cotangent=stacked(d.cotangent))
