"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from tinygrad_bn.backend import array_module
from tinygrad_bn.optim.optimizer import Optimizer, Params, Ready, add_to, in_state_dtype


class SGD(Optimizer):
    """Gradient descent with momentum, as PyTorch's.

    params: Tensors, or groups of them with options of their own (see `Optimizer`).
    lr: the learning rate.
    momentum: what is kept of the velocity from step to step.
    weight_decay: λ; adds λ p to the gradient.
    nesterov: look ahead along the velocity; needs momentum.

        g ← g + λ p
        v ← momentum · v + g          (at the first step v ← g)
        p ← p - lr · v                (nesterov: p - lr · (g + momentum · v))

    State is kept in the parameter's dtype, float32 at least. Raises ValueError for options that
    make no sense. Source of Nesterov's form: Sutskever et al. 2013.

    >>> import tinygrad_bn as tg
    >>> p = tg.nn.Parameter([1.0])
    >>> (p * p).sum().backward()
    >>> tg.optim.SGD([p], lr=0.25).step()
    >>> p.item()
    0.5
    """

    slots = ("momentum_buffer",)
    kernels: ClassVar = {
        "numba": "tinygrad_bn.kernels.cpu.numba_sgd",
        "cuda": "tinygrad_bn.kernels.cuda.sgd",
    }

    def __init__(
        self,
        params: Params,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )

    def _check(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            self._at_least_zero(name, options[name])
        if options["nesterov"] and not options["momentum"] > 0:
            raise ValueError("SGD: nesterov=True needs a momentum > 0, for example momentum=0.9")

    def _update(self, p: Any, g: Any, state: dict[str, Any], options: Mapping[str, Any]) -> None:
        xp = array_module(p)
        momentum = float(options["momentum"])
        decay = float(options["weight_decay"])
        change = self._temporary(p)
        g = in_state_dtype(g)
        if decay:
            xp.multiply(in_state_dtype(p), decay, out=change)
            change += g
            g = change
        if momentum:
            velocity = state.get("momentum_buffer")
            if velocity is None:
                self._new_state()
                velocity = state["momentum_buffer"] = g.copy()
            else:
                velocity *= momentum
                velocity += g
            g = g + momentum * velocity if options["nesterov"] else velocity
        step = self._number("step", change, lambda: -float(options["lr"]), id(options))
        xp.multiply(g, step, out=change)
        add_to(p, change)

    def _update_many(self, kernel: Callable[..., None], some: Sequence[Ready]) -> None:
        options, momentum = some[0][0], float(some[0][0]["momentum"])
        like = some[0][1].data
        fresh = bool(momentum) and "momentum_buffer" not in some[0][3]
        if fresh:
            self._new_state()
            for _, parameter, _, state in some:
                state["momentum_buffer"] = array_module(like).empty_like(parameter.data)
        kernel(
            [
                (parameter.data, g, *((state["momentum_buffer"],) if momentum else ()))
                for _, parameter, g, state in some
            ],
            self._number("step", like, lambda: -float(options["lr"]), id(options)),
            momentum=momentum,
            decay=float(options["weight_decay"]),
            nesterov=bool(options["nesterov"]),
            fresh=fresh,
        )
