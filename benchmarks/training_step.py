"""One training step of the tutorial's network, beside PyTorch, `torch.compile`, JAX and MyGrad.

Forward, backward and plain SGD on one batch of 256 real images in float32, images channels last
(NHWC, the tutorial's; in PyTorch `memory_format=channels_last`) and channels first (NCHW). Every
library gets the same weights and the same batch, has a process and as many threads of its own, and
must first show, on noise, the same loss, gradients and updated weights: what is timed is the same
computation. We take part twice: with all kernels that are installed (`[fast]` is with Numba) and
with those of NumPy alone.

Reported for each layout: milliseconds of a step as median [quartiles], of its parts where they can
be told apart, the ratio of ours to each, turn by turn (below 1 we are faster), the largest resident
memory of each process, and the seconds of its first step, compiling included: every library starts
with empty caches. For ours they are measured a second time, with what the first has left there.

    --peers torch compile jax mygrad    whom to measure beside us; the default is all of them
    --profile                           print where our time goes, op by op, and PyTorch's beside it

    python benchmarks/training_step.py --quick
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from _measure import ratios, seconds, summarize, take_turns
from _process import Remote
from _report import close_report, open_report, parser, plan, present, print_table
from _steps import PEERS, Batch, TinygradStep, draw_batch, draw_noise, start_values

#: Ourselves, by the extras that are installed, with what goes into the environment.
PLAIN, FAST = "tinygrad_bn", "tinygrad_bn [fast]"
OURS = {PLAIN: {"TINYGRAD_BN_KERNELS": "numpy"}, FAST: {"TINYGRAD_BN_KERNELS": ""}}
#: Where compiled code is kept: by us, and by PyTorch.
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
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


def first_step(contender: Remote, batch: Batch) -> float:
    """Return the seconds of the first step that a contender ever takes, on a batch of noise."""
    contender.ask("load", *batch)
    return sum(contender.turn(0, 1).values())


def measure(
    layout: str, ours: list[str], peers: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the row of each library for one layout, and print our profile if asked for.

    ours: the names in `OURS` to take part; the last is the one that ratios are of.
    """
    arguments = (start_values(), layout, options.threads)
    classes = {**dict.fromkeys(ours, TinygradStep), **{p: PEERS[p][1] for p in peers}}
    # Noise has no flat parts. In those of real images all entries of a pooling window are equal
    # but for rounding, which then decides who takes the gradient.
    noise = draw_noise(options.batch)
    rows: dict[str, Any] = {}
    with ExitStack() as stack:
        caches = dict.fromkeys(CACHES, stack.enter_context(TemporaryDirectory()))

        def started(name: str) -> Remote:
            variables = {**caches, **OURS.get(name, {})}
            process = Remote(
                classes[name], *arguments, threads=options.threads, environment=variables
            )
            return stack.enter_context(process)

        contenders = {name: started(name) for name, s in classes.items() if layout in s.layouts}
        first = {name: first_step(contender, noise) for name, contender in contenders.items()}
        results = {name: contender.ask("results") for name, contender in contenders.items()}
        best = ours[-1]
        differences = {name: check(name, found, results[best]) for name, found in results.items()}
        load(contenders, draw_batch(options.batch))
        turns = take_turns(contenders, plan(options, warm_up=5))
        for name, taken in turns.items():
            rows[name] = {
                "step": summarize(seconds(taken)).scaled(1e3),
                **{p: summarize(seconds(taken, p)).scaled(1e3) for p in classes[name].phases},
                **{
                    f"{o} over it": summarize(ratios(seconds(turns[o]), seconds(taken)))
                    for o in ours
                },
                "difference": differences[name],
                "peak MB": contenders[name].peak_memory(),
                "first step": first[name],
            }
        rows[best]["first step, again"] = first_step(started(best), noise)
        show(layout, best, rows)
        if options.profile:
            show_profile(contenders, best, turns, options)
    return rows


def show(layout: str, ours: str, rows: dict[str, Any]) -> None:
    """Print the rows of one layout."""
    print(f"\n{layout}, milliseconds:")
    columns = ("step", "forward", "backward", "update", f"{ours} over it")
    print_table(
        ["library", *columns, "differs by", "peak MB", "first step, s"],
        [
            [
                name,
                *(str(row.get(column, "")) for column in columns),
                f"{row['difference']:.0e}",
                f"{row['peak MB']:.0f}",
                f"{row['first step']:.2f}",
            ]
            for name, row in rows.items()
        ],
    )
    print(f"First step of {ours} in another process: {rows[ours]['first step, again']:.2f} s")


def show_profile(
    contenders: dict[str, Remote], ours: str, turns: dict[str, Any], options: argparse.Namespace
) -> None:
    """Print what each op costs us, as a share of PyTorch's whole step where it was measured."""
    steps = 3 if options.quick else 20
    rows, phases = contenders[ours].ask("profile", steps)
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
    flags.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    flags.add_argument(
        "--layouts", nargs="+", choices=("NHWC", "NCHW"), default=["NHWC", "NCHW"], metavar="LAYOUT"
    )
    flags.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    flags.add_argument("--profile", action="store_true", help="print where our time goes")
    options = flags.parse_args()
    report = open_report("training_step", options)
    libraries = present(sorted({PEERS[peer][0] for peer in options.peers}))
    peers = [peer for peer in options.peers if PEERS[peer][0] in libraries]
    ours = [PLAIN, FAST] if present(["numba"]) else [PLAIN]
    report["batch"] = options.batch
    report["layouts"] = {
        layout: measure(layout, ours, peers, options) for layout in options.layouts
    }
    close_report(report, options)


if __name__ == "__main__":
    main()
