"""One training step of the tutorial's network, written in each of the libraries that are compared.

    conv 5×5 → 20, BN, ReLU, pool 2×2, conv 3×3 → 50, BN, ReLU, pool 2×2, dense 128, ReLU, dense 10

No bias in the convolutions, mean softmax cross-entropy, plain SGD, and a first dense bias that is
not trained, as in the tutorial. Every class starts from the same weights and has `load`, which
sets the batch, `phases`, which together are a step, and `results`: the loss, the gradients and the
updated weights of one step.

The image is flattened as it lies in memory, so in NHWC every library meets the same dense1.weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
from _measure import Contender

#: The tutorial's is 1.0; a smaller one keeps numbers tame when one batch is trained on many times.
LEARNING_RATE = 0.1
EPS, MOMENTUM = 1e-5, 0.1
UNTRAINED = "dense1.bias"
Arrays = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]  # images (N, 28, 28) and labels (N,)


def start_values() -> Arrays:
    """Return the tutorial's: every weight, gammas too, from N(0, 0.01²), the rest 0."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv1.weight": (20, 1, 5, 5),
        "norm1.weight": (20,),
        "norm1.bias": (20,),
        "conv2.weight": (50, 20, 3, 3),
        "norm2.weight": (50,),
        "norm2.bias": (50,),
        "dense1.weight": (128, 1250),
        "dense1.bias": (128,),
        "dense2.weight": (10, 128),
        "dense2.bias": (10,),
    }
    return {
        name: (rng.normal(0, 0.01, shape) if name.endswith("weight") else np.zeros(shape)).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }


def draw_noise(size: int) -> Batch:
    """Return a batch of noise, uniform in [0, 1), with random labels."""
    rng = np.random.default_rng(1)
    return rng.random((size, 28, 28), np.float32), rng.integers(0, 10, size)


def draw_batch(size: int) -> Batch:
    """Return real images (N, 28, 28) in [0, 1] and their labels (N,)."""
    from tinygrad_bn import data

    images, labels, _, _ = data.fashion_mnist_sample()
    chosen = np.arange(size) % len(images)
    return images[chosen].astype(np.float32) / 255, labels[chosen].astype(np.int64)


class Step(Contender):
    """What the libraries share; weights are arrays by name, layout is "NCHW" or "NHWC"."""

    phases: ClassVar = ("forward", "backward", "update")
    layouts: ClassVar = ("NCHW", "NHWC")

    def __init__(self, weights: Arrays, layout: str, threads: int):
        self.layout = layout
        self.start(weights, threads)

    def start(self, weights: Arrays, threads: int) -> None:
        """Build the model."""
        raise NotImplementedError

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Set the batch that steps are taken on: images (N, 28, 28), labels (N,)."""
        raise NotImplementedError

    def gradients(self) -> Arrays:
        """Return the gradients that the last backward left, by name."""
        raise NotImplementedError

    def weights(self) -> Arrays:
        """Return the parameters as they are, by name."""
        raise NotImplementedError

    def loss_value(self) -> float:
        """Return the last loss."""
        raise NotImplementedError

    def image_shape(self) -> tuple[int, ...]:
        """Return the shape of a batch of images in this layout."""
        return (-1, 1, 28, 28) if self.layout == "NCHW" else (-1, 28, 28, 1)

    def results(self) -> dict[str, Any]:
        """Return loss, gradients and updated weights of one step."""
        for phase in self.phases[:-1]:
            getattr(self, phase)()
        found = {"loss": np.array(self.loss_value()), **_prefixed("d ", self.gradients())}
        getattr(self, self.phases[-1])()
        return {**found, **_prefixed("new ", self.weights())}


def _prefixed(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + name: np.array(array) for name, array in arrays.items()}


class TinygradStep(Step):
    """Ours, with the layers a user would write."""

    def start(self, weights: Arrays, threads: int) -> None:
        import tinygrad_bn as tg
        from tinygrad_bn import functional as F
        from tinygrad_bn import nn, optim

        tg.set_num_threads(threads)
        layout, axis = self.layout, 1 if self.layout == "NCHW" else -1
        self.model = nn.Sequential(
            {
                "conv1": nn.Conv2d(1, 20, 5, bias=False, layout=layout),
                "norm1": nn.BatchNorm2d(20, EPS, MOMENTUM, axis=axis),
                "relu1": nn.ReLU(),
                "pool1": nn.MaxPool2d(2, layout=layout),
                "conv2": nn.Conv2d(20, 50, 3, bias=False, layout=layout),
                "norm2": nn.BatchNorm2d(50, EPS, MOMENTUM, axis=axis),
                "relu2": nn.ReLU(),
                "pool2": nn.MaxPool2d(2, layout=layout),
                "flatten": nn.Flatten(),
                "dense1": nn.Linear(1250, 128),
                "relu3": nn.ReLU(),
                "dense2": nn.Linear(128, 10),
            }
        )
        for name, parameter in self.model.named_parameters():
            parameter.data[...] = weights[name]
            parameter.requires_grad_(name != UNTRAINED)
        self.cross_entropy = F.cross_entropy
        self.optimizer = optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad], LEARNING_RATE
        )

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        import tinygrad_bn as tg

        self.images = tg.tensor(images.reshape(self.image_shape()))
        self.labels = tg.tensor(labels)

    def forward(self) -> None:
        self.loss = self.cross_entropy(self.model(self.images), self.labels)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()

    def gradients(self) -> Arrays:
        named = self.model.named_parameters()
        return {name: p.grad.numpy() for name, p in named if p.grad is not None}

    def weights(self) -> Arrays:
        return {name: p.numpy() for name, p in self.model.named_parameters()}

    def loss_value(self) -> float:
        return float(self.loss.item())

    def profile(self, steps: int) -> Any:
        """Return where the time goes: see `_profile.profile`."""
        from _profile import profile

        return profile(partial(self.turn, 0, 1), self.optimizer, steps)


class TorchStep(Step):
    """PyTorch eager."""

    def start(self, weights: Arrays, threads: int) -> None:
        import torch
        from torch import nn

        class Flatten(nn.Module):
            """Flatten as the layout lies in memory: with channels last this is no copy either."""

            def forward(self, x: Any) -> Any:
                return (x.permute(0, 2, 3, 1) if channels_last else x).flatten(1)

        torch.set_num_threads(threads)
        channels_last = self.layout == "NHWC"
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        layers = {
            "conv1": nn.Conv2d(1, 20, 5, bias=False),
            "norm1": nn.BatchNorm2d(20, EPS, MOMENTUM),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(20, 50, 3, bias=False),
            "norm2": nn.BatchNorm2d(50, EPS, MOMENTUM),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "flatten": Flatten(),
            "dense1": nn.Linear(1250, 128),
            "relu3": nn.ReLU(),
            "dense2": nn.Linear(128, 10),
        }
        self.model = nn.Sequential()
        for name, layer in layers.items():
            self.model.add_module(name, layer)
        self.model.to(memory_format=memory_format)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.tensor(weights[name]))
                parameter.requires_grad_(name != UNTRAINED)
        self.forward_pass = self.prepared(
            lambda x, labels: nn.functional.cross_entropy(self.model(x), labels)
        )
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad], LEARNING_RATE
        )

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        import torch

        # One channel: as it is, it lies in memory in either format.
        self.images = torch.tensor(images.reshape(-1, 1, 28, 28))
        if self.layout == "NHWC":
            self.images = self.images.to(memory_format=torch.channels_last)
        self.labels = torch.tensor(labels)

    def prepared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward as it is to be called."""
        return forward

    def forward(self) -> None:
        self.loss = self.forward_pass(self.images, self.labels)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()

    def gradients(self) -> Arrays:
        named = self.model.named_parameters()
        return {name: p.grad.numpy() for name, p in named if p.grad is not None}

    def weights(self) -> Arrays:
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}

    def loss_value(self) -> float:
        return self.loss.item()

    def profile(self, steps: int) -> list[tuple[str, float]]:
        """Return PyTorch's own operators with the milliseconds a step that each takes by itself."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.turn(0, steps)
        rows = [(e.key, e.self_cpu_time_total / 1000 / steps) for e in profiler.key_averages()]
        return sorted(rows, key=lambda row: -row[1])


class CompiledTorchStep(TorchStep):
    """PyTorch with `torch.compile`, whose first step takes its time."""

    def prepared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        return torch.compile(forward)


class JaxStep(Step):
    """JAX: loss, gradients and update in one `jax.jit`, so there is one phase.

    XLA takes the CPUs that the process may use; it has no switch for their number.
    """

    phases: ClassVar = ("step",)

    def start(self, weights: Arrays, threads: int) -> None:
        import jax
        from jax import lax
        from jax import numpy as jnp

        last = self.layout == "NHWC"
        reduced = (0, 1, 2) if last else (0, 2, 3)
        per_channel = (1, 1, 1, -1) if last else (1, -1, 1, 1)
        window = (1, 2, 2, 1) if last else (1, 1, 2, 2)

        def convolve(x: Any, weight: Any) -> Any:
            numbers = (self.layout, "OIHW", self.layout)
            return lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=numbers)

        def block(w: Any, running: Any, i: int, x: Any) -> tuple[Any, Any]:
            x = convolve(x, w[f"conv{i}.weight"])
            mean, var = x.mean(reduced), x.var(reduced)
            gamma = w[f"norm{i}.weight"] / jnp.sqrt(var + EPS)
            x = (x - mean.reshape(per_channel)) * gamma.reshape(per_channel)
            x = jax.nn.relu(x + w[f"norm{i}.bias"].reshape(per_channel))
            x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
            return x, [r + MOMENTUM * (s - r) for r, s in zip(running, (mean, var), strict=True)]

        def loss(w: Any, running: Any, x: Any, labels: Any) -> Any:
            x, first = block(w, running[0], 1, x)
            x, second = block(w, running[1], 2, x)
            x = x.reshape(len(x), -1) @ w["dense1.weight"].T + lax.stop_gradient(w["dense1.bias"])
            logits = jax.nn.relu(x) @ w["dense2.weight"].T + w["dense2.bias"]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -chosen.mean(), [first, second]

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(w: Any, running: Any, x: Any, labels: Any) -> Any:
            (value, running), g = jax.value_and_grad(loss, has_aux=True)(w, running, x, labels)
            return {name: w[name] - LEARNING_RATE * g[name] for name in w}, running, value

        self.gradients_of = jax.grad(loss, has_aux=True)
        self.step_function = step
        self.block_until_ready = jax.block_until_ready
        self.state = {name: jnp.array(array) for name, array in weights.items()}
        self.running = [[jnp.zeros(c), jnp.ones(c)] for c in (20, 50)]

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        from jax import numpy as jnp

        self.batch = jnp.array(images.reshape(self.image_shape())), jnp.array(labels)

    def step(self) -> None:
        self.state, self.running, self.loss = self.step_function(
            self.state, self.running, *self.batch
        )
        self.block_until_ready(self.loss)

    def gradients(self) -> Arrays:
        found, _ = self.gradients_of(self.state, self.running, *self.batch)
        return {name: g for name, g in found.items() if name != UNTRAINED}

    def weights(self) -> Arrays:
        return self.state

    def loss_value(self) -> float:
        return float(self.loss)

    def results(self) -> dict[str, Any]:
        gradients = _prefixed("d ", self.gradients())
        self.step()
        return {"loss": np.array(self.loss_value()), **gradients, **_prefixed("new ", self.state)}


class MygradStep(Step):
    """MyGrad, which is NumPy underneath; its layers know NCHW only, and keep no statistics."""

    layouts: ClassVar = ("NCHW",)

    def start(self, weights: Arrays, threads: int) -> None:
        import mygrad

        self.parameters = {
            name: mygrad.tensor(w.copy(), constant=name == UNTRAINED) for name, w in weights.items()
        }

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        # Copies, because MyGrad locks the arrays that it works on.
        self.images, self.labels = images.reshape(self.image_shape()).copy(), labels.copy()

    def forward(self) -> None:
        from mygrad.nnet import activations, layers, losses

        w, x = self.parameters, self.images
        for i in (1, 2):
            x = layers.conv_nd(x, w[f"conv{i}.weight"], stride=1)
            x = layers.batchnorm(x, gamma=w[f"norm{i}.weight"], beta=w[f"norm{i}.bias"], eps=EPS)
            x = layers.max_pool(activations.relu(x), (2, 2), 2)
        x = x.reshape(len(x), -1) @ w["dense1.weight"].T + w["dense1.bias"]
        logits = activations.relu(x) @ w["dense2.weight"].T + w["dense2.bias"]
        self.loss = losses.softmax_crossentropy(logits, self.labels)

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.data -= LEARNING_RATE * parameter.grad
                parameter.null_grad()

    def gradients(self) -> Arrays:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def weights(self) -> Arrays:
        return {name: p.data for name, p in self.parameters.items()}

    def loss_value(self) -> float:
        return self.loss.item()


#: What can be measured beside us: the library it needs, and its class.
PEERS: dict[str, tuple[str, type[Step]]] = {
    "torch": ("torch", TorchStep),
    "compile": ("torch", CompiledTorchStep),
    "jax": ("jax", JaxStep),
    "mygrad": ("mygrad", MygradStep),
}
