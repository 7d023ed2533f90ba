"""The training steps of `_steps.py` on a GPU; `run` is a whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _steps import Arrays, CompiledTorchStep, JaxStep, TinygradStep, TorchStep


class OnGpu:
    """A step in parts, run as a whole; on its stream, so that events can time it."""

    #: Whether the work is on the default stream; otherwise the host's clock has to do.
    by_events = True

    def run(self: Any) -> None:
        """Do a whole step."""
        for phase in self.phases:
            getattr(self, phase)()


class TinygradGpu(OnGpu, TinygradStep):
    """Ours, call by call."""

    def start(self, weights: Arrays, threads: int) -> None:
        super().start(weights, threads)
        self.model.to("cuda")

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        super().load(images, labels)
        self.images, self.labels = self.images.cuda(), self.labels.cuda()


class TinygradGraph(TinygradGpu):
    """Ours, the step captured as one CUDA graph."""

    def start(self, weights: Arrays, threads: int) -> None:
        import tinygrad_bn as tg

        super().start(weights, threads)

        def step(images: Any, labels: Any) -> Any:
            self.optimizer.zero_grad()
            loss = self.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            return loss

        self.captured = tg.capture(step)

    def run(self) -> None:
        """Replay the step (the first calls record it)."""
        self.loss = self.captured(self.images, self.labels)

    def results(self) -> dict[str, Any]:
        """Return loss, gradients and updated weights of a step that was replayed."""
        import tinygrad_bn as tg

        start = self.weights()
        for _ in range(4):  # two as they are, one recorded, one replayed
            with tg.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter[...] = tg.tensor(start[name], device="cuda")
            self.run()
        return {
            "loss": np.array(self.loss_value()),
            **{"d " + name: g for name, g in self.gradients().items()},
            **{"new " + name: w for name, w in self.weights().items()},
        }


class TorchGpu(OnGpu, TorchStep):
    """PyTorch eager."""

    def start(self, weights: Arrays, threads: int) -> None:
        import torch

        torch.backends.cudnn.benchmark = True
        super().start(weights, threads)
        self.model.cuda()

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        super().load(images, labels)
        self.images, self.labels = self.images.cuda(), self.labels.cuda()

    def gradients(self) -> Arrays:
        named = self.model.named_parameters()
        return {name: p.grad.cpu().numpy() for name, p in named if p.grad is not None}

    def weights(self) -> Arrays:
        return {name: p.detach().cpu().numpy() for name, p in self.model.named_parameters()}


class CompiledTorchGpu(TorchGpu, CompiledTorchStep):
    """`torch.compile` in its mode for small steps: a CUDA graph of forward and backward."""

    def prepared(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        return torch.compile(forward, mode="reduce-overhead")


class JaxGpu(OnGpu, JaxStep):
    """JAX, whose work is on streams of its own."""

    by_events = False


#: Name -> (the package it needs, the class).
STEPS: dict[str, tuple[str, Any]] = {
    "tinygrad_bn": ("tinygrad_bn", TinygradGpu),
    "tinygrad_bn graph": ("tinygrad_bn", TinygradGraph),
    "torch": ("torch", TorchGpu),
    "compile": ("torch", CompiledTorchGpu),
    "jax": ("jax", JaxGpu),
}
