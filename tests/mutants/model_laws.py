"""What folding batch norms and taking population statistics must do to a model, as laws.

For `verify_laws` with `models.normalized_models`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.laws import assert_law

WIDE = np.longdouble

#: Of a layer that was folded, in units of the dtype, of the largest value: sums of some ten terms
#: in another order, in each of two layers.
_FOLDING = 64.0
#: Of statistics: they are computed in float64 and rounded once; sums of some hundred terms.
_STATISTICS = 16.0


def _run(model: Any, x: np.ndarray) -> np.ndarray:
    with no_grad():
        return model(Tensor(x.copy())).numpy()


def _state(model: Any) -> dict[str, Any]:
    """Return all that a call may not change: parameters, buffers, modes, settings."""
    named = (*model.named_parameters(), *model.named_buffers())
    state: dict[str, Any] = {name: t.numpy().tobytes() for name, t in named}
    for name, part in model.named_modules():
        settings = ("training", "momentum", "eps", "correction", "frozen")
        state[f"{name}: settings"] = [getattr(part, setting, None) for setting in settings]
    return state


def _require_same_state(model: Any, before: dict[str, Any], what: str) -> None:
    after = _state(model)
    changed = [name for name in before if after.get(name) != before[name]]
    if changed or len(after) != len(before):
        raise GradCheckError(f"{what} changed {changed or 'the parts of the model'}")


# --- folding -------------------------------------------------------------------------------------


def folded_equals_evaluation(fold: Any, drawn: Any) -> None:
    """The folded model gives what the model gives in evaluation, also after more training."""
    model, x = copy.deepcopy(drawn.model), drawn.batches[0]
    for _ in range(2):
        folded, right = fold(copy.deepcopy(model)), copy.deepcopy(model).eval()
        with np.errstate(all="ignore"):
            y, got = _run(right, x), _run(folded, x)
        if got.dtype != y.dtype or got.shape != y.shape:
            raise GradCheckError(
                f"the folded model gives {got.dtype}{list(got.shape)}, expected "
                f"{y.dtype}{list(y.shape)}"
            )
        # What each layer computes is as large as this, and may cancel in the next.
        scale = max(np.abs(part).max() for part in _outputs(right, x))
        assert_law(got, y, scale=scale, roundings=_FOLDING, law="folded(x) = model.eval()(x)")
        model.train()
        for batch in drawn.batches:
            _run(model, batch)


def _outputs(model: Any, x: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the output of every layer of a model, and the terms of every batch norm."""
    y = Tensor(x)
    with no_grad():
        for layer in _flat(model):
            if isinstance(layer, nn.BatchNorm):
                given = [t.numpy() for t in (layer.running_mean, layer.running_var)]  # pyrefly: ignore
                s = 1 / np.sqrt(given[1] + layer.eps)
                s = s if layer.weight is None else s * np.abs(layer.weight.numpy())
                yield s * np.abs(given[0])
                yield s.max() * np.abs(y.numpy())
            y = layer(y)
            yield y.numpy()


def _flat(model: Any) -> Iterator[Any]:
    for child in model.children():
        if isinstance(child, nn.Sequential):
            yield from _flat(child)
        else:
            yield child


def no_batch_norm_is_left(fold: Any, drawn: Any) -> None:
    """Every batch norm is gone; the other layers have their names, and the model evaluates."""
    folded = fold(copy.deepcopy(drawn.model))
    kept = [n for n, m in drawn.model.named_modules() if not isinstance(m, nn.BatchNorm)]
    names = [name for name, _ in folded.named_modules()]
    if names != kept:
        raise GradCheckError(f"the folded model has modules {names}, expected {kept}")
    training = [name for name, part in folded.named_modules() if part.training]
    if training:
        raise GradCheckError(f"the folded model is for inference, but {training} are in training")
    for name, part in folded.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is None:
            raise GradCheckError(f"{name} has no bias to hold what the batch norm added")
    for (name, new), (_, old) in zip(
        ((n, p) for n, p in folded.named_parameters() if n.endswith("weight")),
        ((n, p) for n, p in drawn.model.named_parameters() if p.ndim > 1),
        strict=True,
    ):
        if new.dtype != old.dtype or new.shape != old.shape:
            raise GradCheckError(f"{name} is {new.dtype}{list(new.shape)}, was {old.dtype}")


def model_is_not_touched(fold: Any, drawn: Any) -> None:
    """The model stays as it was, and shares nothing with the folded one."""
    model = copy.deepcopy(drawn.model)
    before = _state(model)
    folded = fold(model)
    _require_same_state(model, before, "folding")
    with no_grad():
        for _, tensor in folded.named_parameters():
            tensor[...] = 0.5
    _require_same_state(model, before, "writing into the folded model")


def hooks_are_heeded(fold: Any, drawn: Any) -> None:
    """With a hook on any module, folding gives what the model gives or refuses to."""
    x = drawn.batches[0]
    for name, _ in drawn.model.named_modules():
        model = copy.deepcopy(drawn.model)
        dict(model.named_modules())[name].register_forward_hook(lambda module, args, out: 1 - out)
        try:
            folded = fold(copy.deepcopy(model))
        except ValueError:
            continue
        right = model.eval()
        y, got = _run(right, x), _run(folded, x)
        scale = 1 + max(np.abs(part).max() for part in (y, *_outputs(right, x)))
        assert_law(got, y, scale=scale, roundings=_FOLDING, law=f"the same, with a hook on {name}")


#: Of a function that takes a model and returns it folded.
FOLDING_LAWS = (
    folded_equals_evaluation,
    no_batch_norm_is_left,
    model_is_not_touched,
    hooks_are_heeded,
)


# --- population statistics -----------------------------------------------------------------------


def _seen(model: Any, batches: Any) -> list[tuple[Any, list[np.ndarray]]]:
    """Return every batch norm of a model and what it is given in training, batch by batch."""
    subject = copy.deepcopy(model).train()
    for part in subject.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    layers = list(_flat(subject))
    found = [(layer, []) for layer in layers if isinstance(layer, nn.BatchNorm)]
    with no_grad():
        for x in batches:
            y = Tensor(x)
            for layer in layers:
                for norm, inputs in found:
                    if norm is layer:
                        inputs.append(y.numpy().copy())
                y = _trained(layer, y)
    return found


def _trained(layer: Any, y: Any) -> Any:
    """Return what a layer passes on in training, its statistics left as they are."""
    if type(layer) is nn.BatchNorm:  # without the layer, which is under test
        vectors = layer.weight, layer.bias
        return F.batch_norm(y, None, None, *vectors, True, eps=layer.eps, axis=layer.axis)
    with nn.recomputing(layer):
        return layer(y)


def _quiet(drawn: Any) -> Any:
    """Return the model without dropout, whose draws no one can repeat."""
    model = copy.deepcopy(drawn.model)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def statistics_of_the_joined_data(update: Any, drawn: Any) -> None:
    """Mean and corrected variance are those of all values, as if they were one batch."""
    model = _quiet(drawn)
    right = _seen(model, drawn.batches)
    update(model, iter(drawn.batches))
    for norm, (was, inputs) in zip(_norms(model), right, strict=True):
        channel = norm.axis % inputs[0].ndim
        values = np.concatenate(
            [np.moveaxis(x, channel, 0).reshape(x.shape[channel], -1) for x in inputs], axis=1
        ).astype(WIDE)
        mean = values.mean(axis=1)
        squares = ((values - mean[:, None]) ** 2).sum(axis=1)
        var = squares / (values.shape[1] - was.correction)
        law = "the statistics are those of the joined data"
        size = np.abs(values).mean(axis=1)
        got = norm.running_mean.numpy(), norm.running_var.numpy()
        assert_law(got[0], mean, scale=size, roundings=_STATISTICS, law=law)
        assert_law(got[1], var, roundings=_STATISTICS, law=law)


def order_of_batches(update: Any, drawn: Any) -> None:
    """For the first batch norm, the order of the batches is of no account."""
    one, other = _quiet(drawn), _quiet(drawn)
    update(one, list(drawn.batches))
    update(other, list(drawn.batches[::-1]))
    mine, theirs = next(_norms(one)), next(_norms(other))
    size = np.abs(mine.running_mean.numpy()) + np.sqrt(mine.running_var.numpy())
    for name, scale in (("running_mean", size), ("running_var", None)):
        a, b = getattr(mine, name).numpy(), getattr(theirs, name).numpy()
        law = f"{name} of batches in any order"
        assert_law(a, b, scale=scale, roundings=_STATISTICS, law=law)


def nothing_else_changes(update: Any, drawn: Any) -> None:
    """Parameters, modes and settings stay; the counter is the number of batches that had values."""
    model = _quiet(drawn)
    next(iter(model.children())).eval()
    before = _state(model)
    empty = drawn.batches[0][:0]
    update(model, (b for b in (*drawn.batches, empty)))
    buffers = {name for name, _ in model.named_buffers()}
    kept = {name: value for name, value in before.items() if name not in buffers}
    after = _state(model)
    changed = [name for name, value in kept.items() if after[name] != value]
    if changed:
        raise GradCheckError(f"taking the statistics changed {changed}")
    if any(p.grad is not None for p in model.parameters()):
        raise GradCheckError("taking the statistics left gradients")
    for norm in _norms(model):
        if int(norm.num_batches_tracked.item()) != len(drawn.batches):
            raise GradCheckError(
                f"the counter is {norm.num_batches_tracked.item()} after {len(drawn.batches)} "
                f"batches and an empty one"
            )


def twice_is_once(update: Any, drawn: Any) -> None:
    """What the statistics were before is of no account."""
    model = _quiet(drawn)
    # Batch Renorm passes on what depends on them.
    if any(isinstance(norm, nn.BatchRenorm) for norm in _norms(model)):
        return
    update(model, list(drawn.batches))
    before = _state(model)
    update(model, list(drawn.batches))
    _require_same_state(model, before, "a second time over the same data")


def frozen_layers_keep_theirs(update: Any, drawn: Any) -> None:
    """A frozen batch norm keeps its statistics; the others get theirs."""
    model = nn.Sequential(_quiet(drawn), nn.BatchNorm(None, axis=next(_norms(drawn.model)).axis))
    model.astype(drawn.batches[0].dtype)
    _run(model.eval(), drawn.batches[0])  # the last layer learns its size
    frozen = next(_norms(model)).freeze()
    before = _state(frozen)
    update(model, list(drawn.batches))
    _require_same_state(frozen, before, "taking the statistics of a model with a frozen layer")
    last = list(_norms(model))[-1]
    if int(last.num_batches_tracked.item()) != len(drawn.batches):
        raise GradCheckError("a layer that is not frozen was left out")


def all_or_nothing(update: Any, drawn: Any) -> None:
    """Where a batch raises, and where there is none, nothing has changed."""
    model = _quiet(drawn)
    before = _state(model)
    wrong = np.zeros((3, 7), drawn.batches[0].dtype)
    for batches in ([*drawn.batches, wrong], []):
        try:
            update(model, batches)
        except Exception:  # whatever the layers, or the function, say about it
            _require_same_state(model, before, "taking statistics that failed")
            continue
        raise GradCheckError(f"{len(batches)} batches, of which one does not fit, gave no error")


def _norms(model: Any) -> Iterator[Any]:
    return (m for m in _flat(model) if isinstance(m, nn.BatchNorm))


#: Of a function that takes a model and batches, and gives the model their statistics.
POPULATION_LAWS = (
    statistics_of_the_joined_data,
    order_of_batches,
    nothing_else_changes,
    twice_is_once,
    frozen_layers_keep_theirs,
    all_or_nothing,
)
