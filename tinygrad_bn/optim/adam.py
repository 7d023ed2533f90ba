"""Adam, and AdamW, which decays weights beside the gradient instead of through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from tinygrad_bn.backend import array_module
from tinygrad_bn.optim.optimizer import Optimizer, Params, Ready, add_to, in_state_dtype


class Adam(Optimizer):
    """Steps scaled by running averages of the gradient and of its square, as PyTorch's.

    params: Tensors, or groups of them with options of their own (see `Optimizer`).
    lr: the learning rate: about the size of a step.
    betas: what the averages of g and of g² keep from step to step, each in [0, 1).
    eps: added to the root of the second average.
    weight_decay: λ; adds λ p to the gradient.

        g ← g + λ p
        m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
        p ← p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)      at step t = 1, 2, ...

    State is kept in the parameter's dtype, float32 at least. Raises ValueError for options that
    make no sense. Source: Kingma and Ba 2015, Algorithm 1.

    >>> import tinygrad_bn as tg
    >>> p = tg.nn.Parameter([1.0])
    >>> (p * p).sum().backward()
    >>> tg.optim.Adam([p], lr=0.25).step()
    >>> round(p.item(), 4)
    0.75
    """

    slots = ("exp_avg", "exp_avg_sq")
    kernels: ClassVar = {
        "numba": "tinygrad_bn.kernels.cpu.numba_adam",
        "cuda": "tinygrad_bn.kernels.cuda.adam",
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _check(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            self._at_least_zero(name, options[name])
        betas = options["betas"]
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"{self._name}: betas is {betas}, expected two numbers in [0, 1), for example "
                f"(0.9, 0.999)"
            )

    def _update(self, p: Any, g: Any, state: dict[str, Any], options: Mapping[str, Any]) -> None:
        decay = float(options["weight_decay"])
        g = in_state_dtype(g)
        if decay:
            g = g + decay * in_state_dtype(p)
        self._descend(p, g, state, options)

    def _descend(
        self, p: Any, g: Any, state: dict[str, Any], options: Mapping[str, Any], keep: Any = None
    ) -> None:
        """Update the averages in `state` from `g`, and then `p`, of which `keep` is kept."""
        xp = array_module(p)
        beta1, beta2 = map(float, options["betas"])
        change = self._temporary(p)
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = self._zeros(p), self._zeros(p)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        # m + (1 - β) (g - m): exact where the gradient does not change, unlike β m + (1 - β) g.
        xp.subtract(g, mean, out=change)
        change *= 1 - beta1
        mean += change
        square *= beta2
        xp.multiply(g, g, out=change)
        change *= 1 - beta2
        square += change
        xp.sqrt(square, out=change)
        rate, root = self._corrected(change, state, options)
        change /= root
        change += float(options["eps"])
        xp.divide(mean, change, out=change)
        change *= rate
        add_to(p, change, keep)

    def _corrected(self, like: Any, state: dict[str, Any], options: Mapping[str, Any]) -> Any:
        """Return -lr / (1 - β₁ᵗ) and √(1 - β₂ᵗ), for arithmetic with the array `like`."""
        beta1, beta2 = map(float, options["betas"])
        same = id(options), state["step"]
        return (
            self._number(
                "step", like, lambda: -float(options["lr"]) / (1 - beta1 ** state["step"]), *same
            ),
            self._number("root", like, lambda: math.sqrt(1 - beta2 ** state["step"]), *same),
        )

    def _update_many(self, kernel: Callable[..., None], some: Sequence[Ready]) -> None:
        options, parameter, _, state = some[0]
        like = parameter.data
        for _, parameter, _, kept in some:
            for name in self.slots:
                if name not in kept:
                    kept[name] = self._zeros(parameter.data)
        shrink, decay = self._decay(like, options)
        kernel(
            [(p.data, g, kept["exp_avg"], kept["exp_avg_sq"]) for _, p, g, kept in some],
            *self._corrected(like, state, options),
            shrink,
            betas=tuple(map(float, options["betas"])),
            eps=float(options["eps"]),
            decay=decay,
        )

    def _decay(self, like: Any, options: Mapping[str, Any]) -> tuple[Any, float]:
        """Return what `_update_many` multiplies p by, and what of p it adds to g."""
        return 1.0, float(options["weight_decay"])


class AdamW(Adam):
    """Adam whose weight decay p ← p - lr λ p is a step of its own, as PyTorch's.

    Arguments as `Adam`'s; `weight_decay` is 0.01 unless given. Source: Loshchilov and Hutter 2019,
    Algorithm 2.

    >>> import tinygrad_bn as tg
    >>> p = tg.nn.Parameter([1.0])
    >>> p.grad = tg.zeros(1)
    >>> tg.optim.AdamW([p], lr=0.5, weight_decay=0.5).step()
    >>> p.item()
    0.75
    """

    kernels: ClassVar = Adam.kernels

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr, betas, eps, weight_decay)

    def _update(self, p: Any, g: Any, state: dict[str, Any], options: Mapping[str, Any]) -> None:
        g = in_state_dtype(g)
        self._descend(p, g, state, options, self._decay(g, options)[0])

    def _decay(self, like: Any, options: Mapping[str, Any]) -> tuple[Any, float]:
        decay = float(options["weight_decay"])
        kept = self._number("decay", like, lambda: 1 - float(options["lr"]) * decay, id(options))
        return kept, 0.0
