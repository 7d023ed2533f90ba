"""Print which check kills which mutant, after how many examples; write it to docs/mutants.md.

python -m tests.mutants             # five seeds
python -m tests.mutants --seeds 1
"""

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.mutants.verdicts import EXAMPLES, FAMILIES, Verdict, false_alarms, verdicts

PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"

_HEAD = """\
# Mutants: what the verification kit finds out

`tinygrad_bn.testing` is tested on code that is wrong on purpose. Below is every such mutant: the
checks that found it out, and after how many examples, each time of at most {examples}. They are
those of `testing.verify_batch_norm`, of `testing.verify` for other ops, of a state machine for
layers, and laws for the rest. Where seeds differ, so may the check.

The page is written by `make mutants`, and `tests/mutants/` holds the mutants. `make test` requires
that each is found out with one seed.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    parser.add_argument("--no-page", action="store_true", help="leave docs/mutants.md as it is")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    alarms = false_alarms(seeds)
    for v in alarms:
        print(f"false alarm: {v.mutant}, seed {v.seed}: {v.check} after {v.examples} examples")
    if alarms:
        return 1
    page = [_HEAD.format(examples=EXAMPLES)]
    survived = 0
    for family in FAMILIES:
        start = time.perf_counter()
        found = verdicts(family, seeds)
        seconds = time.perf_counter() - start
        table = _table(found)
        print(f"{family}: {seconds:.0f} s", *table, sep="\n")
        survivors = [v for v in found if not v.check]
        survived += len(survivors)
        page += ["", f"## {family[0].upper()}{family[1:]}", "", *_summary(found, len(seeds)), ""]
        page += table
    if not arguments.no_page:
        PAGE.write_text("\n".join(page) + "\n")
        print(f"written to {PAGE}")
    print(f"{survived} runs without a kill" if survived else "all killed")
    return 1 if survived else 0


def _summary(found: list[Verdict], seeds: int) -> list[str]:
    """Return the score, and how many kills each check has."""
    killed = [v for v in found if v.check]
    mutants = len({v.mutant for v in found})
    counts = Counter(v.check for v in killed).most_common()
    lines = [
        f"{mutants} mutants, {seeds} seeds: {len(killed)} of {len(found)} runs end in a kill, "
        f"after {statistics.median(v.examples for v in found):g} examples in the median.",
        "",
        "Kills by check: " + ", ".join(f"{check} {n}" for check, n in counts) + ".",
    ]
    return lines


def _table(found: list[Verdict]) -> list[str]:
    """Return the lines of a Markdown table: mutant, checks, examples (fewest to most)."""
    by_mutant = defaultdict(list)
    for v in found:
        by_mutant[v.mutant].append(v)
    lines = ["| mutant | killed by | after examples |", "|---|---|---|"]
    for mutant, mine in by_mutant.items():
        checks = Counter(v.check or "**survived**" for v in mine).most_common()
        names = ", ".join(c if n == len(mine) else f"{c} ({n})" for c, n in checks)
        counts = sorted(v.examples for v in mine)
        span = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} – {counts[-1]}"
        escaped = mutant.replace("|", "\\|")
        lines.append(f"| {escaped} | {names} | {span} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
