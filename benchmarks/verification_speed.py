"""How many examples a second the verification kit checks, end to end under Hypothesis.

Batch norm in training on float64 (8, 4, 6, 6): every example is drawn by `batch_norm_inputs` (over
its whole range, the offset up to a million times the spread) and its gradient is compared with
extrapolated difference quotients along random directions, with respect to x alone, and to x, weight
and bias. Beside it, a test that draws one integer and does nothing: the examples that Hypothesis
itself has time for. The bar is 500 a second for x; the machine's share of that is the first line.

    python benchmarks/verification_speed.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, ClassVar

from _measure import Contender, seconds, summarize, take_turns
from _report import close_report, open_report, parser, plan, print_table

SHAPE = (8, 4, 6, 6)


class Examples(Contender):
    """A Hypothesis test, run with as many examples as asked for."""

    phases: ClassVar = ("run",)

    def __init__(self, strategy: Any, test: Callable[[Any], object], examples: int):
        from hypothesis import HealthCheck, given, settings

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(drawn: Any) -> None:
            test(drawn)

        self.run = run


def contenders(examples: int) -> dict[str, Examples]:
    """Return what is measured, cheapest first."""
    from hypothesis import strategies as st

    from tinygrad_bn import functional as F
    from tinygrad_bn import testing
    from tinygrad_bn.testing.strategies import batch_norm_inputs

    def batch_norm(x: Any, weight: Any, bias: Any, d: Any) -> Any:
        return F.batch_norm(x, None, None, weight, bias, True, d.momentum, d.eps, axis=d.axis)

    def check_x(d: Any) -> None:
        testing.check_grad(
            lambda x: batch_norm(x, d.weight, d.bias, d),
            d.x,
            mode="directional",
            cotangents=d.cotangent,
        )

    def check_all(d: Any) -> None:
        testing.check_grad(
            lambda x, weight, bias: batch_norm(x, weight, bias, d),
            *(d.x, d.weight, d.bias),
            mode="directional",
            cotangents=d.cotangent,
        )

    drawn = batch_norm_inputs(shape=SHAPE, training=True)
    return {
        "Hypothesis alone (an integer)": Examples(st.integers(), lambda drawn: None, examples),
        "drawing the inputs": Examples(drawn, lambda drawn: None, examples),
        "check_grad for x": Examples(drawn, check_x, examples),
        "check_grad for x, weight, bias": Examples(drawn, check_all, examples),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender: examples a second, by the runs of many examples."""
    turns = take_turns(contenders(options.examples), plan(options, settle=0))
    return [
        {
            "what": name,
            "examples a second": summarize([options.examples / s for s in seconds(taken)]),
        }
        for name, taken in turns.items()
    ]


def main() -> None:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__, rounds=12)
    flags.add_argument("--examples", type=int, default=300, help="a run (default: %(default)s)")
    options = flags.parse_args()
    report = open_report("verification_speed", options)
    report["examples"] = options.examples
    report["rows"] = rows = measure(options)
    print_table(["", "examples a second"], [list(row.values()) for row in rows])
    close_report(report, options)


if __name__ == "__main__":
    main()
