"""What saving and loading must do to a model, as laws of a `Storage`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tests.mutants.models import Drawn
from tinygrad_bn import Tensor, nn, no_grad
from tinygrad_bn.testing import GradCheckError


@dataclass(frozen=True)
class Storage:
    """Four functions that save and load."""

    state_dict: Callable[[Any], Mapping[str, Any]] = nn.Module.state_dict
    load_state_dict: Callable[..., Any] = nn.Module.load_state_dict
    save: Callable[[Any, Any], None] = nn.save
    load: Callable[[Any], Mapping[str, Any]] = nn.load

    __name__ = "Storage"

    def through_a_file(self, what: Any) -> Mapping[str, Any]:
        """Return what is loaded after it was saved; a model by its state dict."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            self.save(what, path)
            return self.load(path)


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """Return all that a model consists of."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.numpy().copy() for name, tensor in named}


def _other(model: nn.Module) -> nn.Module:
    """Return a model of this kind that holds other numbers."""
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data[...] = tensor.numpy() + 3
    return other


def _require_equal(got: Mapping[str, Any], want: Mapping[str, Any], what: str) -> None:
    if set(got) != set(want):
        raise GradCheckError(f"{what} has {sorted(got)}, expected {sorted(want)}")
    for name, right in want.items():
        found = got[name].numpy() if isinstance(got[name], Tensor) else got[name]
        if (found.dtype, found.shape) != (right.dtype, right.shape):
            raise GradCheckError(
                f"{what}: {name} is {found.dtype}{list(found.shape)}, expected "
                f"{right.dtype}{list(right.shape)}"
            )
        if found.tobytes() != right.tobytes():
            raise GradCheckError(f"{what}: {name} is {found.tolist()}, expected {right.tolist()}")


def state_dict_is_the_state(storage: Storage, drawn: Drawn) -> None:
    """The state dict has all parameters and buffers, by their names, and changes none."""
    before = _arrays(drawn.model)
    _require_equal(storage.state_dict(drawn.model), before, "the state dict")
    _require_equal(_arrays(drawn.model), before, "the model")


def file_holds_the_state(storage: Storage, drawn: Drawn) -> None:
    """What is loaded is what was saved, to the bit."""
    model = drawn.model
    for what in (model, storage.state_dict(model)):
        _require_equal(storage.through_a_file(what), _arrays(model), "the file")


def file_holds_any_array(storage: Storage, drawn: Drawn) -> None:
    """Arrays of any dtype, shape and layout come back."""
    x = drawn.batches[0]
    state = {
        "transposed": x.T,
        "strided": x[::2],
        "reversed": x[::-1],
        "narrow": x.astype("float16"),
        "number": np.array(2**40 + 1),
        "flags": x > 0,
        "empty": x[:0],
        "bfloat16": x.astype(bfloat16),
    }
    _require_equal(storage.through_a_file(state), state, "the file")


def loaded_model_goes_on(storage: Storage, drawn: Drawn) -> None:
    """A model that was loaded has the state, evaluates and goes on training as the one saved."""
    model = copy.deepcopy(drawn.model)
    other = _other(model)
    storage.load_state_dict(other, storage.through_a_file(model))
    _require_equal(_arrays(other), _arrays(model), "the loaded model")
    with no_grad():
        one, two = (m.eval()(Tensor(drawn.batches[0])).numpy() for m in (model, other))
    if one.tobytes() != two.tobytes():
        raise GradCheckError("the loaded model evaluates to something else")


def loading_writes_into_what_is_there(storage: Storage, drawn: Drawn) -> None:
    """Parameters stay the same objects, of the same dtypes, in memory that the state has not."""
    model, other = drawn.model, _other(drawn.model)
    own = [*other.parameters(), *other.buffers()]
    for dtype in ("float64", "float32"):
        state = {
            name: a.astype(dtype) if a.dtype.kind == "f" else a.copy()
            for name, a in _arrays(model).items()
        }
        storage.load_state_dict(other, state)
        now = [*other.parameters(), *other.buffers()]
        if any(a is not b for a, b in zip(now, own, strict=True)):
            raise GradCheckError("loading put other tensors in the place of the model's")
        for name, array in _arrays(other).items():
            right = state[name].astype(_arrays(model)[name].dtype)
            _require_equal({name: array}, {name: right}, "the loaded model")
        before = _arrays(other)
        for array in state.values():
            array[...] = 0
        _require_equal(_arrays(other), before, "the model, after a write into the state,")


def what_does_not_fit_is_refused(storage: Storage, drawn: Drawn) -> None:
    """A strict load of names or shapes that differ raises and changes nothing."""
    right = _arrays(drawn.model)
    name, last = next(iter(right)), list(right)[-1]
    wrong = {
        "a missing name": {n: a for n, a in right.items() if n != last},
        "an unexpected name": right | {"more": right[name]},
        "another shape": right | {last: np.zeros((2, 3), right[last].dtype)},
        "one value for all": right | {name: right[name].ravel()[:1]},
        "a flat array": right | {name: right[name].ravel()},
    }
    for what, state in wrong.items():
        other = _other(drawn.model)
        before = _arrays(other)
        try:
            storage.load_state_dict(other, state)
        except ValueError:
            _require_equal(_arrays(other), before, f"the model, after refusing {what},")
            continue
        raise GradCheckError(f"a strict load of {what} gave no error")


def not_strict_loads_what_both_have(storage: Storage, drawn: Drawn) -> None:
    """Without `strict`, what both have is loaded, and the rest is named."""
    right = _arrays(drawn.model)
    last = list(right)[-1]
    other = _other(drawn.model)
    kept = _arrays(other)[last]
    state = {n: a for n, a in right.items() if n != last} | {"more": right[last]}
    found = storage.load_state_dict(other, state, strict=False)
    _require_equal(_arrays(other), right | {last: kept}, "the model, loaded in part,")
    if tuple(map(list, found)) != ([last], ["more"]):
        raise GradCheckError(f"{found} were passed over, expected {last} missing and 'more' left")


SAVING_LAWS = (
    state_dict_is_the_state,
    file_holds_the_state,
    file_holds_any_array,
    loaded_model_goes_on,
    loading_writes_into_what_is_there,
    what_does_not_fit_is_refused,
    not_strict_loads_what_both_have,
)
