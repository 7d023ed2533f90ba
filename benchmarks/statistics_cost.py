"""What exact statistics cost: mean and variance of each channel, beside the naive ones in NumPy.

Naive is mean, centre, square, mean, each over the whole tensor, in float32:

    mean = x.mean(axes, keepdims=True); d = x - mean; var = (d * d).mean(axes)

Exact is what the NumPy kernel of `batch_norm` computes: sums about a value of the channel, block by
block while it is in cache, added up in float64. Both on tensors that exceed the cache. NumPy uses
one thread for the naive form, so `1 thread` is the comparison that is fair to it.

The mean of x is 1000 deviations, so that the shift has to be subtracted, which is a pass more.

Reported: milliseconds as median [quartiles], the ratio exact / naive, turn by turn, and the largest
error of the deviation √var as a share of it.

    python benchmarks/statistics_cost.py --quick
"""

from __future__ import annotations

from typing import Any, ClassVar

import _checkout  # noqa: F401  (before tinygrad_bn)
import numpy as np
from _measure import Contender, ratios, seconds, summarize, take_turns
from _report import close_report, open_report, parser, plan, print_table

import tinygrad_bn as tg
from tinygrad_bn.kernels.cpu import numpy_batch_norm as kernel

#: Shape and channel axis; the smallest has 51 MB.
CASES = (
    ((64, 64, 56, 56), 1),
    ((64, 56, 56, 64), 3),
    ((256, 50, 36, 36), 1),
    ((65536, 256), 1),
    ((4_000_000, 4), 1),
)


class Statistics(Contender):
    """Mean and variance of each channel of x, computed by `run`."""

    phases: ClassVar = ("run",)

    def __init__(self, x: np.ndarray, axis: int):
        self.x, self.axis = x, axis
        self.reduced = tuple(i for i in range(x.ndim) if i != axis)

    def run(self) -> None:
        self.found = self.statistics(self.x)

    def statistics(self, x: np.ndarray) -> Any:
        raise NotImplementedError


class Naive(Statistics):
    def statistics(self, x: np.ndarray) -> Any:
        mean = x.mean(axis=self.reduced, keepdims=True)
        d = x - mean
        return mean.ravel(), (d * d).mean(axis=self.reduced)


class Exact(Statistics):
    def __init__(self, x: np.ndarray, axis: int, threads: int):
        super().__init__(x, axis)
        self.threads = threads

    def statistics(self, x: np.ndarray) -> Any:
        tg.set_num_threads(self.threads)
        blocks = kernel.blocks_for(x, (self.axis,))
        assert blocks is not None
        return kernel._statistics(blocks, blocks.lay(x))


def deviation_error(contender: Statistics) -> float:
    """Return the largest relative error of √var."""
    x = contender.x
    _, var = contender.statistics(x)
    wide = np.moveaxis(x, contender.axis, 0).reshape(x.shape[contender.axis], -1)
    right = np.array([row.astype(np.float64).std() for row in wide])
    return float(np.abs(np.sqrt(var) / right - 1).max())


def main() -> None:
    """Measure, print the table, write the JSON."""
    options = parser(__doc__, rounds=11).parse_args()
    report = open_report("statistics_cost", options)
    rows: list[dict[str, Any]] = []
    for shape, axis in CASES[:1] if options.quick else CASES:
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        x += 1000
        contenders: dict[str, Statistics] = {
            "naive": Naive(x, axis),
            "exact, 1 thread": Exact(x, axis, 1),
            f"exact, {options.threads} threads": Exact(x, axis, options.threads),
        }
        turns = take_turns(contenders, plan(options))
        row: dict[str, Any] = {"shape": shape, "axis": axis}
        for name, taken in turns.items():
            row[name] = summarize(seconds(taken)).scaled(1e3)
        for name in [*contenders][1:]:
            row[f"{name} / naive"] = summarize(
                ratios(seconds(turns[name]), seconds(turns["naive"]))
            )
        row["error, naive"], row["error, exact"] = (
            deviation_error(contenders[name]) for name in ("naive", "exact, 1 thread")
        )
        rows.append(row)
    report["rows"] = rows
    cells = [[f"{v:.0e}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    print_table([*rows[0]], cells)
    close_report(report, options)


if __name__ == "__main__":
    main()
