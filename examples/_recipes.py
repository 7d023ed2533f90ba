"""The network, and two recipes to train it: start values, optimizer, learning rate, pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad_bn import nn, optim

LAYOUTS = ("NHWC", "NCHW")


def network(layout: str = "NHWC") -> nn.Sequential:
    """Return the tutorial's network; both recipes train it.

    Takes images (N, 28, 28, 1), or (N, 1, 28, 28) with layout "NCHW", and gives logits (N, 10).
    """
    channels = LAYOUTS.index(layout) or -1  # the axis they are on
    return nn.Sequential(
        {
            "conv1": nn.Conv2d(1, 20, 5, bias=False, layout=layout),
            # The tutorial moves the biased variance (correction=0), by a tenth a step.
            "norm1": nn.BatchNorm2d(20, axis=channels, momentum=0.1, correction=0),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2, layout=layout),
            "conv2": nn.Conv2d(20, 50, 3, bias=False, layout=layout),
            "norm2": nn.BatchNorm2d(50, axis=channels, momentum=0.1, correction=0),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2, layout=layout),
            "flatten": nn.Flatten(),
            "dense1": nn.Linear(1250, 128),
            "relu3": nn.ReLU(),
            "dense2": nn.Linear(128, 10),
        }
    )


@dataclass(frozen=True)
class Recipe:
    """What there is to decide beside the network.

    start: gives the parameters and moving statistics of a network their first values.
    learning_rate: the default; the peak where there is a schedule.
    optimizer: of a network, at a learning rate.
    schedule: of an optimizer over a number of steps; None where the learning rate stays.
    pixel_mean, pixel_deviation: subtracted from pixels in [0, 1], and divided by.
    """

    start: Callable[[nn.Module], None]
    learning_rate: float
    optimizer: Callable[[nn.Module, float], optim.Optimizer]
    schedule: Callable[[optim.Optimizer, int], optim.Schedule | None]
    pixel_mean: float = 0.0
    pixel_deviation: float = 1.0


# --- the tutorial's ----------------------------------------------------------------------------


def start_small(model: nn.Module) -> None:
    """Draw every weight, gammas too, from N(0, 0.01²); the rest is 0, moving variances too.

    The gammas are what makes a learning rate of 1 work: they let so little through that the first
    gradients are tiny. With gammas of 1 this recipe stays at chance.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=0.01)
        else:
            nn.init.zeros_(parameter)
        if name == "dense1.bias":
            parameter.requires_grad_(False)  # the tutorial forgets to train it
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.zeros_(buffer)


def plain_sgd(model: nn.Module, learning_rate: float) -> optim.Optimizer:
    """Return gradient descent and nothing else."""
    return optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)


# --- today's -----------------------------------------------------------------------------------


def start_he(model: nn.Module) -> None:
    """Draw weights from He's normal distribution; biases are 0, gammas 1 as the layers made them.

    Source: He et al. 2015, "Delving Deep into Rectifiers", equation 10.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def nesterov(model: nn.Module, learning_rate: float) -> optim.Optimizer:
    """Return gradient descent with Nesterov's momentum and weight decay.

    Gammas, betas and biases do not decay: pulling them to 0 restrains no function, only its scale.
    """
    parameters = list(model.parameters())
    return optim.SGD(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in parameters if p.ndim == 1]},
        ],
        learning_rate,
        momentum=0.9,
        nesterov=True,
    )


def one_cycle(optimizer: optim.Optimizer, steps: int) -> optim.Schedule:
    """Return a warm-up over a fifth of the steps, and a way down to 0 over the rest."""
    return optim.OneCycle(optimizer, steps, rise=0.2)


RECIPES = {
    "tutorial": Recipe(start_small, 1.0, plain_sgd, lambda optimizer, steps: None),
    # Mean and deviation are those of the training pixels.
    "modern": Recipe(start_he, 0.1, nesterov, one_cycle, 0.28604, 0.35302),
}
