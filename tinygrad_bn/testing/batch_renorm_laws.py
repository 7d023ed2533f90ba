"""What Batch Renorm must do, as laws: the function against longdouble, the layer against both.

For `verify_laws` with `strategies.batch_norm_inputs`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.batch_norm_candidate import Candidate, Pass
from tinygrad_bn.testing.batch_norm_checks import one_of, require, want
from tinygrad_bn.testing.batch_norm_reference import WIDE, Expected
from tinygrad_bn.testing.batch_norm_samples import Step, sampled
from tinygrad_bn.testing.errors import GradCheckError

#: Limits to try: closed, as in the paper, in between, and open as far as anything drawn will go.
_LIMITS = ((1.0, 0.0), (3.0, 5.0), (1.5, 0.5), (1.1, 5.0), (3.0, 0.1), (1e6, 1e9))


def renormalized(
    d: Any, r_max: float, d_max: float, *, correction: float = 1
) -> tuple[Expected, Step]:
    """Return what Batch Renorm in training gives, and the step of the running statistics.

    d: `BatchNormInputs`. y = γ (x̂ r + t) + β with r = σ / σ_running, limited to [1/r_max, r_max],
    and t = (μ - μ_running) / σ_running, limited to [-d_max, d_max], where σ = √(v + ε); both are
    constants for the gradient. That is batch norm with weight γ r and bias γ t + β, but for
    gγ = Σ g (x̂ r + t).
    """
    found, step = sampled(d, correction=correction)
    eps = WIDE(d.eps)
    before = np.sqrt(d.running_var.astype(WIDE) + eps)
    r = np.clip(np.sqrt(found.var + eps) / before, 1 / WIDE(r_max), WIDE(r_max))
    t = np.clip((found.mean - d.running_mean.astype(WIDE)) / before, -WIDE(d_max), WIDE(d_max))
    gamma = np.ones(d.channels, WIDE) if d.weight is None else d.weight.astype(WIDE)
    beta = np.zeros(d.channels, WIDE) if d.bias is None else d.bias.astype(WIDE)
    right, _ = sampled(replace(d, weight=gamma * r, bias=gamma * t + beta))
    along = tuple(n if i == d.axis % d.x.ndim else 1 for i, n in enumerate(d.x.shape))
    scales = dict(right.scales)
    # γ t and β may cancel.
    scales["y"] = scales["y"] + (np.abs(gamma * t) + np.abs(beta)).reshape(along)
    scales["gweight"] = r * scales["gweight"] + np.abs(t) * scales["gbias"]
    return replace(right, gweight=r * right.gweight + t * right.gbias, scales=scales), step


# --- the function --------------------------------------------------------------------------------


def values_and_gradients(batch_renorm: Any, d: Any) -> None:
    """y and the gradients by the formula, for limits that bind and limits that do not."""
    r_max, d_max = _limits(d)
    right, _ = renormalized(d, r_max, d_max)
    done = Pass(Candidate(batch_renorm), d, running=True, r_max=r_max, d_max=d_max)
    require(right, y=done.y, **done.gradients())


def running_statistics(batch_renorm: Any, d: Any) -> None:
    """The running statistics make the step that batch norm's do, after y was computed."""
    r_max, d_max = _limits(d)
    correction = one_of(2, d)
    _, step = renormalized(d, r_max, d_max, correction=correction)
    limits = {"r_max": r_max, "d_max": d_max}
    done = Pass(Candidate(batch_renorm), d, running=True, correction=correction, **limits)
    step.require((d.running_mean, d.running_var), done.state, d.momentum, "after a call")


def closed_limits_give_batch_norm(batch_renorm: Any, d: Any) -> None:
    """r_max = 1 and d_max = 0 leave batch norm."""
    done = Pass(Candidate(batch_renorm), d, running=True, r_max=1.0, d_max=0.0)
    require(want(d), y=done.y, **done.gradients())


def open_limits_give_evaluation(batch_renorm: Any, d: Any) -> None:
    """Without limits, training computes what evaluation by the old statistics does."""
    done = Pass(Candidate(batch_renorm), d, running=True, r_max=1e9, d_max=1e12)
    right = want(d, given=(d.running_mean, d.running_var))
    size = renormalized(d, 1e9, 1e12)[0].scales
    require(replace(right, scales={**right.scales, "y": size["y"] + right.scales["y"]}), y=done.y)


def evaluation(batch_renorm: Any, d: Any) -> None:
    """Evaluation is batch norm's: by the running statistics, which stay."""
    done = Pass(Candidate(batch_renorm), d, training=False, running=True)
    require(want(d, given=(d.running_mean, d.running_var)), y=done.y, **done.gradients())
    _require_still(d, done.state, "evaluation")


def _limits(d: Any) -> tuple[float, float]:
    return _LIMITS[one_of(len(_LIMITS), d)]


def _require_still(d: Any, state: Any, what: str) -> None:
    for name, after in zip(("running_mean", "running_var"), state, strict=True):
        if not np.array_equal(after, getattr(d, name)):
            raise GradCheckError(f"{what} moved {name} to {after.tolist()}")


#: Of anything with `F.batch_renorm`'s signature.
RENORM_LAWS = (
    values_and_gradients,
    running_statistics,
    closed_limits_give_batch_norm,
    open_limits_give_evaluation,
    evaluation,
)


# --- the layer -----------------------------------------------------------------------------------


def _layer(cls: Any, d: Any, **options: Any) -> Any:
    """Return a layer with the drawn vectors and statistics."""
    layer = cls(
        d.channels,
        d.eps,
        d.momentum,
        axis=d.axis,
        scale=d.weight is not None,
        center=d.bias is not None,
        dtype=d.x.dtype.name,
        **options,
    )
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, name) is not None:
            getattr(layer, name).data[...] = getattr(d, name)
    return layer


def _current(layer: Any, d: Any) -> Any:
    """Return the drawn batch with the statistics that the layer has now."""
    return replace(
        d,
        running_mean=layer.running_mean.numpy().copy(),
        running_var=layer.running_var.numpy().copy(),
    )


def warm_up(cls: Any, d: Any) -> None:
    """The limits open linearly with the batches seen, from 1 and 0 to r_max and d_max."""
    start, r_end, d_end = ((0, 2, 4), (1, 5, 2), (2, 2, 3), (0, 0, 0))[one_of(4, d)]
    layer = _layer(cls, d, r_max=2.0, d_max=1.0, warmup=(start, r_end, d_end))
    for seen in range(7):
        opened = [
            min(max((seen - start) / (end - start), 0.0), 1.0)
            if end > start
            else float(seen >= end)
            for end in (r_end, d_end)
        ]
        limits = 1 + opened[0] * (2.0 - 1), opened[1] * 1.0
        now = _current(layer, replace(d, x=d.x * (1 + seen % 3) + d.x.dtype.type(seen)))
        right, _ = renormalized(now, *limits)
        try:
            require(right, y=layer(Tensor(now.x)).numpy())
        except GradCheckError as error:
            raise GradCheckError(
                f"batch {seen} of warmup={(start, r_end, d_end)}, limits {limits}: {error}"
            ) from None
        if int(layer.num_batches_tracked.item()) != seen + 1:
            raise GradCheckError(f"the counter is {layer.num_batches_tracked} after {seen + 1}")


def no_warm_up(cls: Any, d: Any) -> None:
    """Without warm-up the limits are open from the first batch, and may be set at any time."""
    layer = _layer(cls, d, r_max=2.0, d_max=1.0, warmup=None)
    for limits in ((2.0, 1.0), (1.5, 0.25)):
        layer.r_max, layer.d_max = limits
        right, step = renormalized(now := _current(layer, d), *limits)
        require(right, y=layer(Tensor(now.x)).numpy())
        before, after = (now.running_mean, now.running_var), _current(layer, d)
        state = after.running_mean, after.running_var
        step.require(before, state, d.momentum, "after a batch")


def recomputing(cls: Any, d: Any) -> None:
    """A second forward while recomputing gives the same to the bit, and moves nothing."""
    layer = _layer(cls, d, r_max=2.0, d_max=1.0, warmup=(0, 2, 2))
    for _ in range(2):
        y = layer(Tensor(d.x)).numpy()
        before = {name: b.numpy().copy() for name, b in layer.named_buffers()}
        with layer.recomputing():
            again = layer(Tensor(d.x)).numpy()
        if y.tobytes() != again.tobytes():
            raise GradCheckError(
                "recomputing gives another output: r and d must be those of the forward that is "
                "repeated, not of the statistics that it has moved"
            )
        for name, buffer in layer.named_buffers():
            if buffer.numpy().tobytes() != before[name].tobytes():
                raise GradCheckError(f"recomputing moved {name}")


def evaluation_of_the_layer(cls: Any, d: Any) -> None:
    """Evaluation is batch norm's, whatever the limits."""
    layer = _layer(cls, d, warmup=(0, 2, 2)).eval()
    require(want(d, given=(d.running_mean, d.running_var)), y=layer(Tensor(d.x)).numpy())
    now = _current(layer, d)
    _require_still(d, (now.running_mean, now.running_var), "evaluation")


#: Of anything that is made as `nn.BatchRenorm` is.
RENORM_LAYER_LAWS = (warm_up, no_warm_up, recomputing, evaluation_of_the_layer)
