"""`check_module`: a layer or network as a whole, its parameters, its state, its two modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.tape import TensorBase
from tinygrad_bn.testing.accumulation import check_accumulation
from tinygrad_bn.testing.agreement import check_backends, check_layouts
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.functions import as_tuple, input_names, is_floating, raw_inputs, tensors
from tinygrad_bn.testing.gradients import check_double_grad, check_grad
from tinygrad_bn.testing.invariants import check_dtypes, check_pure
from tinygrad_bn.testing.report import Report


def check_module(
    module: Any,
    *inputs: Any,
    double: bool = True,
    modes: tuple[str, ...] = ("train", "eval"),
    seed: int = 0,
) -> Report:
    """Return a report that `module` (an `nn.Module`) behaves as one at `inputs`.

    double: whether its gradients are differentiated too.
    modes: "train" and "eval", or one of them for a module that has no use for the other.
    seed: of the library's random generator, which is set again before every call.

    In each mode, as a function of its inputs and parameters: `check_grad`, `check_double_grad`,
    `check_pure`, `check_dtypes`, `check_layouts`, `check_accumulation`, and `check_backends` unless
    it draws random numbers, which are others on a GPU. Besides: train() and eval() reach every part
    and return the module; evaluation moves no buffer; the state dict holds every parameter, and
    loading it into a changed copy makes that the same again, to the bit; a deepcopy shares nothing
    with the original; zero_grad() clears every gradient. The module itself is left as it was: all
    is done on copies.

    Raises GradCheckError that says what does not hold, and in which mode.

    >>> from tinygrad_bn import nn, testing
    >>> x = np.random.default_rng(0).normal(size=(4, 3))
    >>> testing.check_module(nn.Linear(3, 2), x).notes
    ('modes train, eval', '2 parameters, 0 buffers')
    """
    title = type(module).__name__
    arrays = raw_inputs(inputs)
    parameters = [name for name, _ in module.named_parameters()]
    buffers = [name for name, _ in module.named_buffers()]
    _require_modes(title, module)
    _require_round_trip(title, module, arrays, seed)
    _require_apart(title, module, arrays, seed)
    comparisons: list[Any] = []
    vacuous: list[str] = []
    notes = [f"modes {', '.join(modes)}", f"{len(parameters)} parameters, {len(buffers)} buffers"]
    for mode in modes:
        subject = copy.deepcopy(module).train(mode == "train")
        fn: Any = as_function(subject, len(arrays), seed)
        fn.__name__ = f"{title} ({mode})"
        fn.input_labels = (
            *input_names(module.forward, len(arrays)),
            *(f"parameter {name!r}" for name in parameters),
        )
        everything = [*arrays, *(p.data for _, p in subject.named_parameters())]
        if any(map(is_floating, everything)):
            report = check_grad(fn, *everything, seed=seed)
            comparisons += report.comparisons
            vacuous += [f"{v} ({mode})" for v in report.vacuous]
            if double:
                comparisons += check_double_grad(fn, *everything, seed=seed).comparisons
        check_pure(fn, *everything, seed=seed)
        # Buffers keep their own dtype here, and may lend it to the outputs.
        check_dtypes(fn, *everything, outputs=not buffers, seed=seed)
        check_layouts(fn, *everything, seed=seed)
        check_accumulation(fn, *everything, seed=seed)
        if _draws(subject, arrays, seed):
            notes.append(f"backends not compared in {mode}: random numbers differ there")
        else:
            check_backends(fn, *everything, seed=seed)
        if mode == "eval":
            _require_still(title, subject, arrays, seed)
    return Report("check_module", title, tuple(comparisons), tuple(vacuous), tuple(notes))


def as_function(module: Any, count: int, seed: int = 0) -> Callable[..., Any]:
    """Return `module` as a function of `count` inputs and then its parameters, in order.

    Each call runs on a copy, so that buffers start from the same state every time, and where its
    inputs are.
    """

    def fn(*values: Any) -> Any:
        subject = copy.deepcopy(module)
        if (device := _device(values)) is not None:
            subject.to(device)
        given = zip(subject.parameters(), values[count:], strict=True)
        # By identity: a parameter that several parts share is replaced in all of them.
        replaced = {id(p): value for p, value in given}
        for part in subject.modules():
            attributes = vars(part)
            for name, value in list(attributes.items()):
                if id(value) in replaced:
                    attributes[name] = replaced[id(value)]
        backend.manual_seed(seed)
        return subject(*values[:count])

    return fn


def _device(values: Sequence[Any]) -> str | None:
    """Return where the first array or Tensor of them is."""
    return next((backend.device_of(_raw(v)) for v in values if v is not None), None)


def _draws(module: Any, arrays: list[Any], seed: int) -> bool:
    """Return whether the outputs depend on the random generator."""
    one, other = (_outputs(copy.deepcopy(module), arrays, s) for s in (seed, seed + 1))
    return any(a.tobytes() != b.tobytes() for a, b in zip(one, other, strict=True))


def _outputs(module: Any, arrays: list[Any], seed: int) -> list[Any]:
    """Return the raw outputs of a call that leaves no trace on the tape."""
    backend.manual_seed(seed)
    with no_grad():
        results = as_tuple(module(*tensors(arrays, False)), type(module).__name__)
    return [backend.to_numpy(o.data) for o in results]


def _state(module: Any) -> dict[str, np.ndarray]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: backend.to_numpy(t.data).copy() for name, t in named}


def _require_same(title: str, got: Any, want: Any, what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.tobytes() != b.tobytes():
            raise GradCheckError(f"check_module: {title}: output {i} {what}")


def _require_modes(title: str, module: Any) -> None:
    subject = copy.deepcopy(module)
    for call, mode in (("train", True), ("eval", False), ("train", True)):
        returned = getattr(subject, call)()
        if returned is not subject:
            raise GradCheckError(f"check_module: {title}: {call}() must return the module itself")
        for name, part in subject.named_modules():
            if part.training is not mode:
                raise GradCheckError(
                    f"check_module: {title}: {call}() leaves {name or 'the module'!r} with "
                    f"training={part.training}"
                )


def _require_round_trip(title: str, module: Any, arrays: list[Any], seed: int) -> None:
    """Raise unless a changed copy is the same again once the state dict is loaded into it."""
    original = copy.deepcopy(module).eval()
    saved = {key: backend.to_numpy(_raw(v)).copy() for key, v in original.state_dict().items()}
    for name, _ in original.named_parameters():
        if name not in saved:
            raise GradCheckError(f"check_module: {title}: the state dict lacks parameter {name!r}")
    changed = copy.deepcopy(original)
    with no_grad():
        for _, tensor in (*changed.named_parameters(), *changed.named_buffers()):
            if backend.is_floating(tensor.dtype):
                tensor[...] = tensor * 0.5 + 0.25
    changed.load_state_dict(saved)
    for key, value in changed.state_dict().items():
        if backend.to_numpy(_raw(value)).tobytes() != saved[key].tobytes():
            raise GradCheckError(f"check_module: {title}: loading the state dict misses {key!r}")
    _require_same(
        title,
        _outputs(changed, arrays, seed),
        _outputs(original, arrays, seed),
        "differs after a state dict round trip; some state is missing from it",
    )


def _require_apart(title: str, module: Any, arrays: list[Any], seed: int) -> None:
    """Raise unless a deepcopy computes the same, shares nothing, and clears its gradients."""
    original = copy.deepcopy(module).train()
    before = _state(original)
    twin = copy.deepcopy(original)
    pairs = zip(original.named_parameters(), twin.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        if backend.same_memory(mine.data, theirs.data):
            raise GradCheckError(f"check_module: {title}: a deepcopy shares parameter {name!r}")
    backend.manual_seed(seed)
    results = as_tuple(twin(*tensors(arrays, True)), title)
    floating = [o for o in results if o.requires_grad]
    for i, out in enumerate(floating):
        out.sum().backward(retain_graph=i < len(floating) - 1)
    for name, value in _state(original).items():
        if value.tobytes() != before[name].tobytes():
            raise GradCheckError(f"check_module: {title}: using a deepcopy changed {name!r}")
    touched = [name for name, p in original.named_parameters() if p.grad is not None]
    if touched:
        raise GradCheckError(f"check_module: {title}: a deepcopy's gradient went to {touched}")
    twin.zero_grad()
    left = [name for name, p in twin.named_parameters() if p.grad is not None]
    if left:
        raise GradCheckError(f"check_module: {title}: zero_grad() leaves a gradient on {left}")


def _require_still(title: str, module: Any, arrays: list[Any], seed: int) -> None:
    before = _state(module)
    first = _outputs(module, arrays, seed)
    for name, value in _state(module).items():
        if value.tobytes() != before[name].tobytes():
            raise GradCheckError(f"check_module: {title}: evaluation moved {name!r}")
    _require_same(title, _outputs(module, arrays, seed), first, "differs in a second evaluation")


def _raw(value: Any) -> Any:
    return value.data if isinstance(value, TensorBase) else value
