"""What one small op costs on the tape, where the arithmetic is nothing and the bookkeeping is all.

    y = x;  500 times:  y = y * a;  y = y + b        then backward from y

A chain of 1,000 ops on float32 vectors of 1, 8 and 64 entries, forward and backward, beside PyTorch
eager on the same chain. The operands a and b either require grad (each op has two gradients to
give) or are constants. Reported: microseconds per op as median [quartiles], and the ratio to
PyTorch of forward plus backward, turn by turn; below 1 we are faster.

    python benchmarks/small_ops.py --quick
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, ClassVar

import numpy as np
from _measure import Contender, ratios, seconds, summarize, take_turns
from _process import Remote
from _report import close_report, open_report, parser, plan, present, print_table

SIZES = (1, 8, 64)
OPERANDS = ("require grad", "constant")


class Chain(Contender):
    """The chain; a library fills in how a Tensor is made and where gradients stand."""

    phases: ClassVar = ("forward", "backward")

    def __init__(self, size: int, operands: str, length: int, threads: int):
        self.start(threads)
        rng = np.random.default_rng(0)
        trained = operands == "require grad"
        self.x = self.tensor(rng.standard_normal(size), True)
        # Factors near 1: a thousand of them neither overflow nor underflow.
        self.a = self.tensor(1 + 1e-3 * rng.standard_normal(size), trained)
        self.b = self.tensor(rng.standard_normal(size), trained)
        self.seed = self.tensor(rng.standard_normal(size), False)
        self.pairs = length // 2

    def start(self, threads: int) -> None:
        raise NotImplementedError

    def tensor(self, data: np.ndarray, requires_grad: bool) -> Any:
        raise NotImplementedError

    def forward(self) -> None:
        for leaf in (self.x, self.a, self.b):
            leaf.grad = None
        self.y = None  # the graph of the turn before goes first, as a step's own do when it returns
        y, a, b = self.x, self.a, self.b
        for _ in range(self.pairs):
            y = y * a
            y = y + b
        self.y = y

    def backward(self) -> None:
        self.y.backward(self.seed)

    def results(self) -> list[np.ndarray]:
        """Return the output and the gradients, to see that all compute the same."""
        self.forward()
        self.backward()
        grads = [leaf.grad for leaf in (self.x, self.a, self.b) if leaf.grad is not None]
        return [np.array(t.detach().numpy()) for t in (self.y, *grads)]


class TinygradChain(Chain):
    def start(self, threads: int) -> None:
        import tinygrad_bn as tg

        tg.set_num_threads(threads)

    def tensor(self, data: np.ndarray, requires_grad: bool) -> Any:
        import tinygrad_bn as tg

        return tg.tensor(data.astype(np.float32), requires_grad=requires_grad)


class TorchChain(Chain):
    def start(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def tensor(self, data: np.ndarray, requires_grad: bool) -> Any:
        import torch

        return torch.tensor(data, dtype=torch.float32, requires_grad=requires_grad)


def measure(
    size: int, operands: str, peers: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Return one row: microseconds per op of each library, and the ratios."""
    arguments = (size, operands, options.length, options.threads)
    with Remote(TinygradChain, *arguments, threads=options.threads) as ours:
        if not peers:
            turns = take_turns({"ours": ours}, plan(options, count=3))
        else:
            with Remote(TorchChain, *arguments, threads=options.threads) as theirs:
                for a, b in zip(ours.ask("results"), theirs.ask("results"), strict=True):
                    # A thousand roundings of 6e-8 each, in another order.
                    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
                contenders = {"ours": ours, "PyTorch": theirs}
                turns = take_turns(contenders, plan(options, count=3))
    row: dict[str, Any] = {"size": size, "operands": operands}
    for library, taken in turns.items():
        for phase in (*Chain.phases, None):
            us = summarize(seconds(taken, phase)).scaled(1e6 / options.length)
            row[f"{library}, {phase or 'both'}"] = us
    if peers:
        row["ratio"] = summarize(ratios(*(seconds(turns[t]) for t in ("ours", "PyTorch"))))
    return row


def main() -> None:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__, rounds=30)
    flags.add_argument("--length", type=int, default=1000, help="ops (default: %(default)s)")
    options = flags.parse_args()
    report = open_report("small_ops", options)
    peers = present(["torch"])
    report["length"] = options.length
    report["rows"] = rows = [
        measure(size, operands, peers, options)
        for operands in OPERANDS
        for size in (SIZES[:1] if options.quick else SIZES)
    ]
    columns = [key for key in rows[0] if key not in ("size", "operands", "ratio")]
    print(f"\n{options.length} ops in a chain; microseconds per op:")
    print_table(
        ["entries", "operands", *columns, *(["ratio to PyTorch"] if peers else [])],
        [[row[k] for k in ("size", "operands", *columns, *(["ratio"] if peers else []))]
         for row in rows],
    )  # fmt: skip
    if peers:
        report["geometric mean"] = statistics.geometric_mean(row["ratio"].median for row in rows)
        print(f"\nGeometric mean of the ratios: {report['geometric mean']:.2f}")
    close_report(report, options)


if __name__ == "__main__":
    main()
