"""Saving and loading with a fault: state dicts, what is written of them, what is taken back."""

import numpy as np

from tests.mutants.models import normalized_models
from tests.mutants.mutant import Mutant
from tests.mutants.saving_laws import SAVING_LAWS, Storage
from tests.mutants.verifiers import as_lawful
from tinygrad_bn import Tensor, nn
from tinygrad_bn.nn.module import Mismatch

as_storage = as_lawful(SAVING_LAWS, normalized_models)


def storage(fault, **functions):
    """Return a mutant with other functions."""
    return Mutant(f"saving: {fault}", Storage(**functions), as_storage)


def raw(value):
    return value.data if isinstance(value, Tensor) else value


def each(change):
    """Return a function of a state: `change(name, array)` in the place of every array."""

    def changed(state):
        return {name: change(name, np.asarray(raw(value))) for name, value in state.items()}

    return changed


def without(end):
    return lambda state: {name: v for name, v in state.items() if not name.endswith(end)}


# --- state dicts ---------------------------------------------------------------------------------


def state_dict(fault, change):
    """Return a mutant whose state dict is `change(model, the right one)`."""
    return storage(f"state dict: {fault}", state_dict=lambda model: change(
        model, nn.Module.state_dict(model)))  # fmt: skip


def parameters_alone(model, state):
    return {name: p for name, p in state.items() if name in dict(model.named_parameters())}


def last_names(model, state):
    """Name what is inside a module without where it is."""
    return {name.rpartition(".")[2]: value for name, value in state.items()}


def trained_alone(model, state):
    """Leave out the statistics of layers without weight and bias."""
    return {
        name: value for name, value in state.items()
        if "running" not in name or name.rpartition(".")[0] + ".weight" in state
    }  # fmt: skip


def counted_first(model, state):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm):
            norm.num_batches_tracked += 1
    return nn.Module.state_dict(model)


STATE_DICTS = [
    state_dict("parameters alone", parameters_alone),
    state_dict("running mean missing", lambda model, state: without("running_mean")(state)),
    state_dict("running variance missing", lambda model, state: without("running_var")(state)),
    state_dict("counter missing", lambda model, state: without("num_batches_tracked")(state)),
    state_dict("names without their modules", last_names),
    state_dict("statistics of layers with a weight alone", trained_alone),
    state_dict("counts as a batch", counted_first),
    state_dict("counter as float", lambda model, state: each(lambda name, a: (
        a.astype("float32") if a.dtype.kind == "i" else a))(state)),
    state_dict("all in float32", lambda model, state: each(lambda name, a: (
        a.astype("float32") if a.dtype.kind == "f" else a))(state)),
    state_dict("deviation for the variance", lambda model, state: each(lambda name, a: (
        np.sqrt(a) if name.endswith("running_var") else a))(state)),
    state_dict("weights transposed", lambda model, state: each(lambda name, a: (
        a.T if a.ndim == 2 else a))(state)),
]  # fmt: skip


# --- files ---------------------------------------------------------------------------------------


def writing(fault, change):
    """Return a mutant that writes `change(state)`."""

    def save(what, path):
        state = what.state_dict() if isinstance(what, nn.Module) else what
        nn.save(change(state), path)

    return storage(f"save: {fault}", save=save)


def reading(fault, change):
    """Return a mutant that makes `change(state)` of what was read."""
    return storage(f"load: {fault}", load=lambda path: change(nn.load(path)))


def as_it_lies(name, array):
    """Take the memory of an array for its values in order."""
    lies = array.T if array.flags.f_contiguous and not array.flags.c_contiguous else array
    return lies.ravel().reshape(array.shape)


def forwards(name, array):
    """Take the memory of a reversed array from its lowest address on."""
    reverse = array.ndim and array.strides[0] < 0
    return array[::-1] if reverse else array


def narrowed(name, array):
    return array.astype("float16") if array.dtype.name == "bfloat16" else array


FILES = [
    writing("Fortran order as it lies in memory", each(as_it_lies)),
    writing("reversed arrays from their lowest address", each(forwards)),
    writing("counter as int32", each(lambda name, a: (
        a.astype("int32") if a.dtype == "int64" else a))),
    writing("float64 as float32", each(lambda name, a: (
        a.astype("float32") if a.dtype == "float64" else a))),
    writing("all as float32", each(lambda name, a: a.astype("float32"))),
    writing("scalars as arrays of one", each(lambda name, a: a.reshape(1) if not a.ndim else a)),
    writing("flat", each(lambda name, a: a.ravel())),
    writing("flags as numbers", each(lambda name, a: (
        a.astype("uint8") if a.dtype == bool else a))),
    writing("empty arrays left out", lambda state: {
        name: v for name, v in state.items() if raw(v).size}),
    writing("running variance left out", without("running_var")),
    reading("float16 widened", each(lambda name, a: (
        a.astype("float32") if a.dtype == "float16" else a))),
    reading("bytes in the other order", each(lambda name, a: (
        a.byteswap() if a.dtype.kind == "f" else a))),
    reading("counter from 0", each(lambda name, a: (
        a * 0 if name.endswith("num_batches_tracked") else a))),
    reading("the first entry for all", each(lambda name, a: (
        np.full_like(a, a.flat[0]) if a.size else a))),
    writing("bfloat16 as float16", each(narrowed)),
    reading("bfloat16 as its bits", each(lambda name, a: (
        a.view("uint16") if a.dtype.name == "bfloat16" else a))),
]  # fmt: skip


# --- loading into a model ------------------------------------------------------------------------


def loading(fault, load_state_dict):
    return storage(f"load state: {fault}", load_state_dict=load_state_dict)


def loading_changed(fault, change):
    """Return a mutant that loads `change(model, state)`."""
    return loading(fault, lambda model, state, strict=True: nn.Module.load_state_dict(
        model, change(model, state), strict))  # fmt: skip


def sharing(model, state, strict=True):
    found = nn.Module.load_state_dict(model, state, strict)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and raw(state[name]).dtype == tensor.dtype:
            tensor.data = raw(state[name])
    return found


def in_the_dtype_that_comes(model, state, strict=True):
    found = nn.Module.load_state_dict(model, state, strict)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.data = raw(state[name]).copy()
    return found


def new_parameters(model, state, strict=True):
    found = nn.Module.load_state_dict(model, state, strict)
    for module in model.modules():
        for name, parameter in list(module._own_parameters()):
            setattr(module, name, nn.Parameter(parameter.data))
    return found


def never_strict(model, state, strict=True):
    return nn.Module.load_state_dict(model, state, strict=False)


def always_strict(model, state, strict=True):
    return nn.Module.load_state_dict(model, state)


def one_after_the_other(model, state, strict=True):
    """Write until something does not fit."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and tuple(raw(state[name]).shape) == tensor.shape:
            tensor.data[...] = raw(state[name])
    return nn.Module.load_state_dict(model, state, strict)


def unexpected_passed_over(model, state, strict=True):
    own = nn.Module.state_dict(model)
    known = {name: value for name, value in state.items() if name in own}
    found = nn.Module.load_state_dict(model, known, strict)
    return found if strict else Mismatch(found[0], [name for name in state if name not in own])


def missing_buffers_passed_over(model, state, strict=True):
    buffers = {name: b for name, b in model.named_buffers() if name not in state}
    found = nn.Module.load_state_dict(model, {**state, **buffers}, strict)
    return found if strict else Mismatch([n for n in nn.Module.state_dict(model) if (
        n not in state)], found[1])  # fmt: skip


def names_not_returned(model, state, strict=True):
    nn.Module.load_state_dict(model, state, strict)
    return Mismatch([], [])


def fitted(model, state):
    """Give what has another shape the one that is expected, as far as its entries go."""
    own = nn.Module.state_dict(model)
    return {
        name: np.resize(raw(value), own[name].shape) if name in own else value
        for name, value in state.items()
    }  # fmt: skip


def flattened(model, state):
    own = nn.Module.state_dict(model)
    return {
        name: raw(v).reshape(own[name].shape) if name in own and v.size == own[name].size else v
        for name, v in state.items()
    }  # fmt: skip


def broadcast(model, state):
    own = nn.Module.state_dict(model)
    return {
        name: np.broadcast_to(raw(v), own[name].shape) if name in own and v.size == 1 else v
        for name, v in state.items()
    }  # fmt: skip


def kept(end):
    """Keep the model's own value of what is named so."""
    return lambda model, state: {
        name: nn.Module.state_dict(model).get(name, v) if name.endswith(end) else v
        for name, v in state.items()
    }  # fmt: skip


def transposed_if_square(model, state):
    return each(lambda name, a: a.T if a.ndim == 2 and len(set(a.shape)) == 1 else a)(state)


LOADING = [
    loading("shares memory with the state", sharing),
    loading("in the dtype that comes", in_the_dtype_that_comes),
    loading("new parameters in the place of the old ones", new_parameters),
    loading("never strict", never_strict),
    loading("always strict", always_strict),
    loading("written until something does not fit", one_after_the_other),
    loading("unexpected names passed over", unexpected_passed_over),
    loading("missing buffers passed over", missing_buffers_passed_over),
    loading("what was passed over is not returned", names_not_returned),
    loading_changed("any shape made to fit", fitted),
    loading_changed("as many entries make it fit", flattened),
    loading_changed("one value broadcast", broadcast),
    loading_changed("square weights transposed", transposed_if_square),
    loading_changed("running mean passed over", kept("running_mean")),
    loading_changed("running variance passed over", kept("running_var")),
    loading_changed("counter passed over", kept("num_batches_tracked")),
    loading_changed("bias passed over", kept("bias")),
    loading_changed("by way of float16", lambda model, state: each(lambda name, a: (
        a.astype("float16") if a.dtype.kind == "f" else a))(state)),
]  # fmt: skip

SAVING = [*STATE_DICTS, *FILES, *LOADING]
RIGHT = (Mutant("state dicts and files", Storage(), as_storage),)
