"""The command line that all benchmarks share, their tables, and the JSON file each one leaves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from _machine import describe, installed
from _measure import Plan

from tinygrad_bn.kernels.cpu.threads import available_cpus

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags of every benchmark; its help is the module's docstring."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--quick",
        action="store_true",
        help="few rounds and cases: to see that it works, not to learn a number",
    )
    made.add_argument(
        "--rounds", type=int, default=rounds, help="turns of each contender (default: %(default)s)"
    )
    made.add_argument(
        "--threads",
        type=int,
        default=available_cpus(),
        help="threads that each library may use (default: %(default)s, the CPUs at hand)",
    )
    made.add_argument(
        "--output",
        type=Path,
        help="JSON file to write (default: benchmarks/results/<name>.json, and none with --quick)",
    )
    return made


def plan(options: argparse.Namespace, **changes: int) -> Plan:
    """Return how often to measure, by the flags."""
    if options.quick:
        return Plan(rounds=3, **{**changes, "warm_up": 1})
    return Plan(rounds=options.rounds, **changes)


def open_report(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return a report to be filled, after printing the machine it is made on."""
    machine = describe(options.threads)
    print(f"{name}: {options.threads} threads")
    for key, value in machine.items():
        print(f"  {key:15}{value}")
    if machine["load"] > 0.5:
        print(
            f"Other work is going on (load {machine['load']}): ratios will be off. Who waits for "
            f"several threads suffers most, and that tends to be PyTorch."
        )
    return {"name": name, "machine": machine}


def close_report(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the report as JSON, where the flags say."""
    path = options.output or (None if options.quick else RESULTS / f"{report['name']}.json")
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=_plain) + "\n")
    print(f"\nWrote {path}")


def present(wanted: Sequence[str]) -> list[str]:
    """Return the libraries among `wanted` that are installed, and print what is missing."""
    missing = [name for name in wanted if not installed(name)]
    if missing:
        print(
            f"\nNot installed, so not measured: {', '.join(missing)} "
            f"(pip install 'tinygrad_bn[bench]')"
        )
    return [name for name in wanted if name not in missing]


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under headers, each column as wide as it must be."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for i, row in enumerate(cells):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * w for w in widths))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")
