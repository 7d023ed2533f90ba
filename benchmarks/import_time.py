"""What `import tinygrad_bn` costs beside `import numpy`, which is part of it.

Each import runs in a fresh interpreter, in turns, and times itself, so that the start of Python is
not in it (which would flatter the ratio). Reported: milliseconds as median [quartiles] and least,
of the clock and of the CPU; the ratio turn by turn; and the ratio of the least times, which noise
disturbs least. `--profile` lists which modules beyond NumPy's cost most.

    python benchmarks/import_time.py --quick
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from _checkout import REPOSITORY
from _measure import Turn, ratios, seconds, summarize, take_turns
from _report import close_report, open_report, parser, plan, print_table

TIMED = """
from time import perf_counter, process_time
start = perf_counter(), process_time()
import {module}
print(perf_counter() - start[0], process_time() - start[1])
"""


def fresh_python(cache: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what a new interpreter, which finds this checkout first, printed.

    cache: a folder for compiled bytecode. Both imports are to find theirs there, however this
        environment keeps it: compiling a package anew costs more than running it.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": cache,
        "PYTHONDONTWRITEBYTECODE": "",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )


class Import:
    """An import, each time in a new process."""

    def __init__(self, module: str, cache: str):
        self.code = TIMED.format(module=module)
        self.cache = cache

    def turn(self, settle: int, count: int) -> Turn:
        """Return the seconds of one import; a new process has nothing to settle."""
        clock, cpu = map(float, fresh_python(self.cache, "-c", self.code).stdout.split())
        return {"clock": clock, "CPU": cpu}


def costs(module: str, cache: str) -> Iterator[tuple[str, float, float]]:
    """Yield name, own and cumulative milliseconds of every module that importing `module` loads."""
    lines = fresh_python(cache, "-X", "importtime", "-c", f"import {module}").stderr
    for line in re.finditer(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)", lines):
        yield line[3], int(line[1]) / 1000, int(line[2]) / 1000


def profile(cache: str) -> None:
    """Print what is loaded on top of NumPy, the most expensive first."""
    with_numpy = {name for name, *_ in costs("numpy", cache)}
    extra = sorted(
        (c for c in costs("tinygrad_bn", cache) if c[0] not in with_numpy), key=lambda c: -c[1]
    )
    total = sum(own for _, own, _ in extra)
    print(f"\n{len(extra)} modules beyond NumPy's, {total:.1f} ms under -X importtime:")
    print_table(
        ["module", "own ms", "with what it loads"],
        [(name, f"{own:.2f}", f"{total:.2f}") for name, own, total in extra[:20]],
    )


def main() -> None:
    """Parse the flags and measure."""
    flags = parser(__doc__, rounds=40)
    flags.add_argument("--profile", action="store_true", help="list what costs most")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        measure(options, cache)


def measure(options: argparse.Namespace, cache: str) -> None:
    """Measure with bytecode kept in `cache`, print the table, write the JSON."""
    report = open_report("import_time", options)
    modules = ("numpy", "tinygrad_bn")
    # The warm-up compiles both, and has their files in the system's cache.
    turns = take_turns({m: Import(m, cache) for m in modules}, plan(options, warm_up=2))
    rows = []
    for kind in ("clock", "CPU"):
        theirs, ours = (seconds(turns[module], kind) for module in modules)
        ms = [summarize(taken).scaled(1e3) for taken in (theirs, ours)]
        rows.append(
            {
                "time": kind,
                **dict(zip(modules, ms, strict=True)),
                "ratio": summarize(ratios(ours, theirs)),
                "ratio of medians": ms[1].median / ms[0].median,
                "ratio of least": ms[1].least / ms[0].least,
            }
        )
    report["rows"] = rows
    print_table(
        ["time", *(f"{m}, ms" for m in modules), "ratio", "of medians", "of least"],
        [
            [
                *(row[key] for key in ("time", *modules, "ratio")),
                *(f"{row[key]:.2f}" for key in ("ratio of medians", "ratio of least")),
            ]
            for row in rows
        ],
    )
    if options.profile:
        profile(cache)
    close_report(report, options)


if __name__ == "__main__":
    main()
