"""Batch norms folded wrongly into the layer before them: `nn.fold_batch_norm` with a fault."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np

from tests.mutants.model_laws import FOLDING_LAWS
from tests.mutants.models import normalized_models
from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.verifiers import as_lawful
from tinygrad_bn import nn
from tinygrad_bn.nn import folding

as_folding = as_lawful(FOLDING_LAWS, normalized_models)


def first_axis(scale, weight, layer):
    return scale.reshape((-1,) + (1,) * (weight.ndim - 1))


def absorbing(
    *,
    statistics=lambda bn: (bn.running_mean.numpy(), bn.running_var.numpy()),
    scale=lambda gamma, var, eps: gamma / np.sqrt(var + eps),
    along=first_axis,
    bias=lambda b, mean, scale, beta: (b - mean) * scale + beta,
    rounded=lambda values, dtype: values.astype(dtype),
    wide=np.float64,
):
    """Return an `_absorb` by the textbook, with some of its formulas replaced."""

    def _absorb(layer, bn):
        weight, dtype = layer.weight.numpy().astype(wide), layer.weight.dtype
        mean, var = (statistic.astype(wide) for statistic in statistics(bn))
        gamma = 1.0 if bn.weight is None else bn.weight.numpy().astype(wide)
        beta = 0.0 if bn.bias is None else bn.bias.numpy().astype(wide)
        b = 0.0 if layer.bias is None else layer.bias.numpy().astype(wide)
        s = scale(gamma, var, wide(bn.eps))
        folded = copy.deepcopy(layer)
        folded.weight = nn.Parameter(rounded(weight * along(s, weight, layer), dtype))
        folded.bias = nn.Parameter(rounded(bias(b, mean, s, beta), dtype))
        return folded

    return _absorb


def planting(**formulas):
    return lambda: replaced((folding, "_absorb", absorbing(**formulas)))


def formula(fault, **formulas):
    """Return a mutant that absorbs by other formulas."""
    return Mutant(f"folding: {fault}", nn.fold_batch_norm, as_folding, planting(**formulas))


def function(fault, candidate):
    return Mutant(f"folding: {fault}", candidate, as_folding)


def planted(fault, attribute, value):
    planting = lambda: replaced((folding, attribute, value))  # noqa: E731
    return Mutant(f"folding: {fault}", nn.fold_batch_norm, as_folding, planting)


# --- formulas ------------------------------------------------------------------------------------


def along_the_inputs(scale, weight, layer):
    """Scale the weight's second axis where it is as long as the first."""
    fits = weight.shape[1] == weight.shape[0]
    return scale.reshape((1, -1) + (1,) * (weight.ndim - 2) if fits else (-1,) + (1,) * (
        weight.ndim - 1))  # fmt: skip


def linear_alone_along_the_inputs(scale, weight, layer):
    return (along_the_inputs if isinstance(layer, nn.Linear) else first_axis)(scale, weight, layer)


def of_the_first_group(scale, weight, layer):
    """Give each group of a convolution the scales of the first."""
    groups = getattr(layer, "groups", 1)
    return first_axis(np.tile(scale[: len(scale) // groups], groups), weight, layer)


def not_in(layout):
    """Leave kernels of one layout as they are."""

    def along(scale, weight, layer):
        return 1.0 if getattr(layer, "layout", "") == layout else first_axis(scale, weight, layer)

    return along


def start_values(bn):
    return np.zeros(bn.num_features), np.ones(bn.num_features)


FORMULAS = [
    formula("ε forgotten", scale=lambda gamma, var, eps: gamma / np.sqrt(var)),
    formula("ε outside the root", scale=lambda gamma, var, eps: gamma / (np.sqrt(var) + eps)),
    formula("ε doubled", scale=lambda gamma, var, eps: gamma / np.sqrt(var + 2 * eps)),
    formula("ε always 1e-5", scale=lambda gamma, var, eps: gamma / np.sqrt(var + 1e-5)),
    formula("divided by the variance", scale=lambda gamma, var, eps: gamma / (var + eps)),
    formula("running variance taken for a biased one", scale=lambda gamma, var, eps: (
        gamma / np.sqrt(var * 10 / 9 + eps))),
    formula("γ forgotten", scale=lambda gamma, var, eps: 1 / np.sqrt(var + eps)),
    formula("γ divided by", scale=lambda gamma, var, eps: 1 / (gamma * np.sqrt(var + eps))),
    formula("γ without its sign", scale=lambda gamma, var, eps: (
        np.abs(gamma) / np.sqrt(var + eps))),
    formula("β forgotten", bias=lambda b, mean, scale, beta: (b - mean) * scale),
    formula("β scaled", bias=lambda b, mean, scale, beta: (b - mean + beta) * scale),
    formula("running mean: wrong sign", bias=lambda b, mean, scale, beta: (
        (b + mean) * scale + beta)),
    formula("running mean forgotten", bias=lambda b, mean, scale, beta: b * scale + beta),
    formula("running mean not scaled", bias=lambda b, mean, scale, beta: b * scale - mean + beta),
    formula("layer's bias forgotten", bias=lambda b, mean, scale, beta: -mean * scale + beta),
    formula("layer's bias not scaled", bias=lambda b, mean, scale, beta: b - mean * scale + beta),
    formula("layer's bias kept as it was", bias=lambda b, mean, scale, beta: (
        b + np.zeros_like(mean))),
    formula("statistics as they start", statistics=start_values),
    formula("weight of the inputs scaled", along=along_the_inputs),
    formula("Linear: weight of the inputs scaled", along=linear_alone_along_the_inputs),
    formula("groups: scales of the first for all", along=of_the_first_group),
    formula("kernel of NHWC left as it was", along=not_in("NHWC")),
    formula("kernel of NCHW left as it was", along=not_in("NCHW")),
    formula("weight left as it was", along=lambda scale, weight, layer: 1.0),
    formula("computed in float32", wide=np.float32),
    formula("float64 whatever the layer is", rounded=lambda values, dtype: values),
]  # fmt: skip


# --- the model -----------------------------------------------------------------------------------


def sharing_the_last(model):
    """Let the last layer, if it has no batch norm behind it, keep its weight in the same memory."""
    folded = nn.fold_batch_norm(model)
    *_, (name, last) = model.named_children()
    if isinstance(last, (nn.Linear, nn.Conv2d)):
        getattr(folded, name).weight.data = last.weight.data
    return folded


def resetting(model):
    folded = nn.fold_batch_norm(model)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm):
            part.reset_running_stats()
    return folded


def keeping_batch_norms(steps, used, problems):
    """Absorb each batch norm and leave it where it is."""
    for before, step in itertools.pairwise(steps):
        if isinstance(step.module, nn.BatchNorm) and isinstance(before.module, nn.Linear):
            setattr(before.parent, before.name, folding._absorb(before.module, step.module))


def the_first_alone(steps, used, problems):
    _FOLD_STEPS(steps[:4], used, problems)


def not_opened(path, sequential, used, handled):
    """Take what a nested Sequential holds to be no part of this one."""
    handled.add(id(sequential))
    for name, child in sequential.named_children():
        yield folding._Step(f"{path}.{name}", sequential, name, child)


def evaluating_the_model(model):
    folded = nn.fold_batch_norm(model)
    model.eval()
    return folded


def overlooking_hooks_of(*kinds):
    """Fold as if modules of these classes had no forward hooks."""

    def fold(model):
        seen = property(lambda module: bool(module._hooks) and not isinstance(module, kinds))
        with replaced((nn.Module, "has_hooks", seen)):
            return nn.fold_batch_norm(model)

    return fold


_FOLD_STEPS = folding._fold_steps

MODELS = [
    planted("the model itself is changed", "copy", SimpleNamespace(
        copy=copy.copy, deepcopy=lambda model: model)),
    planted("parts shared with the model", "copy", SimpleNamespace(
        copy=copy.copy, deepcopy=copy.copy)),
    function("a layer that is not folded is shared", sharing_the_last),
    planted("batch norm left in place", "_fold_steps", keeping_batch_norms),
    planted("the first batch norm alone", "_fold_steps", the_first_alone),
    planted("nested Sequentials not opened", "_steps", not_opened),
    function("folded model left in training mode", lambda model: (
        nn.fold_batch_norm(model).train())),
    function("model put in evaluation mode", evaluating_the_model),
    function("model's statistics reset", resetting),
    function("hooks of the batch norm lost", overlooking_hooks_of(nn.BatchNorm)),
    function("hooks of the layer called with other values", overlooking_hooks_of(
        nn.Linear, nn.Conv2d)),
    function("hooks between layer and batch norm overlooked", overlooking_hooks_of(
        nn.Identity, nn.Dropout)),
    function("hooks of a nested Sequential overlooked", overlooking_hooks_of(nn.Sequential)),
]  # fmt: skip

FOLDING = [*FORMULAS, *MODELS]

RIGHT = (
    Mutant("nn.fold_batch_norm", nn.fold_batch_norm, as_folding),
    Mutant("folding by the textbook", nn.fold_batch_norm, as_folding, planting()),
)
