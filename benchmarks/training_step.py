"""One training step of the tutorial's network, beside PyTorch eager and, on request, others.

Forward, backward and plain SGD on one batch of 256 real images in float32, images channels last
(NHWC, the tutorial's; in PyTorch `memory_format=channels_last`) and channels first (NCHW). Every
library gets the same weights and the same batch, has a process and as many threads of its own, and
must first show, on noise, the same loss, gradients and updated weights: what is timed is the same
computation.

Reported for each layout: milliseconds of a step as median [quartiles], of its parts where they can
be told apart, the ratio of ours to each, turn by turn (below 1 we are faster), and the largest
resident memory of each process.

    --peers torch compile jax mygrad    whom to measure beside us; the default is PyTorch eager
    --profile                           print where our time goes, op by op, and PyTorch's beside it

    python benchmarks/training_step.py --quick
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

import numpy as np
from _measure import ratios, seconds, summarize, take_turns
from _process import Remote
from _report import close_report, open_report, parser, plan, present, print_table
from _steps import PEERS, Batch, TinygradStep, draw_batch, draw_noise, start_values

OURS = "tinygrad_bn"
TOLERANCE = 3e-2


def check(name: str, found: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> float:
    """Return the largest difference to our results, relative to the largest entry of its array.

    Raises AssertionError above TOLERANCE. Rounding alone makes differences of 1e-5. But a float32
    mean that is off by so much decides a few of the million ReLUs and pooling windows otherwise;
    then a gradient, a sum of as many terms of either sign, moves by up to a hundredth, as PyTorch's
    does with channels last on one thread. Another computation differs by tenths.
    """
    if found.keys() != ours.keys():
        raise AssertionError(f"{name} computes {sorted(found)}, we {sorted(ours)}")
    worst = 0.0
    for key, array in ours.items():
        scale = np.abs(array).max() or 1.0
        difference = float(np.abs(found[key] - array).max() / scale)
        if not difference <= TOLERANCE:
            raise AssertionError(f"{name} computes another {key}: {difference:.1e} of its largest")
        worst = max(worst, difference)
    return worst


def load(contenders: dict[str, Remote], batch: Batch) -> None:
    """Give every contender its batch."""
    for contender in contenders.values():
        contender.ask("load", *batch)


def measure(layout: str, peers: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of each library for one layout, and print our profile if asked for."""
    arguments = (start_values(), layout, options.threads)
    classes = {OURS: TinygradStep, **{p: PEERS[p][1] for p in peers}}
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Remote(step, *arguments, threads=options.threads))
            for name, step in classes.items()
            if layout in step.layouts
        }
        # Noise has no flat parts. In those of real images all entries of a pooling window are equal
        # but for rounding, which then decides who takes the gradient.
        load(contenders, draw_noise(options.batch))
        results = {name: contender.ask("results") for name, contender in contenders.items()}
        differences = {name: check(name, found, results[OURS]) for name, found in results.items()}
        load(contenders, draw_batch(options.batch))
        turns = take_turns(contenders, plan(options, warm_up=5))
        for name, taken in turns.items():
            rows[name] = {
                "step": summarize(seconds(taken)).scaled(1e3),
                **{p: summarize(seconds(taken, p)).scaled(1e3) for p in classes[name].phases},
                "ours over it": summarize(ratios(seconds(turns[OURS]), seconds(taken))),
                "difference": differences[name],
                "peak MB": contenders[name].peak_memory(),
            }
        show(layout, rows)
        if options.profile:
            show_profile(contenders, turns, options)
    return rows


def show(layout: str, rows: dict[str, Any]) -> None:
    """Print the rows of one layout."""
    print(f"\n{layout}, milliseconds:")
    columns = ("step", "forward", "backward", "update", "ours over it")
    print_table(
        ["library", *columns, "differs by", "peak MB"],
        [
            [
                name,
                *(str(row.get(column, "")) for column in columns),
                f"{row['difference']:.0e}",
                f"{row['peak MB']:.0f}",
            ]
            for name, row in rows.items()
        ],
    )


def show_profile(
    contenders: dict[str, Remote], turns: dict[str, Any], options: argparse.Namespace
) -> None:
    """Print what each op costs us, as a share of PyTorch's whole step where it was measured."""
    steps = 3 if options.quick else 20
    rows, phases = contenders[OURS].ask("profile", steps)
    theirs = summarize(seconds(turns["torch"])).median * 1e3 if "torch" in turns else None
    print(
        "\nOur step, op by op: "
        + ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in phases.items())
        + ("" if theirs is None else f"; PyTorch's whole step {theirs:.1f} ms")
    )
    print_table(
        ["op", "phase", "calls", "ms", *([] if theirs is None else ["of PyTorch's step"])],
        [
            [
                op,
                phase,
                f"{calls:.0f}",
                f"{ms:.2f}",
                *([] if theirs is None else [f"{ms / theirs:.0%}"]),
            ]
            for op, phase, calls, ms in rows
        ],
    )
    if theirs is not None:
        print("\nPyTorch's operators, by its own profiler:")
        print_table(
            ["operator", "ms by itself"],
            [(key, f"{ms:.2f}") for key, ms in contenders["torch"].ask("profile", steps)[:16]],
        )


def main() -> None:
    """Measure, print the tables, write the JSON."""
    flags = parser(__doc__, rounds=40)
    flags.add_argument("--peers", nargs="*", choices=PEERS, default=["torch"])
    flags.add_argument(
        "--layouts", nargs="+", choices=("NHWC", "NCHW"), default=["NHWC", "NCHW"], metavar="LAYOUT"
    )
    flags.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    flags.add_argument("--profile", action="store_true", help="print where our time goes")
    options = flags.parse_args()
    report = open_report("training_step", options)
    libraries = present(sorted({PEERS[peer][0] for peer in options.peers}))
    peers = [peer for peer in options.peers if PEERS[peer][0] in libraries]
    report["batch"] = options.batch
    report["layouts"] = {layout: measure(layout, peers, options) for layout in options.layouts}
    close_report(report, options)


if __name__ == "__main__":
    main()
