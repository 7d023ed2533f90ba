"""How wrong batch norm is on inputs on which batch norm goes wrong, beside four other libraries.

The inputs are `tinygrad_bn.testing.hard_cases`: means far from 0, constant channels, magnitudes
near the ends of float32, long reductions, half precision. Each library normalizes them in training
mode with its own layer or function and differentiates Σ g · y. The right answer is the formula in
long double on the same rounded inputs.

A cell has the largest errors of y, dx, dγ and dβ, each as a share of its scale, per channel:
|γ| max|x̂| + |β| for y, |γ| s max|g| for dx, Σ|g x̂| for dγ, Σ|g| for dβ, with s = 1/√(v + ε);
where that is 0, for dγ of a constant channel, the error itself. "∞" is a NaN or an infinity where a
number belongs, or the reverse. What exceeds the bound of this library's tests (float32 1e-5,
float16 and bfloat16 two units in the last place) is in bold type, and "-" means that the library
does not take the input.

    python benchmarks/accuracy.py --quick
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import _checkout  # noqa: F401  (before tinygrad_bn)
import numpy as np
from _machine import installed
from _report import close_report, open_report, parser

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend import as_dtype
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.testing.hard_cases import BOUNDS, NAMES, HardCase, hard_cases

Results = dict[str, np.ndarray]


class UnsupportedError(Exception):
    """The library does not take such an input."""


def ours(case: HardCase, family: str | None = None) -> Results:
    """Return y and the gradients by this library: by its kernels as it comes, or by one family."""
    x, weight, bias, g = case.inputs()
    leaves = [tg.Tensor(a, requires_grad=True) for a in (x, weight, bias)]
    with np.errstate(all="ignore"), use_kernels(family) if family else nullcontext():
        y = F.batch_norm(
            leaves[0],
            weight=leaves[1],
            bias=leaves[2],
            training=True,
            eps=case.eps,
            axis=case.axis,
        )
        y.backward(tg.Tensor(g))
    return named(y.numpy(), *(leaf.grad.numpy() for leaf in leaves))


def by_torch(case: HardCase) -> Results:
    """Return y and the gradients by `torch.nn.functional.batch_norm`."""
    import torch

    def tensor(array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def array(tensor: Any) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(as_dtype("bfloat16"))
        return tensor.numpy()

    x, weight, bias, g = map(tensor, case.inputs())
    # Channels stand on axis 1 there; the memory stays as it is.
    x, g = x.movedim(case.axis, 1), g.movedim(case.axis, 1)
    leaves = [v.requires_grad_() for v in (x.detach(), weight, bias)]
    y = torch.nn.functional.batch_norm(
        leaves[0], None, None, leaves[1], leaves[2], training=True, eps=case.eps
    )
    y.backward(g)
    y, gx = y.detach().movedim(1, case.axis), leaves[0].grad.movedim(1, case.axis)
    return named(*map(array, (y, gx, leaves[1].grad, leaves[2].grad)))


def by_flax(case: HardCase, fast: bool = True) -> Results:
    """Return y and the gradients by `flax.linen.BatchNorm`; `fast` (the default): E[x²] - E[x]²."""
    import jax
    from flax import linen

    x, weight, bias, g = case.inputs()
    layer = linen.BatchNorm(
        use_running_average=False,
        axis=case.axis,
        epsilon=case.eps,
        dtype=x.dtype,
        use_fast_variance=fast,
    )
    zeros = np.zeros_like(weight)
    state = {"mean": zeros, "var": zeros + 1}

    def apply(x: Any, weight: Any, bias: Any) -> Any:
        variables = {"params": {"scale": weight, "bias": bias}, "batch_stats": state}
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    y, pull_back = jax.vjp(apply, x, weight, bias)
    return named(*map(np.asarray, (y, *pull_back(g.astype(y.dtype)))))


def by_flax_two_pass(case: HardCase) -> Results:
    """Return y and the gradients by Flax with `use_fast_variance=False`."""
    return by_flax(case, fast=False)


def by_keras(case: HardCase) -> Results:
    """Return y and the gradients by `keras.layers.BatchNormalization`, on JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    x, weight, bias, g = case.inputs()
    policy = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(x.dtype.name, "float32")
    layer = keras.layers.BatchNormalization(axis=case.axis, epsilon=case.eps, dtype=policy)
    layer.build(x.shape)
    rest = [v.value for v in layer.non_trainable_variables]

    def apply(x: Any, weight: Any, bias: Any) -> Any:
        return layer.stateless_call([weight, bias], rest, x, training=True)[0]

    y, pull_back = jax.vjp(apply, x, weight, bias)
    return named(*map(np.asarray, (y, *pull_back(g.astype(y.dtype)))))


def by_mygrad(case: HardCase) -> Results:
    """Return y and the gradients by `mygrad.nnet.layers.batchnorm`."""
    import mygrad
    from mygrad.nnet.layers import batchnorm

    x, weight, bias, g = case.inputs()
    if case.axis != 1 or x.dtype.name == "bfloat16":
        raise UnsupportedError
    leaves = [mygrad.tensor(a) for a in (x, weight, bias)]
    with np.errstate(all="ignore"):
        y = batchnorm(leaves[0], gamma=leaves[1], beta=leaves[2], eps=case.eps)
        y.backward(g)
    return named(y.data, *(leaf.grad for leaf in leaves))


def named(*results: np.ndarray) -> Results:
    return dict(zip(NAMES, results, strict=True))


#: The package to be installed, and what it computes with, by column.
LIBRARIES: dict[str, tuple[str, Callable[[HardCase], Results]]] = {
    "tinygrad_bn": ("numpy", ours),
    "PyTorch": ("torch", by_torch),
    "Flax": ("flax", by_flax),
    "Flax, two passes": ("flax", by_flax_two_pass),
    "Keras on JAX": ("keras", by_keras),
    "MyGrad": ("mygrad", by_mygrad),
}


def errors(function: Callable[[HardCase], Results], case: HardCase) -> list[float] | None:
    """Return the errors of y, dx, dγ and dβ; None where the library does not take the input."""
    try:
        return list(case.errors(**function(case)).values())
    except UnsupportedError:
        return None


def cell(found: Sequence[float] | None, bound: float) -> str:
    """Return four errors as text, those above the bound in bold type."""
    if found is None:
        return "-"
    texts = []
    for error in found:
        mantissa, _, exponent = f"{error:.0e}".partition("e")
        text = "∞" if math.isinf(error) else f"{mantissa}e{int(exponent)}" if error else "0"
        texts.append(text if error <= bound else f"**{text}**")
    return " ".join(texts)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(headers)} |"
    yield "|" + "---|" * len(headers)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = parser(__doc__, rounds=1).parse_args()
    report = open_report("accuracy", options)
    missing = sorted({package for package, _ in LIBRARIES.values() if not installed(package)})
    if missing:
        print(
            f"\nNot installed, so left out: {', '.join(missing)} (pip install {' '.join(missing)})"
        )
    libraries = {name: f for name, (package, f) in LIBRARIES.items() if package not in missing}
    rows, table = [], []
    for dtype, bound in BOUNDS.items():
        for case in hard_cases(dtype):
            if options.quick and case.repeats > 1:
                continue
            found = {name: errors(function, case) for name, function in libraries.items()}
            rows.append({"case": case.name, "dtype": dtype, "bound": bound, "errors": found})
            table.append([case.name, *(cell(values, bound) for values in found.values())])
    report["results"] = [*NAMES.values()]
    report["rows"] = rows
    print()
    print("\n".join(markdown(["errors of y, dx, dγ, dβ", *libraries], table)))
    close_report(report, options)


if __name__ == "__main__":
    main()
