"""Optimizers of every kind, and a training of a few steps with one, in a chosen kernel family."""

import numpy as np

import tinygrad_bn as tg
from tinygrad_bn import nn, optim
from tinygrad_bn.backend.kernels import use_kernels

MAKERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "decay": lambda p: optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, 0.9),
    "nesterov": lambda p: optim.SGD(p, 0.1, 0.9, 0.01, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.1, weight_decay=0.01),
    "adam without averages": lambda p: optim.Adam(p, 0.1, betas=(0.0, 0.0)),
    "adamw": lambda p: optim.AdamW(p, 0.1),
}


def trained(family, make, starts, gradients):
    """Return parameters and state after a step for each list of gradients, at changing rates."""
    with use_kernels(family):
        some = [nn.Parameter(start, dtype=start.dtype) for start in starts]
        optimizer = make(some)
        for k, step in enumerate(gradients):
            for p, g in zip(some, step, strict=True):
                p.grad = None if g is None else tg.tensor(g)
            optimizer.lr = 0.1 / (k + 1)
            optimizer.step()
    kept = optimizer.state_dict()["state"].values()
    state = [v.numpy() for s in kept for v in s.values() if isinstance(v, tg.Tensor)]
    return [p.numpy() for p in some] + state


def draw(shapes, dtype, steps=3, seed=0):
    """Return starts and gradients of a few steps for `trained`."""
    rng = np.random.default_rng(seed)

    def one():
        return [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]

    return one(), [one() for _ in range(steps)]
