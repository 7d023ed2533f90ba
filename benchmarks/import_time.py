"""What `import tinygrad_bn` costs beside `import numpy`, which is part of it.

Each import runs in a fresh interpreter, in turns, and times itself, so that the start of Python is
not in it (which would flatter the ratio). Reported: milliseconds as median [quartiles] and least,
the ratio turn by turn, and the ratio of the least times, which noise disturbs least. `--profile`
lists which of our modules, and of those they load besides NumPy's, cost most.

    python benchmarks/import_time.py --quick
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from _measure import Turn, ratios, seconds, summarize, take_turns
from _report import close_report, open_report, parser, plan, print_table

REPOSITORY = Path(__file__).resolve().parents[1]
TIMED = """
from time import perf_counter
start = perf_counter()
import {module}
print(perf_counter() - start)
"""


def fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what a new interpreter, which finds this checkout first, printed."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    )


class Import:
    """An import, each time in a new process."""

    def __init__(self, module: str):
        self.code = TIMED.format(module=module)

    def turn(self, settle: int, count: int) -> Turn:
        """Return the seconds of one import; a process that has just started has nothing to settle."""
        return {"import": float(fresh_python("-c", self.code).stdout)}


def costs(module: str) -> Iterator[tuple[str, float, float]]:
    """Yield name, own and cumulative milliseconds of every module that importing `module` loads."""
    lines = fresh_python("-X", "importtime", "-c", f"import {module}").stderr
    for line in re.finditer(r"import time:\s+(\d+) \|\s+(\d+) \| +(\S+)", lines):
        yield line[3], int(line[1]) / 1000, int(line[2]) / 1000


def profile() -> None:
    """Print what is loaded on top of NumPy, the most expensive first."""
    with_numpy = {name for name, *_ in costs("numpy")}
    extra = sorted((c for c in costs("tinygrad_bn") if c[0] not in with_numpy), key=lambda c: -c[1])
    print(f"\n{len(extra)} modules beyond NumPy's, {sum(c[1] for c in extra):.1f} ms under -X importtime:")
    print_table(
        ["module", "own ms", "with what it loads"],
        [(name, f"{own:.2f}", f"{total:.2f}") for name, own, total in extra[:20]],
    )


def main() -> None:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__, rounds=40)
    flags.add_argument("--profile", action="store_true", help="list what costs most")
    options = flags.parse_args()
    report = open_report("import_time", options)
    modules = ("numpy", "tinygrad_bn")
    # The warm-up writes the bytecode caches and has the files in the system's cache.
    turns = take_turns({m: Import(m) for m in modules}, plan(options, warm_up=2))
    taken = {module: seconds(turns[module]) for module in modules}
    report["milliseconds"] = {m: summarize(taken[m]).scaled(1e3) for m in modules}
    report["ratio"] = summarize(ratios(taken["tinygrad_bn"], taken["numpy"]))
    report["ratio of least"] = min(taken["tinygrad_bn"]) / min(taken["numpy"])
    ms = report["milliseconds"]
    report["ratio of medians"] = ms["tinygrad_bn"].median / ms["numpy"].median
    print_table(
        ["import", "ms", "least"], [(m, ms[m], f"{ms[m].least:.1f}") for m in modules]
    )
    print(
        f"\nimport tinygrad_bn / import numpy: of the medians {report['ratio of medians']:.2f}, "
        f"turn by turn {report['ratio']}, of the least times {report['ratio of least']:.2f}"
    )
    if options.profile:
        profile()
    close_report(report, options)


if __name__ == "__main__":
    main()
