"""What `verify_batch_norm` asks beyond one pass in training: evaluation, pending passes, aliasing,
derivatives of derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.agreement import check_layouts
from tinygrad_bn.testing.batch_norm_candidate import Candidate, Pass, plain_function
from tinygrad_bn.testing.batch_norm_checks import NAMES, require, want
from tinygrad_bn.testing.batch_norm_reference import WIDE
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.gradients import check_double_grad, check_grad
from tinygrad_bn.testing.invariants import check_dtypes, check_pure
from tinygrad_bn.testing.laws import EVALUATION_LAWS, TRAINING_LAWS


def arrays(d: Any) -> list[np.ndarray | None]:
    """Return x, weight and bias, None for those that there are not."""
    return [d.x, d.weight, d.bias]


def evaluation(candidate: Candidate, d: Any) -> None:
    """Evaluation normalizes by the running statistics, and leaves them alone."""
    if d.x.dtype == np.float32:
        d = _far_from_zero(d)
    done = Pass(candidate, d, training=False, running=True)
    right = want(d, given=(d.running_mean, d.running_var))
    require(right, y=done.y, **done.gradients())
    for name, after in zip(("running_mean", "running_var"), done.state, strict=True):
        if not np.array_equal(after, getattr(d, name)):
            raise GradCheckError(f"evaluation moved {name} to {after.tolist()}")
    single = replace(
        d, x=d.x.take([0], d.reduced_axes[0]), cotangent=d.cotangent.take([0], d.reduced_axes[0])
    )
    alone = Pass(candidate, single, training=False, running=True)
    require(want(single, given=(d.running_mean, d.running_var)), y=alone.y)


def _far_from_zero(d: Any) -> Any:
    """Return the batch with its means at 10⁵ times the spread, and the running means with them.

    There x · scale + offset loses what (x - mean) · scale keeps. eps leaves y of order one.
    """
    far = np.float32(1e5) * np.sqrt(d.running_var.max())
    x = d.x - d.x.mean(d.reduced_axes, keepdims=True) + far
    eps = min(d.eps, 1e-3 * float(d.running_var.min()))
    return replace(d, x=x, running_mean=np.full_like(d.running_mean, far), eps=eps)


def pending(candidate: Candidate, d: Any) -> None:
    """A pass that waits for its backward is not disturbed by another call, or by writes to y."""
    state = Tensor(d.running_mean.copy()), Tensor(d.running_var.copy())
    other = replace(d, x=d.x[::-1] * 2)
    waiting = Pass(candidate, d, running=state)
    Pass(candidate, other, running=state).gradients()
    try:
        found = waiting.gradients()
    except RuntimeError as error:
        raise GradCheckError(
            f"a second call made the backward of the first impossible ({error}); the statistics of "
            f"a batch belong to its own pass"
        ) from None
    _undisturbed(found, want(d), "a second call with the same running statistics")

    given = want(d, given=tuple(s.data.copy() for s in state))
    waiting = Pass(candidate, d, training=False, running=state)
    Pass(candidate, other, running=state)
    _harmless(waiting, given, "running statistics moved by a training call")

    waiting = Pass(candidate, d)
    if any(t is not None and np.shares_memory(waiting.y, t.data) for t in waiting.inputs[:1]):
        raise GradCheckError("the output shares memory with x")
    with no_grad():
        waiting.output[...] = 0.5
    _harmless(waiting, want(d), "the output overwritten")


def _harmless(waiting: Pass, right: Any, what: str) -> None:
    try:
        found = waiting.gradients()
    except RuntimeError:
        return  # noticed: as it should be
    _undisturbed(found, right, f"{what} between forward and backward, without an error")


def _undisturbed(found: dict[str, np.ndarray], right: Any, what: str) -> None:
    try:
        require(right, **found)
    except GradCheckError as error:
        raise GradCheckError(f"{what}: {error}") from None


def twice(candidate: Candidate, d: Any) -> None:
    """Used twice with the same inputs, the gradients of both uses add up, each its own."""
    other = np.random.default_rng(d.x.size).uniform(0.5, 1.5, d.x.shape).astype(d.x.dtype)
    inputs = [None if a is None else Tensor(a, requires_grad=True) for a in (d.x, d.weight, d.bias)]
    state = Tensor(d.running_mean.copy()), Tensor(d.running_var.copy())
    options = {"training": True, "momentum": d.momentum, "eps": d.eps, "axis": d.axis}
    x, weight, bias = inputs
    y = candidate(x, state, weight, bias, **options)
    z = candidate(x, state, weight, bias, **options)
    (y * Tensor(d.cotangent) + z * Tensor(other)).sum().backward()
    # The backward is linear, so that of the sum is the sum of both; but each is rounded by itself,
    # and where the cotangents cancel the sum is far smaller than what was rounded.
    both = d.cotangent.astype(WIDE) + other
    uses = [want(d).scales, want(replace(d, cotangent=other)).scales]
    scales = {name: uses[0][name] + uses[1][name] for name in uses[0]}
    right = replace(want(replace(d, cotangent=both)), scales=scales)
    for name, t in zip(("gx", "gweight", "gbias"), inputs, strict=True):
        if t is not None:
            if t.grad is None:
                raise GradCheckError(f"{NAMES[name]} is None after backward()")
            try:
                require(right, **{name: t.grad.numpy()})
            except GradCheckError as error:
                raise GradCheckError(f"the sum over two uses: {error}") from None


def differences(candidate: Candidate, d: Any) -> None:
    """The gradients against difference quotients of the output."""
    fn = plain_function(candidate, d, d.training, running=not d.training)
    check_grad(fn, *arrays(d), directions=1, cotangents=d.cotangent)


def second_order(candidate: Candidate, d: Any) -> None:
    """The gradients of the gradients; symmetric Hessian; finite where gamma is 0."""
    fn = plain_function(candidate, d, d.training, running=not d.training)
    check_double_grad(fn, *arrays(d), directions=1, cotangents=d.cotangent)


def purity(candidate: Candidate, d: Any) -> None:
    """Nothing changed, nothing shared, equal calls equal."""
    check_pure(plain_function(candidate, d, d.training, running=True), *arrays(d))


def layouts(candidate: Candidate, d: Any) -> None:
    """The same results however the inputs and the cotangent lie in memory."""
    check_layouts(plain_function(candidate, d, d.training, running=True), *arrays(d))


def dtypes(candidate: Candidate, d: Any) -> None:
    """Output and gradients in the dtypes of the inputs, also where these differ."""
    check_dtypes(plain_function(candidate, d, d.training), *arrays(d))


def laws(candidate: Candidate, d: Any) -> None:
    """The laws of batch norm, in training or in evaluation."""
    channels = d.channels
    if d.weight is None:
        d = replace(d, weight=np.ones(channels, d.x.dtype))
    if d.bias is None:
        d = replace(d, bias=np.zeros(channels, d.x.dtype))

    def run(x: Any, weight: Any, bias: Any, cotangent: Any, eps: float, axis: int) -> Any:
        inputs = replace(d, x=x, weight=weight, bias=bias, cotangent=cotangent, eps=eps, axis=axis)
        done = Pass(candidate, inputs, training=d.training, running=not d.training)
        return (done.y, *done.gradients().values())

    for law in TRAINING_LAWS if d.training else EVALUATION_LAWS:
        # 16 roundings even for the exact ones: a power function or a fused multiply-add may keep
        # an implementation from being exact to the bit without its being wrong.
        law.check(run, d, roundings=max(law.roundings, 16.0))
