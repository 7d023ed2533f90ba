"""Folding: a batch norm with fixed statistics is affine, so the layer before it can absorb it.

With s = γ / √(running_var + ε) per channel, s · (W x + b - running_mean) + β = (s W) x + b' with
b' = s · (b - running_mean) + β.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from tinygrad_bn.backend import float64, placed
from tinygrad_bn.nn.activation import Dropout, Identity
from tinygrad_bn.nn.batch_norm import BatchNorm
from tinygrad_bn.nn.batch_renorm import BatchRenorm
from tinygrad_bn.nn.containers import Sequential
from tinygrad_bn.nn.convolution import Conv2d
from tinygrad_bn.nn.linear import Linear
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.parameter import Parameter

M = TypeVar("M", bound=Module)


class _Step(NamedTuple):
    """A module where it is called: as attribute `name` of `parent`; `path` is for messages."""

    path: str
    parent: Module
    name: str
    module: Module


def fold_batch_norm(model: M, *, strict: bool = True) -> M:
    """Return a copy of `model` for inference, with batch norms folded into the layers before them.

    model: a Module. Inside Sequentials, nested ones too, a Conv2d (any groups, either layout) or
        Linear that is followed by a BatchNorm becomes one layer with a bias, and the BatchNorm
        disappears; the names of all others stay. `Identity` and `Dropout`, which do nothing in
        evaluation, may stand between.
    strict: raise where a BatchNorm cannot be folded; otherwise it stays as it is.

    The copy is in evaluation mode and gives what `model.eval()` gives, to within rounding: 1e-12 in
    float64, 2e-5 in float32, relative to the largest value, unless the running mean is far larger
    than the deviation: x - mean is then no longer subtracted before it is rounded. `model` itself
    is not touched. A Linear is taken to be applied to (N, in), where axis 1 is the last.

    Raises ValueError that names every BatchNorm that cannot be folded, and why: there is no such
    layer directly before it, it keeps no running statistics or does not know its channels yet, its
    channels are not those of the layer's output, or it or the layer is used in several places or
    outside a Sequential, or has a forward hook. That is read off how modules are nested: whoever
    calls a part of a Sequential by itself (`self.layers[0](x)`) must not fold it.

    >>> import tinygrad_bn as tg
    >>> from tinygrad_bn import nn
    >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU()).eval()
    >>> folded = nn.fold_batch_norm(model)
    >>> folded
    Sequential(
      (0): Linear(in_features=3, out_features=4, bias=True)
      (2): ReLU()
    )
    >>> x = tg.randn(8, 3)
    >>> bool(((folded(x) - model(x)).abs() < 1e-5).min())
    True
    """
    folded = copy.deepcopy(model).eval()
    used = Counter(id(child) for m in folded.modules() for child in m.children())
    problems: dict[str, str] = {}
    handled: set[int] = set()
    for path, module in list(folded.named_modules()):
        if _is(module, Sequential) and id(module) not in handled:
            steps = list(_steps(path, module, used, handled))
            _fold_steps(steps, used, problems)
            handled.update(id(s.module) for s in steps if isinstance(s.module, BatchNorm))
    for path, module in folded.named_modules():
        if isinstance(module, BatchNorm) and id(module) not in handled:
            problems[path] = "it is not inside a Sequential, so what comes before it is not known"
    if strict and problems:
        raise ValueError(
            "fold_batch_norm: some batch norms cannot be folded (strict=False leaves them):\n  "
            + "\n  ".join(f"{path or 'the model'}: {why}" for path, why in problems.items())
        )
    return folded


def _is(module: Module, *kinds: type[Module]) -> bool:
    """Return whether `module` computes what one of `kinds` does: a subclass may redefine that, and
    so may a `forward` that is set on the module."""
    return "forward" not in vars(module) and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def _steps(path: str, sequential: Module, used: Counter[int], handled: set[int]) -> Iterator[_Step]:
    """Yield what `sequential` calls, in order; a nested one opened up unless it is shared or has a
    hook, which sees what it returns."""
    handled.add(id(sequential))
    for name, child in sequential.named_children():
        inner = f"{path}.{name}" if path else name
        if _is(child, Sequential) and used[id(child)] == 1 and not child.has_hooks:
            yield from _steps(inner, child, used, handled)
        else:
            yield _Step(inner, sequential, name, child)


def _fold_steps(steps: list[_Step], used: Counter[int], problems: dict[str, str]) -> None:
    before: _Step | None = None
    for step in steps:
        if isinstance(step.module, BatchNorm):
            why = _obstacle(before, step.module, used)
            if why is None and before is not None:
                layer = _absorb(before.module, step.module)
                setattr(before.parent, before.name, layer)
                before = before._replace(module=layer)
                used[id(layer)] = 1
                delattr(step.parent, step.name)
                continue
            problems[step.path] = str(why)
        if not _is(step.module, Identity, Dropout) or step.module.has_hooks:
            before = step


def _obstacle(before: _Step | None, bn: BatchNorm, used: Counter[int]) -> str | None:
    """Return why `bn` cannot be folded into the layer before it; None if it can."""
    if not _is(bn, BatchNorm, BatchRenorm):
        return f"it is a {type(bn).__name__}, whose forward is its own"
    if used[id(bn)] > 1:
        return "it is used in several places"
    if bn.has_hooks:
        return "it has a forward hook, which would no longer be called"
    if bn.running_mean is None:
        return "it keeps no running statistics (track_running_stats=False)"
    if bn.num_features is None:
        return "it does not know its channels yet; call the model once, or load a state dict"
    if before is None:
        return "nothing comes before it in its Sequential"
    layer: Any = before.module
    if layer.has_hooks:
        return f"before it comes {before.path}, a {type(layer).__name__} with a forward hook"
    if not _is(layer, Conv2d, Linear):
        return f"before it comes {before.path}, a {type(layer).__name__}, not a Conv2d or Linear"
    if used[id(layer)] > 1:
        return f"the layer before it, {before.path}, is used in several places"
    if isinstance(layer, Conv2d):
        channels, axes = layer.out_channels, (1, -3) if layer.layout == "NCHW" else (3, -1)
    else:
        channels, axes = layer.out_features, (1, -1)
    if bn._axes() not in [(axis,) for axis in axes] or bn._channels() != (channels,):
        return (
            f"it normalizes {bn.num_features} channels on axis {bn.axis}, and {before.path} gives "
            f"{channels} on axis {axes[0]}"
        )
    return None


def _absorb(layer: Any, bn: Any) -> Any:
    """Return `layer` with `bn` behind it as one layer; computed in float64, rounded once."""
    dtype, trained = layer.weight.dtype, layer.weight.requires_grad
    with placed("fold_batch_norm", (layer.weight.data, bn.running_mean.data)):
        tensors = layer.weight, bn.running_mean, bn.running_var
        weight, mean, var = (tensor.data.astype(float64) for tensor in tensors)
        scale = (var + bn.eps) ** -0.5
        scale = scale if bn.weight is None else scale * bn.weight.data
        bias = -mean * scale if layer.bias is None else (layer.bias.data - mean) * scale
        bias = (bias if bn.bias is None else bias + bn.bias.data).astype(dtype)
        weight = (weight * scale.reshape((-1,) + (1,) * (weight.ndim - 1))).astype(dtype)
    folded = copy.copy(layer)  # the sizes; its parameters are replaced
    vars(folded)["_buffers"] = dict(layer._buffers)
    folded.weight = Parameter(weight, requires_grad=trained)
    folded.bias = Parameter(bias, requires_grad=trained)
    return folded
