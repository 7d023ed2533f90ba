"""What the analytic rule of batch norm saves over the tape: time, memory and error.

The same function, differentiated three ways:

    tape       F.batch_norm_composite: the formula in ordinary ops, each recorded and differentiated
    rule       F.batch_norm without kernels: one op with a rule derived by hand
               (tinygrad_bn/ops/batch_norm.py has the derivation)
    kernel     F.batch_norm as it comes: the same rule, a cache-sized block at a time
    PyTorch    torch.nn.functional.batch_norm, for comparison, where it is installed

Columns:
    ms         forward plus backward, median [quartiles]; turns are taken between the four
    × tape     the tape's time over this form's, turn by turn: how many times faster it is
    kept       memory held between forward and backward beyond the inputs, y included, as a multiple
               of x (tracemalloc; PyTorch's memory is out of its sight)
    peak       the most that was held at any moment of either, likewise; cotangents included
    y, dx, dγ, dβ
               largest error over all entries, against the formula in long double on the same
               rounded inputs. Scales, per channel: |γ| max|x̂| + |β| for y, |γ| s max|g| for dx,
               Σ|g x̂| for dγ, Σ|g| for dβ, with s = 1/√(v + ε)

`offset` is the mean of x, whose deviation is 1: at 10⁶ a careless float32 mean or variance fails.

    python benchmarks/analytic_rule.py --quick
"""

from __future__ import annotations

import argparse
import math
import tracemalloc
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import numpy as np
from _measure import Contender, ratios, seconds, summarize, take_turns
from _process import Remote
from _report import close_report, open_report, parser, plan, present, print_table

EPS = 1e-5
FORMS = ("tape", "rule", "kernel")


class Case(NamedTuple):
    """Sizes, channel axis, dtype and mean of x."""

    shape: tuple[int, ...]
    axis: int
    dtype: str
    offset: float


CASES = (
    Case((256, 20, 24, 24), 1, "float32", 0.0),
    Case((256, 24, 24, 20), -1, "float32", 0.0),
    Case((256, 20, 24, 24), 1, "float32", 1e6),
    Case((256, 20, 24, 24), 1, "float64", 0.0),
    Case((256, 20, 24, 24), 1, "float64", 1e6),
    Case((256, 50, 10, 10), 1, "float16", 0.0),
    Case((4096, 1024), 1, "float32", 0.0),
)


def draw(case: Case) -> dict[str, np.ndarray]:
    """Return x, weight, bias and the cotangent g, by name."""
    rng = np.random.default_rng(0)
    channels = case.shape[case.axis]
    arrays = {
        "x": case.offset + rng.standard_normal(case.shape),
        "weight": rng.standard_normal(channels),
        "bias": rng.standard_normal(channels),
        "g": rng.standard_normal(case.shape),
    }
    return {name: array.astype(case.dtype) for name, array in arrays.items()}


class Form(Contender):
    """One way to differentiate batch norm, on one case."""

    phases: ClassVar = ("forward", "backward")

    def __init__(self, form: str, case: Case, threads: int):
        import tinygrad_bn as tg

        tg.set_num_threads(threads)
        arrays = draw(case)
        self.leaves = [
            tg.tensor(arrays[name], requires_grad=True) for name in ("x", "weight", "bias")
        ]
        self.g = tg.tensor(arrays["g"])
        self.axis = case.axis
        self.form = form
        self.y: Any = None

    def forward(self) -> None:
        from tinygrad_bn import functional as F

        for leaf in self.leaves:
            leaf.grad = None
        x, weight, bias = self.leaves
        if self.form == "tape":
            self.y = F.batch_norm_composite(x, weight, bias, EPS, axis=self.axis)
        else:
            self.y = F.batch_norm(
                x, None, None, weight, bias, training=True, eps=EPS, axis=self.axis
            )

    def backward(self) -> None:
        self.y.backward(self.g)

    def turn(self, settle: int, count: int) -> dict[str, float]:
        with self.kernels():
            return super().turn(settle, count)

    def kernels(self) -> Any:
        """Return a context in which the rule is served as this form says."""
        from tinygrad_bn.backend.kernels import use_kernels

        return use_kernels("generic") if self.form == "rule" else ExitStack()

    def results(self) -> list[np.ndarray]:
        """Return y, dx, dγ and dβ."""
        with self.kernels():
            self.forward()
            self.backward()
        return [np.array(t.detach().numpy()) for t in (self.y, *(t.grad for t in self.leaves))]

    def memory(self) -> tuple[float, float]:
        """Return what is kept between forward and backward, and the peak, as multiples of x."""
        x = self.leaves[0].data
        self.y = None
        for leaf in self.leaves:
            leaf.grad = None
        with self.kernels():
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                self.forward()
                kept, _ = tracemalloc.get_traced_memory()
                self.backward()
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        return (kept - before) / x.nbytes, (peak - before) / x.nbytes


class TorchForm(Contender):
    phases: ClassVar = ("forward", "backward")

    def __init__(self, case: Case, threads: int):
        import torch

        torch.set_num_threads(threads)
        tensors = {name: torch.tensor(array) for name, array in draw(case).items()}
        if case.axis == -1:
            # PyTorch wants channels on axis 1; channels-last memory then is what x already has.
            for name in ("x", "g"):
                tensors[name] = tensors[name].movedim(-1, 1)
        self.last = case.axis == -1
        self.leaves = [tensors[name].requires_grad_() for name in ("x", "weight", "bias")]
        self.g = tensors["g"]

    def forward(self) -> None:
        from torch.nn import functional as F

        for leaf in self.leaves:
            leaf.grad = None
        x, weight, bias = self.leaves
        self.y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)

    def backward(self) -> None:
        self.y.backward(self.g)

    def results(self) -> list[np.ndarray]:
        self.forward()
        self.backward()
        found = [t.detach().numpy() for t in (self.y, *(t.grad for t in self.leaves))]
        if self.last:
            found[:2] = [np.moveaxis(array, 1, -1) for array in found[:2]]
        return found


class Reference(NamedTuple):
    """The right y, dx, dγ and dβ in long double, and the scale of an error in each."""

    values: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]

    def errors(self, found: list[np.ndarray]) -> list[float]:
        """Return the largest scaled error of each; infinite where something is not finite."""
        errors = []
        for value, scale, array in zip(self.values, self.scales, found, strict=True):
            error = float((np.abs(array - value) / scale).max())
            errors.append(error if math.isfinite(error) else math.inf)
        return errors


def reference(case: Case) -> Reference:
    """Return the formula of the paper and its gradient, on the rounded inputs of `case`."""
    x, weight, bias, g = (array.astype(np.longdouble) for array in draw(case).values())
    axis = case.axis % x.ndim
    reduced = tuple(i for i in range(x.ndim) if i != axis)
    weight, bias = (
        v.reshape([-1 if i == axis else 1 for i in range(x.ndim)]) for v in (weight, bias)
    )
    centred = x - x.mean(axis=reduced, keepdims=True)
    centred -= centred.mean(axis=reduced, keepdims=True)  # what the first mean's rounding left
    s = 1 / np.sqrt((centred * centred).mean(axis=reduced, keepdims=True) + np.longdouble(EPS))
    x_hat = centred * s
    gx = g * x_hat
    dx = (
        weight
        * s
        * (g - g.mean(axis=reduced, keepdims=True) - x_hat * gx.mean(axis=reduced, keepdims=True))
    )

    def largest(array: np.ndarray) -> np.ndarray:
        return np.abs(array).max(axis=reduced, keepdims=True)

    return Reference(
        (weight * x_hat + bias, dx, gx.sum(axis=reduced), g.sum(axis=reduced)),
        (
            np.abs(weight) * largest(x_hat) + np.abs(bias),
            np.abs(weight) * s * largest(g),
            np.abs(gx).sum(axis=reduced),
            np.abs(g).sum(axis=reduced),
        ),
    )


def measure(case: Case, peers: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each form of one case."""
    right = reference(case)
    with ExitStack() as stack:
        contenders = {
            form: stack.enter_context(
                Remote(Form, form, case, options.threads, threads=options.threads)
            )
            for form in FORMS
        }
        memory = {form: contender.ask("memory") for form, contender in contenders.items()}
        if peers:
            contenders["PyTorch"] = stack.enter_context(
                Remote(TorchForm, case, options.threads, threads=options.threads)
            )
        errors = {form: right.errors(c.ask("results")) for form, c in contenders.items()}
        turns = take_turns(contenders, plan(options, warm_up=2))
    tape = seconds(turns["tape"])
    rows = []
    for form, taken in turns.items():
        both = seconds(taken)
        kept, peak = memory.get(form, (None, None))
        rows.append(
            {
                **case._asdict(),
                "form": form,
                **{p: summarize(seconds(taken, p)).scaled(1e3) for p in Form.phases},
                "ms": summarize(both).scaled(1e3),
                "× tape": summarize(ratios(tape, both)),
                "kept": kept,
                "peak": peak,
                **dict(zip(("y", "dx", "dγ", "dβ"), errors[form], strict=True)),
            }
        )
    return rows


def show(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row."""
    name = f"{row['shape']} {row['dtype']}, axis {row['axis']}, offset {row['offset']:g}"
    return [
        name if row["form"] == FORMS[0] else "",
        row["form"],
        *(str(row[key]) for key in ("ms", "× tape")),
        *("-" if row[key] is None else f"{row[key]:.1f}" for key in ("kept", "peak")),
        *(f"{row[key]:.0e}" for key in ("y", "dx", "dγ", "dβ")),
    ]


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = parser(__doc__, rounds=10).parse_args()
    report = open_report("analytic_rule", options)
    peers = present(["torch"])
    rows = []
    for case in CASES[2:3] if options.quick else CASES:
        rows += measure(case, peers, options)
    report["rows"] = rows
    print_table(
        ["x", "form", "ms", "× tape", "kept", "peak", "y", "dx", "dγ", "dβ"], [*map(show, rows)]
    )
    close_report(report, options)


if __name__ == "__main__":
    main()
