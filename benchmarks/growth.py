"""How cost grows: a training step with its batch, the tape with its nodes.

    step    one step of the tutorial's network (NCHW) on batches of 64 to 4096 images; reported per
            image, and as the step's time over what proportional growth from 64 images would give
    tape    the chain of small_ops.py (one entry, all operands require grad) of 10³ to 10⁶ ops,
            forward and backward; reported per op, with the exponent p of time ∝ ops^p between 10⁴
            and 10⁶ (1 is linear), and the memory that the longest chain takes, per op. The graph of
            the turn before is let go at the beginning of a forward pass, inside what is timed; kept
            until the new one is there, it has Python's garbage collector go through twice as many
            objects, and p was 1.13

The sizes take turns, each in a process of its own. PyTorch eager stands beside us.

    python benchmarks/growth.py --quick
"""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from typing import Any

from _measure import Turn, ratios, seconds, summarize, take_turns
from _process import Remote
from _report import close_report, open_report, parser, plan, present, print_table
from _steps import TinygradStep, TorchStep, draw_batch, start_values
from small_ops import TinygradChain, TorchChain

BATCHES = (64, 256, 1024, 4096)
LENGTHS = (10**3, 10**4, 10**5, 10**6)
STEPS = {"tinygrad_bn": TinygradStep, "torch": TorchStep}
CHAINS = {"tinygrad_bn": TinygradChain, "torch": TorchChain}
Turns = dict[int, list[Turn]]  # by size


def time_steps(library: str, batches: tuple[int, ...], options: argparse.Namespace) -> Turns:
    """Return the turns of a library's step, by batch size."""
    arguments = (start_values(), "NCHW", options.threads)
    with ExitStack() as stack:
        contenders: dict[Any, Remote] = {}
        for size in batches:
            step = Remote(STEPS[library], *arguments, threads=options.threads)
            contenders[size] = stack.enter_context(step)
            contenders[size].ask("load", *draw_batch(size))
        return take_turns(contenders, plan(options, warm_up=2))


def time_chains(
    library: str, lengths: tuple[int, ...], options: argparse.Namespace
) -> tuple[Turns, float]:
    """Return the turns of a library's chain, by length, and the bytes per op of the longest."""
    with ExitStack() as stack:
        contenders: dict[Any, Remote] = {}
        for length in lengths:
            arguments = (1, "require grad", length, options.threads)
            chain = Remote(CHAINS[library], *arguments, threads=options.threads)
            contenders[length] = stack.enter_context(chain)
        longest = max(lengths)
        before = contenders[longest].peak_memory()
        # The longest chain takes some ten seconds a turn, and few of them tell.
        rounds = plan(argparse.Namespace(quick=options.quick, rounds=3), warm_up=1, settle=0)
        turns = take_turns(contenders, rounds)
        return turns, (contenders[longest].peak_memory() - before) * 1e6 / longest


def step_rows(library: str, turns: Turns) -> list[dict[str, Any]]:
    """Return a row for each batch size."""
    smallest = min(turns)
    return [
        {
            "library": library,
            "batch": size,
            "ms": summarize(seconds(taken)).scaled(1e3),
            "µs per image": summarize(seconds(taken)).scaled(1e6 / size),
            "over proportional": summarize(ratios(seconds(taken), seconds(turns[smallest]))).scaled(
                smallest / size
            ),
        }
        for size, taken in turns.items()
    ]


def tape_rows(library: str, turns: Turns) -> list[dict[str, Any]]:
    """Return a row for each length."""
    return [
        {
            "library": library,
            "ops": length,
            **{
                f"{phase or 'both'}, µs per op": summarize(seconds(taken, phase)).scaled(
                    1e6 / length
                )
                for phase in ("forward", "backward", None)
            },
        }
        for length, taken in turns.items()
    ]


def exponent(small: int, small_seconds: float, large: int, large_seconds: float) -> float:
    """Return p of time ∝ size^p through two measurements."""
    return math.log(large_seconds / small_seconds) / math.log(large / small)


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = parser(__doc__, rounds=30).parse_args()
    report = open_report("growth", options)
    libraries = ["tinygrad_bn", *present(["torch"])]
    batches = BATCHES[:2] if options.quick else BATCHES
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    report["step"] = rows = [
        row
        for library in libraries
        for row in step_rows(library, time_steps(library, batches, options))
    ]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    rows, report["tape summary"] = [], {}
    for library in libraries:
        turns, memory = time_chains(library, lengths, options)
        rows += tape_rows(library, turns)
        small, large = lengths[-3:][0], lengths[-1]
        medians = [summarize(seconds(turns[n])).median for n in (small, large)]
        p = exponent(small, medians[0], large, medians[1])
        report["tape summary"][library] = {"exponent": p, "bytes per op": memory}
    report["tape"] = rows
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    print()
    for library, found in report["tape summary"].items():
        print(
            f"{library}: time grows with ops^{found['exponent']:.2f}; the longest chain takes "
            f"{found['bytes per op']:.0f} bytes per op"
        )
    close_report(report, options)


if __name__ == "__main__":
    main()
