"""What all optimizers share: parameter groups, their options, and the state they keep."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from tinygrad_bn.backend import array_module, cast, device_of, float32, kernels, placed
from tinygrad_bn.backend.creation import like
from tinygrad_bn.backend.recording import CaptureError, each_time, must_stay, number, watching
from tinygrad_bn.tape import TensorBase
from tinygrad_bn.tensor import Tensor

Params = Iterable[Any]  # of Tensors, or of groups: mappings with "params" and options
#: Group, parameter, raw gradient and state of a parameter that is to be updated.
Ready = tuple[dict[str, Any], Any, Any, dict[str, Any]]


class Optimizer:
    """Updates parameters in place from their gradients, one step at a time.

    params: Tensors, or mappings that hold Tensors under "params" and, beside them, options that
        hold for this group alone.

    `param_groups` is a list of dicts, each with "params" and every option; a schedule, or anyone,
    may set an option between steps: `optimizer.param_groups[0]["lr"] = 0.1`, or `optimizer.lr`
    for all groups at once. Parameters without a gradient are passed over.

    A subclass checks its options in `_check` and updates one parameter in `_update`. Beside that it
    may name modules of fused kernels, by family, in `kernels`: these have `served`, which says
    whether a parameter can be updated, given its gradient and state, and `step`, which updates many
    at once and which `_update_many` calls. (They stand for the `_update` of the class that names
    them: a subclass with another is not served by them unless it names them again.)

    >>> import tinygrad_bn as tg
    >>> class Descent(tg.optim.Optimizer):
    ...     def _check(self, options):
    ...         self._at_least_zero("lr", options["lr"])
    ...
    ...     def _update(self, p, g, state, options):
    ...         p -= options["lr"] * g
    >>> p = tg.nn.Parameter([2.0, -3.0])
    >>> (p * p).sum().backward()
    >>> Descent([p], lr=0.25).step()
    >>> p.tolist()
    [1.0, -1.5]
    """

    #: What `_update` keeps for each parameter: names of arrays of its shape.
    slots: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[Mapping[str, str]] = {}

    def __init__(self, params: Params, **defaults: Any):
        self.param_groups: list[dict[str, Any]] = []
        #: Parameter, by identity -> what `_update` keeps for it, and the count of its steps.
        self._state: dict[Any, dict[str, Any]] = {}
        self._defaults = defaults
        self._scratch: dict[Any, Any] = {}
        self._numbers: dict[Any, Any] = {}
        groups: list[Any] = [params] if isinstance(params, (TensorBase, Mapping)) else list(params)
        if not groups:
            raise ValueError(f"{self._name}: got no parameters; pass model.parameters()")
        if not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters under "params", with the options that differ for them beside it."""
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(
                f"{self._name}: got {type(group).__name__} as a group, expected Tensors alone or "
                f"mappings with 'params' alone"
            )
        unknown = set(group) - set(self._defaults) - {"params"}
        if unknown:
            raise ValueError(
                f"{self._name}: unknown options {sorted(unknown)}, expected some of "
                f"{sorted(self._defaults)}"
            )
        params = group["params"]
        params = [params] if isinstance(params, TensorBase) else list(params)
        known = {id(p) for g in self.param_groups for p in g["params"]}
        for i, parameter in enumerate(params):
            if not isinstance(parameter, TensorBase):
                raise TypeError(
                    f"{self._name}: parameter {i} is a {type(parameter).__name__}, expected a "
                    f"Tensor; raw arrays have no gradients"
                )
            if parameter.node is not None:
                raise ValueError(
                    f"{self._name}: parameter {i} is the result of an op, expected a leaf; "
                    f"optimize what it was made from, or .detach() it"
                )
            if id(parameter) in known:
                raise ValueError(
                    f"{self._name}: parameter {i} of shape {parameter.data.shape} was given twice, "
                    f"and would be updated twice a step; give each once, as model.parameters() does"
                )
            known.add(id(parameter))
        options = {**self._defaults, **{k: v for k, v in group.items() if k != "params"}}
        self._check(options)
        self.param_groups.append({"params": params, **options})

    # --- the learning rate -----------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """The learning rate of the first group; setting it sets that of all."""
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        self._at_least_zero("lr", value)
        for group in self.param_groups:
            group["lr"] = float(value)

    # --- stepping --------------------------------------------------------------------------------

    def step(self) -> None:
        """Update every parameter that has a gradient, in place.

        Not recorded by the tape; a backward that still needs the old values raises.
        """
        self._numbers = {}
        ready = list(self._ready())
        each_time(partial(self._begin, [state for *_, state in ready]))
        for group, parameter, g, state in self._without_the_served(ready):
            with placed(f"{self._name}.step", (parameter.data, g)):
                self._update(parameter.data, g, state, group)
            parameter.note_write()
        watch = watching()
        if watch is not None and watch.recording:
            self._rely_on(watch)

    def _without_the_served(self, ready: list[Ready]) -> list[Ready]:
        """Update what a kernel serves, many parameters at once, and return the rest."""
        # Not those of a base class whose `_update` is not the one in use.
        owner = next(kind for kind in type(self).__mro__ if "_update" in vars(kind))
        modules = vars(owner).get("kernels")
        if not modules:
            return ready
        left: list[Ready] = []
        together: dict[Any, list[Ready]] = {}
        for one in ready:
            group, parameter, g, state = one
            p = parameter.data
            kept = [state[name] for name in self.slots if name in state]
            served = next(kernels.candidates(modules, "served", (p,)), None)
            if served is None or not served(p, g, *kept):
                left.append(one)
                continue
            # What one launch has in common: options, bias corrections, and whether there is state.
            key = id(group), device_of(p), p.dtype, state["step"], len(kept)
            together.setdefault(key, []).append(one)
        for some in together.values():
            arrays = [array for _, parameter, g, _ in some for array in (parameter.data, g)]
            with placed(f"{self._name}.step", arrays):
                self._update_many(next(kernels.candidates(modules, "step", arrays)), some)
            for _, parameter, *_ in some:
                parameter.note_write()
        return left

    def _ready(self) -> Iterator[Ready]:
        """Yield group, parameter, raw gradient and state of all that has a gradient."""
        watch: Any = watching()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if watch is not None:
                    watch.saw_gradient(parameter)
                g = parameter.grad.data
                if g.shape != parameter.data.shape:
                    raise ValueError(
                        f"{self._name}.step: a parameter of shape {parameter.data.shape} has a "
                        f"gradient of shape {g.shape}; they must be equal"
                    )
                state = self._state.setdefault(parameter, {"step": 0})
                for name in self.slots:
                    if name in state:  # the parameter may have moved to another device
                        state[name] = like(state[name], parameter.data)
                yield group, parameter, g, state

    def _begin(self, states: Iterable[dict[str, Any]]) -> None:
        """Begin a step: look at the options, which anyone may have set, and count it."""
        for group in self.param_groups:
            self._check(group)
        for state in states:
            state["step"] += 1

    def zero_grad(self) -> None:
        """Set `.grad` of every parameter to None."""
        each_time(self._drop_gradients)

    def _drop_gradients(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option that makes no sense."""
        raise NotImplementedError

    def _update(self, p: Any, g: Any, state: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Update the raw parameter `p` in place from its raw gradient `g`, which stays as it is."""
        raise NotImplementedError

    def _update_many(self, kernel: Callable[..., None], some: Sequence[Ready]) -> None:
        """Update parameters of one group, dtype and count of steps by a kernel's `step`."""
        raise NotImplementedError

    # --- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the options of all groups and what is kept for each parameter.

        As PyTorch's: `{"state": {index: {name: Tensor or number}}, "param_groups": [...]}`, with
        parameters by their index over all groups. The Tensors share memory with the optimizer:
        `copy.deepcopy` them to keep a moment.
        """
        index = {id(p): i for i, p in enumerate(self._parameters())}
        groups = [{**g, "params": [index[id(p)] for p in g["params"]]} for g in self.param_groups]
        state = {
            index[id(parameter)]: {k: Tensor(v) if k in self.slots else v for k, v in kept.items()}
            for parameter, kept in self._state.items()
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over options and state from a `state_dict()` of an optimizer of the same kind.

        Raises ValueError, before anything is changed, if groups, parameters or shapes differ.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        ours = [len(g["params"]) for g in self.param_groups]
        theirs = [len(g["params"]) for g in groups]
        problems = []
        if ours != theirs:
            problems.append(f"it has groups of {theirs} parameters, expected {ours}")
        parameters = dict(enumerate(self._parameters()))
        loaded: dict[Any, dict[str, Any]] = {}
        for i, kept in state.items():
            if i not in parameters:
                problems.append(
                    f"it has state for a parameter {i}, expected 0 to {len(parameters) - 1}"
                )
                continue
            p = parameters[i].data
            fresh = loaded[parameters[i]] = {}
            for name, value in kept.items():
                if name not in self.slots:
                    fresh[name] = value
                    continue
                raw = value.data if isinstance(value, TensorBase) else value
                if tuple(raw.shape) != p.shape:
                    problems.append(
                        f"{name} of parameter {i} has shape {tuple(raw.shape)}, expected {p.shape}"
                    )
                    continue
                fresh[name] = cast(like(raw, p), _state_dtype(p))
        if problems:
            raise ValueError(
                f"{self._name}.load_state_dict: the state does not fit, and nothing was loaded:\n  "
                + "\n  ".join(problems)
            )
        for group, incoming in zip(self.param_groups, groups, strict=True):
            group.update({k: incoming[k] for k in self._defaults if k in incoming})
        self._state = loaded

    def __repr__(self) -> str:
        groups = [
            ", ".join(f"{k}={v}" for k, v in g.items() if k != "params") for g in self.param_groups
        ]
        return f"{self._name}({'; '.join(groups)})"

    # --- for subclasses --------------------------------------------------------------------------

    def _parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def _at_least_zero(self, name: str, value: Any) -> None:
        if not (float(value) >= 0 and math.isfinite(float(value))):
            raise ValueError(f"{self._name}: {name} is {value}, expected a finite number >= 0")

    def _number(self, name: str, like: Any, value: Callable[[], float], *key: Any) -> Any:
        """Return `value()` for arithmetic with the array `like`, so that it may differ in replays.

        name, key: what it depends on within one step; parameters that agree in it share it.
        """
        key = (name, like.dtype, device_of(like), *key)
        if key not in self._numbers:
            self._numbers[key] = number(value, like)
        return self._numbers[key]

    def _new_state(self) -> None:
        """Note that state is being made, which a replay would make again and again."""
        watch = watching()
        if watch is not None and watch.recording:
            raise CaptureError(
                f"capture: {self._name} meets the first gradient of a parameter while the step is "
                f"being recorded, and replays would start its state anew; use every parameter from "
                f"the first step on"
            )

    def _rely_on(self, watch: Any) -> None:
        """Tell what replays of this step rely on, beside parameters and gradients."""
        idle = [p for p in self._parameters() if p.grad is None]
        settings = [_settings(group) for group in self.param_groups]
        states = {p: self._arrays_of(p) for p in self._state}
        scratch = dict(self._scratch)
        for what, holds in (
            ("an option of an optimizer is another", lambda: _are(self.param_groups, settings)),
            ("a parameter has a gradient", lambda: all(p.grad is None for p in idle)),
            (
                "the state of an optimizer is another",
                lambda: all(_identical(self._arrays_of(p), kept) for p, kept in states.items()),
            ),
            # A graph writes into these for as long as it is replayed.
            ("an optimizer has other scratch memory", lambda: _identical(self._scratch, scratch)),
        ):
            must_stay(what, holds)

    def _arrays_of(self, parameter: Any) -> dict[str, Any]:
        state = self._state.get(parameter, {})
        return {name: state[name] for name in self.slots if name in state}

    def _zeros(self, p: Any) -> Any:
        """Return zeros of the shape of `p`, in the dtype that state is kept in."""
        self._new_state()
        return array_module(p).zeros(p.shape, dtype=_state_dtype(p))

    def _temporary(self, p: Any) -> Any:
        """Return uninitialised memory of the shape of `p`, for use within one update only.

        One block serves all parameters: fresh memory for each would have to be mapped anew.
        """
        dtype = _state_dtype(p)
        key = (device_of(p), dtype)
        block = self._scratch.get(key)
        if block is None or block.size < p.size:
            block = self._scratch[key] = array_module(p).empty(p.size, dtype=dtype)
        return block[: p.size].reshape(p.shape)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group but the learning rate, which may differ from step to step."""
    kept = {name: value for name, value in group.items() if name != "lr"}
    return {**kept, "params": list(group["params"])}


def _are(groups: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the options of all groups are still these."""
    if len(groups) != len(settings):
        return False
    for group, before in zip(groups, settings, strict=True):
        now = _settings(group)
        params, were = now.pop("params"), before["params"]
        if len(params) != len(were) or not all(map(operator.is_, params, were)):
            return False
        if any(value != before[name] for name, value in now.items()):
            return False
    return True


def _identical(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Return whether two mappings hold the very same objects."""
    return now.keys() == before.keys() and all(now[key] is before[key] for key in before)


def in_state_dtype(g: Any) -> Any:
    """Return `g` in the dtype that state is kept in."""
    dtype = _state_dtype(g)
    return g if g.dtype == dtype else g.astype(dtype)


def add_to(p: Any, change: Any, keep: Any = None) -> None:
    """Add `change`, of the dtype of state, to `p`, of which `keep` is kept (None: all), in place.

    Half precision is rounded once, at the end: the decay alone, or the change, would often be less
    than half a unit of `p`, and lost where their sum is not.
    """
    wide = in_state_dtype(p)
    if keep is not None:
        wide *= keep
    wide += change
    if wide is not p:
        p[...] = wide


def _state_dtype(p: Any) -> Any:
    """Return the dtype of `p`, or float32 for half precision: squares of gradients need it."""
    return p.dtype if p.dtype.itemsize >= 4 else float32
