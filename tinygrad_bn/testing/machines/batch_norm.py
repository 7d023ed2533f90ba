"""A batch norm module over its whole life, against a model in longdouble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinygrad_bn import nn
from tinygrad_bn.autograd import grad
from tinygrad_bn.grad_mode import no_grad
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.errors import GradCheckError

Array = np.ndarray
_WIDE = np.longdouble
_SEEDS = st.integers(0, 2**16)


@dataclass
class _Pending:
    """A forward pass that can still be differentiated, with what its gradients must be."""

    inputs: list[Any]
    output: Any
    cotangent: Array
    expected: list[Array]
    scales: list[Array]
    writes: int  # how many writes into the module there had been


class BatchNormMachine(RuleBasedStateMachine):
    """Forward in either mode, backward of any pending pass, save/load, parameter updates.

    The model keeps parameters, running statistics, the counter and the mode; after every step the
    module must have the same. Outputs and gradients must be those of the formula, evaluated in
    longdouble at what parameters and statistics were in the *forward*. A backward pass after a
    write to one of them may raise RuntimeError instead (and nothing else).

    make_module: makes the module under test. correction: of its running variance. momenta: the
    values tried; None is the cumulative average. dtypes: of the input.

    >>> from hypothesis import settings
    >>> from hypothesis.stateful import run_state_machine_as_test
    >>> short = settings(max_examples=3, stateful_step_count=5, deadline=None, derandomize=True)
    >>> run_state_machine_as_test(BatchNormMachine, settings=short)
    """

    channels = 2
    correction: float = 1
    momenta: tuple[float | None, ...] = (0.1, 0.3, 1.0, None)
    dtypes: tuple[str, ...] = ("float32", "float64")

    module: Any

    def make_module(self, num_features: int, eps: float, momentum: float | None) -> Any:
        """Return a new module with weight, bias, running statistics and a counter of batches."""
        return nn.BatchNorm(num_features, eps, momentum)

    @initialize(data=st.data(), eps=st.sampled_from([1e-5, 1e-2]))
    def start(self, data: Any, eps: float) -> None:
        """Make the module, and the model of what it must be at the start."""
        self.eps = eps
        self.momentum = data.draw(st.sampled_from(self.momenta))
        self.dtype = np.dtype(data.draw(st.sampled_from(self.dtypes)))
        self.module = self.make_module(self.channels, eps, self.momentum)
        self.training = True
        self.state = {
            "weight": np.ones(self.channels, _WIDE),
            "bias": np.zeros(self.channels, _WIDE),
            "running_mean": np.zeros(self.channels, _WIDE),
            "running_var": np.ones(self.channels, _WIDE),
        }
        self.count = 0
        self.writes = 0
        self.pending: list[_Pending] = []
        self.saved: tuple[dict[str, Array], dict[str, Array], int] | None = None

    # --- passes ----------------------------------------------------------------------------------

    @rule(
        training=st.booleans(),
        seed=_SEEDS,
        batch=st.integers(2, 5),
        spatial=st.sampled_from([(), (3,), (2, 2)]),
        offset=st.sampled_from([0.0, 1.0, -30.0]),
    )
    def forward(
        self, training: bool, seed: int, batch: int, spatial: tuple[int, ...], offset: float
    ) -> None:
        """Run the module on a new batch, in either mode; the result stays pending."""
        if training != self.training:
            self.module.train() if training else self.module.eval()
            self.training = training
        rng = np.random.default_rng(seed)
        shape = (batch, self.channels, *spatial)
        spread = rng.uniform(0.5, 2.0, (self.channels, *[1] * len(spatial)))
        values = offset + spread * rng.standard_normal(shape)
        x = Tensor(values.astype(self.dtype), requires_grad=True)
        kept = x.numpy().copy()
        y = self.module(x)
        cotangent = rng.uniform(0.5, 1.5, shape) * rng.choice((-1.0, 1.0), shape)
        cotangent = cotangent.astype(self.dtype)
        out, out_scale, expected, scales = self._formula(kept, cotangent)
        self._require("the output", y.numpy(), out, out_scale)
        if not np.array_equal(x.numpy(), kept):
            raise GradCheckError("the forward pass changed its input")
        inputs = [x, self.module.weight, self.module.bias]
        if self.training:
            self._count_batch(kept)
            self.writes += 1
        self.pending.append(_Pending(inputs, y, cotangent, expected, scales, self.writes))

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), keep=st.booleans())
    def backward(self, data: Any, keep: bool) -> None:
        """Differentiate any pending pass, not only the last; sometimes to do it again."""
        i = data.draw(st.integers(0, len(self.pending) - 1))
        one = self.pending[i] if keep else self.pending.pop(i)
        try:
            found = grad(one.output, one.inputs, Tensor(one.cotangent), retain_graph=keep)
        except RuntimeError:
            if one.writes == self.writes:
                raise
            return  # something was written since, and it was noticed
        names = ("x", "weight", "bias")
        for name, g, want, scale in zip(names, found, one.expected, one.scales, strict=True):
            self._require(f"the gradient of {name}", g.numpy(), want, scale)

    # --- changes ---------------------------------------------------------------------------------

    @rule(seed=_SEEDS)
    def update_parameters(self, seed: int) -> None:
        """Write new values into weight and bias, as an optimizer does; the weight may become 0."""
        rng = np.random.default_rng(seed)
        for name in ("weight", "bias"):
            value = np.round(
                rng.uniform(-2, 2, self.channels) * (rng.random(self.channels) < 0.8), 2
            )
            parameter = getattr(self.module, name)
            with no_grad():
                parameter[...] = value.astype(parameter.dtype)
            self.state[name] = parameter.numpy().astype(_WIDE)
        self.writes += 1

    @rule()
    def save(self) -> None:
        """Keep the state dict as it is now."""
        arrays = {name: np.array(t.numpy()) for name, t in self.module.state_dict().items()}
        self.saved = arrays, dict(self.state), self.count

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        """Load what was saved last into the module."""
        assert self.saved is not None
        arrays, state, self.count = self.saved
        self.state = dict(state)
        self.module.load_state_dict(arrays)
        self.writes += 1

    @rule()
    def move_to_a_new_module(self) -> None:
        """Go on with a new module that was given the state of the old one, and its mode."""
        fresh = self.make_module(self.channels, self.eps, self.momentum)
        fresh.load_state_dict(self.module.state_dict())
        self.module = fresh.train(self.training)
        self.writes += 1

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def module_has_the_state_of_the_model(self) -> None:
        """Raise GradCheckError unless buffers, parameters and mode are as they must be."""
        if not hasattr(self, "module"):
            return
        for name, want in self.state.items():
            found = getattr(self.module, name).numpy()
            scale = np.abs(want) + (np.sqrt(self.state["running_var"]) if "mean" in name else 0)
            self._require(name, found, want, scale)
            # From here on with the digits that the module has: errors do not add up.
            self.state[name] = found.astype(_WIDE)
        counted = int(self.module.num_batches_tracked)
        if counted != self.count:
            raise GradCheckError(f"num_batches_tracked is {counted}, expected {self.count}")
        if self.module.training != self.training:
            raise GradCheckError(f"training is {self.module.training}, expected {self.training}")

    def _count_batch(self, x: Array) -> None:
        """Move the model's running statistics by those of a batch."""
        mean, var = self._statistics(x)
        m = x.size // self.channels
        weight = 1 / (self.count + 1) if self.momentum is None else self.momentum
        for name, value in (
            ("running_mean", mean),
            ("running_var", var * m / max(m - self.correction, 1)),
        ):
            self.state[name] = self.state[name] + _WIDE(weight) * (value - self.state[name])
        self.count += 1

    def _statistics(self, x: Array) -> tuple[Array, Array]:
        """Return mean and biased variance per channel, in longdouble."""
        rows = np.moveaxis(x.astype(_WIDE), 1, 0).reshape(self.channels, -1)
        mean = rows.mean(axis=1)
        return mean, ((rows - mean[:, None]) ** 2).mean(axis=1)

    def _formula(self, x: Array, g: Array) -> tuple[Array, Array, list[Array], list[Array]]:
        """Return y, its scale, the gradients of x, weight and bias, and their scales.

        The scales are those that rounding errors are measured in, per channel.
        """
        rest = (self.channels, *[1] * (x.ndim - 2))
        others = tuple(a for a in range(x.ndim) if a != 1)
        state = self.state
        mean, var = (
            self._statistics(x) if self.training else (state["running_mean"], state["running_var"])
        )
        s = 1 / np.sqrt(var + _WIDE(self.eps))
        weight, bias, mean, s = (a.reshape(rest) for a in (state["weight"], state["bias"], mean, s))
        wide, g = x.astype(_WIDE), g.astype(_WIDE)
        x_hat = (wide - mean) * s
        gx = g
        if self.training:
            mean_g = g.mean(axis=others, keepdims=True)
            mean_gx = (g * x_hat).mean(axis=others, keepdims=True)
            gx = g - mean_g - x_hat * mean_gx
        largest = (np.abs(x_hat) + s * np.abs(wide)).max(axis=others, keepdims=True)
        expected = [weight * s * gx, (g * x_hat).sum(axis=others), g.sum(axis=others)]
        # A cancelled sum is held to the sum of its terms' sizes.
        scales = [
            np.abs(weight) * s * (1 + largest) * np.abs(g).max(),
            (np.abs(g) * largest).sum(axis=others),
            np.abs(g).sum(axis=others),
        ]
        return (
            weight * x_hat + bias,
            np.abs(weight) * largest + np.abs(bias),
            expected,
            scales,
        )

    def _require(self, what: str, found: Array, want: Array, scale: Any) -> None:
        """Raise GradCheckError unless `found` is `want` up to rounding in its own dtype.

        64 units: sums of at most some 20 terms, and a handful of operations after them.
        """
        tolerance = 64 * float(np.finfo(found.dtype).eps) * scale
        if found.shape != want.shape:
            raise GradCheckError(f"{what} has shape {found.shape}, expected {want.shape}")
        error = np.abs(found.astype(_WIDE) - want)
        if not np.all(error <= tolerance):
            at = np.unravel_index(int(np.argmax(np.nan_to_num(error, nan=np.inf))), want.shape)
            mode = "training" if self.training else "evaluation"
            raise GradCheckError(
                f"{what} at {[int(k) for k in at]} is {found[at]:.9g}, expected "
                f"{float(want[at]):.9g} (in {mode} mode, momentum {self.momentum}, eps {self.eps}, "
                f"after {self.count} batches)"
            )
