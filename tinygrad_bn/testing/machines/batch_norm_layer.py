"""Everything that `nn.BatchNorm` can be made as and told to do, against a model in longdouble."""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinygrad_bn import nn
from tinygrad_bn.autograd import grad
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.batch_norm_checks import require
from tinygrad_bn.testing.batch_norm_reference import WIDE, Expected, expected
from tinygrad_bn.testing.batch_norm_samples import Step, sampled
from tinygrad_bn.testing.errors import GradCheckError
from tinygrad_bn.testing.strategies.arrays import seeds
from tinygrad_bn.testing.strategies.batch_norm import BatchNormInputs

_START = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
_RUNNING = ("running_mean", "running_var")

#: By library: whether momentum weights the new value; default momentum, eps, correction and axis.
CONVENTIONS = {
    "torch": (True, 0.1, 1e-5, 1, 1),
    "keras": (False, 0.99, 1e-3, 0, -1),
    "flax": (False, 0.99, 1e-5, 0, -1),
    "chainer": (False, 0.9, 2e-5, 1, 1),
}


@dataclass
class _Waiting:
    """A forward pass that can still be differentiated, and what must come of it."""

    inputs: dict[str, Any]
    output: Any
    cotangent: np.ndarray
    right: Expected
    writes: int  # how many writes into the layer there had been


class BatchNormLayerMachine(RuleBasedStateMachine):
    """A batch norm layer with `nn.BatchNorm`'s constructor and methods, over its whole life.

    It is made with any convention and what the convention leaves to be chosen; with its channels
    known or to be found out; with or without weight, bias, statistics; with ghost batches. It sees
    batches in both modes, of all dtypes, masked, empty, too small or of a wrong size, and again
    while `recomputing`; it is frozen, converted, cast, reset, copied, saved and loaded. Output,
    gradients of any pending pass and state must be those of the formula in longdouble, a call that
    raises must leave no trace, and what repr and errors say of momentum must be what it does.

    make_layer: makes the layer under test, from the arguments of `nn.BatchNorm`.

    >>> from tinygrad_bn.testing.machines import run_machine
    >>> run_machine(BatchNormLayerMachine, max_examples=3, steps=10, seed=0).function
    'BatchNormLayerMachine'
    """

    channels = 2
    #: Whether the layer takes ghost batches, masks, and track_running_stats=False.
    takes_groups = takes_mask = may_lack_statistics = True

    layer: Any
    _drawn = 0

    def _rng(self, seed: int) -> np.random.Generator:
        """Return a generator for one batch or layer.

        Hypothesis repeats what it has drawn, seeds too: every use of one gives something new.
        """
        self._drawn += 1
        return np.random.default_rng((seed, self._drawn))

    def make_layer(self, num_features: int | None, **options: Any) -> Any:
        """Return a new layer."""
        return nn.BatchNorm(num_features, **options)

    @initialize(seed=seeds())
    def start(self, seed: int) -> None:
        """Make the layer and the model of what it must be; mostly train on some batches."""
        rng = self._rng(seed)

        def one_of(*values: Any) -> Any:
            return values[rng.integers(len(values))]

        convention = one_of(*CONVENTIONS)
        self.weights_new, momentum, self.eps, self.correction, self.axis = CONVENTIONS[convention]
        given = one_of({}, {}, {"momentum": None}, {"momentum": 0.25, "eps": 1e-2})
        given |= one_of({}, {}, {"correction": 0}, {"correction": 1}, {"axis": 1}, {"axis": -1})
        self.eps = given.get("eps", self.eps)
        self.correction = given.get("correction", self.correction)
        self.axis = given.get("axis", self.axis)
        w = given.get("momentum", momentum)
        self.weight_of_new = w if w is None or self.weights_new else 1 - w
        affine = one_of({}, {}, {"affine": False}, {"scale": False}, {"center": False})
        self.options: dict[str, Any] = {"convention": convention, **given, **affine}
        self.groups = one_of(1, 1, 2) if self.takes_groups else 1
        if self.groups > 1:
            self.options["groups"] = self.groups
        self.tracked = not (self.may_lack_statistics and one_of(False, False, False, False, True))
        if not self.tracked:
            self.options["track_running_stats"] = False
        dtype = one_of(None, "float64", "float16")
        if dtype:
            self.options["dtype"] = dtype
        self.sized = one_of(True, True, False)
        self.layer = self.make_layer(self.channels if self.sized else None, **self.options)
        self._wrong_momentum_is_refused(convention)
        names = ["weight"] * affine.get("scale", affine.get("affine", True))
        names += ["bias"] * affine.get("center", affine.get("affine", True))
        names += _RUNNING if self.tracked else ()
        self.state = {name: np.full(self.channels, _START[name], WIDE) for name in names}
        #: What the latest steps of the statistics started from: sums may cancel.
        self.terms: dict[str, Any] = {}
        self.count = self.writes = 0
        self.training, self.frozen, self.fixed = True, False, False
        self.waiting: list[_Waiting] = []
        self.saved: Any = None
        self.left: Any = None
        self.layer_has_the_state_of_the_model()
        if self.sized and one_of(False, True, True):
            self.update_parameters(seed)
        if one_of(False, True, True):
            self.train(seed)

    def _wrong_momentum_is_refused(self, convention: str) -> None:
        words = f"weight of the {'new' if self.weights_new else 'old'} value"
        try:
            self.make_layer(self.channels, convention=convention, momentum=1.5)
        except ValueError as error:
            if words in str(error):
                return
            raise GradCheckError(f"the error about momentum does not say {words!r}") from error
        raise GradCheckError("a momentum of 1.5 was accepted")

    @rule(seed=seeds())
    def another_layer(self, seed: int) -> None:
        """Leave this layer and begin with another."""
        self.start(seed)

    # --- passes ----------------------------------------------------------------------------------

    @rule(seed=seeds())
    def train(self, seed: int) -> None:
        """Run the layer on one to three new batches in training; the results stay pending."""
        for i in range(1 + seed % 3):
            self._forward(True, seed + i)

    @rule(seed=seeds())
    def evaluate(self, seed: int) -> None:
        """Run the layer on a new batch in evaluation."""
        self._forward(False, seed)

    @rule(training=st.booleans(), seed=seeds())
    def recompute(self, training: bool, seed: int) -> None:
        """Run it on a batch as if again: what it computes is the same, and nothing moves."""
        self._forward(training, seed, recompute=True)

    @precondition(lambda self: self.takes_mask)
    @rule(training=st.booleans(), seed=seeds())
    def masked(self, training: bool, seed: int) -> None:
        """Run it on a part of a batch, which may be too small to say anything."""
        self._forward(training, seed, masked=True)

    def _forward(
        self, training: bool, seed: int, masked: bool = False, recompute: bool = False
    ) -> None:
        self._set_mode(training)
        d, frequency = self._batch(self._rng(seed), masked)
        by_the_batch = not self.tracked or (training and not self.frozen)
        if by_the_batch and frequency is not None:
            d = replace(d, x=np.where(frequency > 0, d.x, d.x.dtype.type(np.nan)))
        right, step = self._right(d, frequency, by_the_batch, recompute)
        x = Tensor(d.x.copy(), requires_grad=True)
        arguments = (x,) if frequency is None else (x, frequency)
        with self.layer.recomputing() if recompute else contextlib.nullcontext():
            y = self.layer(*arguments)
        self.sized = True
        if y.dtype != x.dtype:
            raise GradCheckError(f"the output is {y.dtype} for x of {x.dtype}")
        require(right, y=y.numpy())
        if step is not None and self.tracked and training and not recompute:
            self.writes += 1  # where nothing counts too: the values are the same, but written
            self._move(step)
        inputs = {"gx": x, "gweight": self.layer.weight, "gbias": self.layer.bias}
        inputs = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
        self.waiting.append(_Waiting(inputs, y, d.cotangent, right, self.writes))

    def _set_mode(self, training: bool) -> None:
        if training != self.training:
            self.layer.train() if training else self.layer.eval()
            self.training = training

    def _right(
        self, d: BatchNormInputs, frequency: Any, by_the_batch: bool, recompute: bool
    ) -> tuple[Expected, Step | None]:
        """Return what a forward pass must give, and the step that the statistics must make."""
        if by_the_batch:
            groups = self.groups
            return sampled(d, frequency=frequency, groups=groups, correction=self.correction)
        given = d.running_mean, d.running_var
        right = expected(d.x, d.weight, d.bias, d.cotangent, eps=d.eps, axis=d.axis, given=given)
        return right, None

    def _move(self, step: Step) -> None:
        if not step.counted:
            return
        w = WIDE(1 / (self.count + 1) if self.weight_of_new is None else self.weight_of_new)
        for name, new in zip(_RUNNING, (step.mean, step.var), strict=True):
            self.terms[name] = self.terms.get(name, 0) + np.abs(self.state[name])
            self.state[name] = (1 - w) * self.state[name] + w * new
        self.count += 1

    def _batch(self, rng: Any, masked: bool = False) -> tuple[BatchNormInputs, Any]:
        """Return a batch, and a mask that leaves some or too few of its values."""
        rows, *spatial = [(3,), (2, 3), (4, 1, 2), (3, 2, 2)][rng.integers(4)]
        rows, channels = rows * self.groups, self.channels
        last = self.axis % (2 + len(spatial)) != 1
        shape = (rows, *spatial, channels) if last else (rows, channels, *spatial)
        along = tuple(n if i == self.axis % len(shape) else 1 for i, n in enumerate(shape))
        x = rng.uniform(0.5, 2.0, along) * rng.standard_normal(shape) + rng.choice(
            [0.0, 1.0, -30.0]
        )
        g = rng.uniform(0.5, 1.5, shape) * rng.choice((-1.0, 1.0), shape)
        frequency = None
        if masked:
            frequency = rng.integers(0, 3, (rows, *[1] * (len(shape) - 1))).astype("float64")
            if rng.random() < 0.3:
                frequency[: rows // self.groups] = 0
                frequency.flat[0] = rng.integers(0, 2)
        dtype = ("float64", "float32", "float16")[rng.integers(3)]
        state = {name: self.state.get(name) for name in _START}
        # The running statistics go unused where there are none.
        state |= {name: np.ones(channels) for name in _RUNNING if state[name] is None}
        options = {"training": True, "momentum": 0.0, "eps": self.eps, "axis": self.axis}
        x, g = x.astype(dtype), g.astype(dtype)
        drawn: Any = {**state, **options}
        return BatchNormInputs(x=x, cotangent=g, **drawn), frequency

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), keep=st.booleans())
    def backward(self, data: Any, keep: bool) -> None:
        """Differentiate any pending pass, not only the last; sometimes to do it again."""
        i = data.draw(st.integers(0, len(self.waiting) - 1))
        one = self.waiting[i] if keep else self.waiting.pop(i)
        inputs = {name: t for name, t in one.inputs.items() if t.requires_grad}
        try:
            found = grad(
                one.output, list(inputs.values()), Tensor(one.cotangent), retain_graph=keep
            )
        except RuntimeError:
            if one.writes == self.writes:
                raise
            return  # something was written since, and it was noticed
        require(one.right, **{n: g.numpy() for n, g in zip(inputs, found, strict=True)})

    @rule(seed=seeds())
    def odd_batches(self, seed: int) -> None:
        """An empty batch passes, impossible ones are refused; none leaves a trace."""
        self._set_mode(True)
        x = self._batch(self._rng(seed))[0].x.astype("float32")
        if self.sized:
            self._refused(np.concatenate([x, x], axis=self.axis), "other channels")
        if not self.frozen:  # evaluation takes any number of values
            few = x[: self.groups].reshape((self.groups, -1, self.channels))[:, 0]
            self._refused(few, "one value per channel")
        self._refused(x.astype(int), "integers")
        if self.layer(x[:0]).shape != x[:0].shape:
            raise GradCheckError("an empty batch does not give an empty result")
        self.sized = True

    def _refused(self, x: np.ndarray, what: str) -> None:
        try:
            self.layer(x)
        except (ValueError, TypeError):
            self.sized = self.layer.num_features is not None
            self.layer_has_the_state_of_the_model()
            return
        raise GradCheckError(f"x of {x.dtype}{list(x.shape)} was accepted in training: {what}")

    # --- changes ---------------------------------------------------------------------------------

    @precondition(lambda self: self.sized)
    @rule(seed=seeds())
    def update_parameters(self, seed: int) -> None:
        """Write new values into weight and bias, as an optimizer does; the weight may become 0."""
        rng = self._rng(seed)
        for name in ("weight", "bias"):
            if name in self.state:
                value = rng.uniform(-2, 2, self.channels) * (rng.random(self.channels) < 0.8)
                parameter = getattr(self.layer, name)
                with no_grad():
                    parameter[...] = np.round(value, 2).astype(parameter.dtype)
                self.state[name] = parameter.numpy().astype(WIDE)
        self.writes += 1

    @precondition(lambda self: self.tracked)
    @rule(parameters=st.booleans(), stay=st.booleans(), seed=seeds())
    def freeze(self, parameters: bool, stay: bool, seed: int) -> None:
        """Fix the statistics, and if asked the parameters; training then evaluates."""
        self.layer.freeze(parameters)
        self.frozen = True
        self.fixed = self.fixed or parameters
        self._forward(True, seed)
        self.layer_has_the_state_of_the_model()
        if not stay:
            self.unfreeze()

    @precondition(lambda self: self.frozen)
    @rule()
    def unfreeze(self) -> None:
        """Undo it, for parameters too."""
        self.layer.unfreeze()
        self.frozen = self.fixed = False

    @precondition(lambda self: self.tracked)
    @rule(seed=seeds())
    def convert(self, seed: int) -> None:
        """Change over to other conventions, for batches of other sizes."""
        rng = self._rng(seed)
        for convention in rng.permutation(sorted(CONVENTIONS))[:3]:
            self._convert(str(convention), int(rng.integers(2, 40)))
            self.layer_has_the_state_of_the_model()
            self._forward(True, seed)  # which shows what momentum has become
            self.layer_has_the_state_of_the_model()

    def _convert(self, convention: str, m: int) -> None:
        self.layer.convert(convention, count=m)
        self.weights_new, _, _, correction, _ = CONVENTIONS[convention]
        if self.count:
            factor = WIDE(m - self.correction) / WIDE(m - correction)
            self.state["running_var"] = self.state["running_var"] * factor
        self.correction = correction
        w = self.weight_of_new
        momentum = None if w is None else w if self.weights_new else 1 - w
        given = {"convention": convention, "correction": correction, "momentum": momentum}
        self.options = {**self.options, **given, "eps": self.eps, "axis": self.axis}
        self.writes += 1

    @rule()
    def reset(self) -> None:
        """Set statistics and counter back to their start."""
        self.layer.reset_running_stats()
        for name in _RUNNING:
            if self.tracked:
                self.state[name] = np.full(self.channels, _START[name], WIDE)
        self.count = 0
        self.writes += 1

    @rule(dtype=st.sampled_from(["float64", "float32", "float16"]))
    def cast(self, dtype: str) -> None:
        """Cast the layer; its statistics stay at float32 or wider."""
        self.layer.astype(dtype)
        self.writes += 1

    @precondition(lambda self: self.sized)
    @rule()
    def save(self) -> None:
        """Keep the state dict as it is now."""
        self.saved = _values(self.layer), dict(self.state), self.count

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        """Load what was saved last."""
        self._load(*self.saved)

    @precondition(lambda self: self.sized)
    @rule(sized=st.booleans())
    def move_to_a_new_layer(self, sized: bool) -> None:
        """Go on with a new layer, which may not know its channels, and the state of the old one."""
        kept = _values(self.layer)
        self.layer = self.make_layer(self.channels if sized else None, **self.options)
        self.layer.train(self.training)
        self.frozen = self.fixed = False
        self.sized = sized
        self._load(kept, self.state, self.count)

    def _load(self, arrays: dict[str, np.ndarray], state: dict[str, Any], count: int) -> None:
        self.state, self.count = dict(state), count
        self.layer.load_state_dict({name: array.copy() for name, array in arrays.items()})
        self.sized = self.sized or bool(state)  # sizes are read off whatever there is
        self.writes += 1

    @rule()
    def go_on_with_a_copy(self) -> None:
        """Go on with a deep copy; what happens to it must not reach the original."""
        self.left = self.layer, _values(self.layer)
        self.layer = copy.deepcopy(self.layer)

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def layer_has_the_state_of_the_model(self) -> None:
        """Raise GradCheckError unless parameters, statistics, counter and mode are as they must."""
        if not hasattr(self, "layer"):
            return
        layer = self.layer
        for name in _START:
            tensor = getattr(layer, name)
            if (tensor is None) != (name not in self.state):
                raise GradCheckError(f"{name} is {tensor}, which is not what was asked for")
            if tensor is not None and tensor.dtype.itemsize < 4:
                raise GradCheckError(f"{name} is kept in {tensor.dtype}, expected at least float32")
            if tensor is not None and self.sized:
                self._require(name, tensor.numpy())
        counter = layer.num_batches_tracked
        if (counter is None) == self.tracked or (self.tracked and int(counter) != self.count):
            raise GradCheckError(f"num_batches_tracked is {counter}, expected {self.count}")
        if layer.training != self.training:
            raise GradCheckError(f"training is {layer.training}, expected {self.training}")
        self._text_says_what_is_done()
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad == self.fixed:
                raise GradCheckError(f"{name}.requires_grad is {parameter.requires_grad}")
        if self.left is not None:
            original, before = self.left
            for name, value in _values(original).items():
                if value.tobytes() != before[name].tobytes():
                    raise GradCheckError(f"using a deepcopy changed {name!r} of the original")

    def _text_says_what_is_done(self) -> None:
        text, w = repr(self.layer), self.weight_of_new
        said = re.search(r"momentum=(\S+) \((weight of the new|weight of the old|average)", text)
        if said is None:
            right = False
        elif w is None or said[2] == "average":
            right = w is None and said[2] == "average"
        else:
            new = float(said[1]) if said[2].endswith("new") else 1 - float(said[1])
            right = abs(new - w) < 1e-9
        right = right and ("running_var is biased" in text) == (self.correction == 0)
        if not right or ("frozen=True" in text) != self.frozen:
            raise GradCheckError(
                f"repr is {text}, for weight of the new value {w}, correction {self.correction}, "
                f"frozen {self.frozen}"
            )

    def _require(self, name: str, found: np.ndarray) -> None:
        """Raise GradCheckError unless a parameter or statistic is what it must be."""
        want = self.state[name]
        scale = np.abs(want) + self.terms.pop(name, 0)
        if name == "running_mean":
            scale = scale + np.sqrt(self.state["running_var"])
        # 64 units of float32, or of the dtype if that is wider: a step is a handful of operations.
        tolerance = 64 * float(np.finfo(found.dtype).eps) * scale
        if found.shape != want.shape or not np.all(np.abs(found.astype(WIDE) - want) <= tolerance):
            raise GradCheckError(
                f"{name} is {found.tolist()}, expected {want.astype(float).tolist()} (correction "
                f"{self.correction}, weight of the new value {self.weight_of_new}, eps {self.eps}, "
                f"{self.count} batches, made with {self.options})"
            )
        # From here on with the digits that the layer has: errors do not add up.
        self.state[name] = found.astype(WIDE)


def _values(layer: Any) -> dict[str, np.ndarray]:
    return {name: np.array(t.numpy()) for name, t in layer.state_dict().items()}
