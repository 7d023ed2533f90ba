"""All benchmarks in one table: what was aimed at, what was measured, and what falls short.

    python benchmarks/report.py              the table, from benchmarks/results/*.json
    python benchmarks/report.py --measure    measure first: some minutes, on an idle machine
    python benchmarks/report.py --measure --quick       see that it works; writes nothing
    python benchmarks/report.py --measure small_ops     measure one anew, keep the others' results

Written are `summary.json` and `steps.png` beside the results, and the section of the README between
its two marks. A figure stands in one place: in the JSON file of the script that measured it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _checkout import REPOSITORY

RESULTS = Path(__file__).parent / "results"
README = REPOSITORY / "README.md"
MARKS = "<!-- benchmarks: written by benchmarks/report.py -->", "<!-- end of benchmarks -->"
SCRIPTS = ("training_step", "batch_norm", "small_ops", "import_time", "growth")
LAYOUTS = ("NHWC", "NCHW")
FAST, PLAIN = "tinygrad_bn [fast]", "tinygrad_bn"
NAMES = {
    FAST: "tinygrad_bn, with `[fast]`",
    PLAIN: "tinygrad_bn, NumPy only",
    "torch": "PyTorch eager",
    "compile": "`torch.compile`",
    "jax": "JAX jit",
    "mygrad": "MyGrad",
}
PEERS = ("torch", "compile", "jax", "mygrad")
Results = Mapping[str, Mapping[str, Any]]  # by script; a script that did not run is missing


@dataclass(frozen=True)
class Bar:
    """Something aimed at.

    value: what was measured; None if it was not. limit: what it should not exceed. unit: what both
        count, such as "× PyTorch eager".
    """

    name: str
    value: float | None
    limit: float
    unit: str

    @property
    def verdict(self) -> str:
        """Return "met", "missed by ..." or "not measured"."""
        if self.value is None:
            return "not measured"
        over = self.value / self.limit - 1
        return "met" if over <= 0 else f"**missed** by {over:.0%}"


def bars(results: Results) -> list[Bar]:
    """Return everything aimed at, with what the results say of it."""
    step = results.get("training_step", {}).get("layouts", {})
    norms = results.get("batch_norm", {})
    return [
        *(bar for layout in LAYOUTS for bar in step_bars(layout, step.get(layout, {}))),
        Bar("batch norm alone, geometric mean", _at(norms, "batch norm", "geometric mean"), 0.95,
            "× PyTorch eager"),
        Bar("batch norm alone, worst shape", _at(norms, "batch norm", "worst"), 1.25,
            "× PyTorch eager"),
        Bar("batch norm and ReLU, geometric mean",
            _at(norms, "batch norm and ReLU", "geometric mean"), 0.70, "× PyTorch eager"),
        *layout_bars(norms),
        Bar("chain of 1,000 small ops", _at(results, "small_ops", "geometric mean"), 0.80,
            "× PyTorch eager"),
        Bar("import", import_ratio(results), 1.3, "× `import numpy`"),
        Bar("step, from 64 to 4096 images", step_growth(results), 1.1, "× proportional"),
        Bar("tape, from 10⁴ to 10⁶ ops: p of time ∝ ops^p",
            _at(results, "growth", "tape summary", PLAIN, "exponent"), 1.1, ""),
    ]  # fmt: skip


def step_bars(layout: str, rows: Mapping[str, Any]) -> Iterator[Bar]:
    """Yield what is aimed at for the training step in one layout."""
    over = f"{FAST} over it"
    medians = {peer: _at(rows, peer, over, "median") for peer in PEERS}
    measured = [value for value in medians.values() if value is not None]
    memory = _at(rows, FAST, "peak MB"), _at(rows, "torch", "peak MB")
    name = f"tutorial step, {layout}"
    yield Bar(f"{name}, `[fast]`", medians["torch"], 0.60, "× PyTorch eager")
    yield Bar(f"{name}, `[fast]`", max(measured, default=None), 0.70, "× the best peer")
    yield Bar(
        f"{name}, NumPy only", _at(rows, "torch", f"{PLAIN} over it", "median"), 1.6,
        "× PyTorch eager",
    )  # fmt: skip
    ratio = None if None in memory else memory[0] / memory[1]
    yield Bar(f"peak memory, {layout}, `[fast]`", ratio, 0.80, "× PyTorch eager's")


def layout_bars(norms: Mapping[str, Any]) -> Iterator[Bar]:
    """Yield what is aimed at for batch norm with the channels last, beside channels first."""
    for kind, name in (("layouts", "batch norm"), ("layouts, with ReLU", "batch norm and ReLU")):
        mean, worst = _at(norms, kind, "geometric mean"), _at(norms, kind, "worst")
        yield Bar(f"{name}, channels last, geometric mean", mean, 1.00, "× channels first")
        # Runs of one and the same layout scatter by a twentieth.
        yield Bar(f"{name}, channels last, worst shape", worst, 1.05, "× channels first")


def import_ratio(results: Results) -> float | None:
    """Return the clock time of our import over NumPy's."""
    rows = results.get("import_time", {}).get("rows", [])
    return next((row["ratio of medians"] for row in rows if row["time"] == "clock"), None)


def step_growth(results: Results) -> float | None:
    """Return the time of a step on the largest batch over the proportional one."""
    rows = results.get("growth", {}).get("step", [])
    ours = [row for row in rows if row["library"] == PLAIN]
    return ours[-1]["over proportional"]["median"] if ours else None


def _at(found: Any, *path: str) -> Any:
    """Return the entry of nested dicts at `path`, or None."""
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


# --- as text ---------------------------------------------------------------------------------


def section(results: Results) -> str:
    """Return the README's section: machine, training step, bars."""
    parts = [[machine_line(results)], step_table(results), bar_table(bars(results))]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def machine_line(results: Results) -> str:
    """Return where and when it was measured, in a sentence."""
    machines = [result["machine"] for result in results.values()]
    if not machines:
        return "Nothing was measured."
    machine = machines[0]
    days = sorted({m["date"].split()[0] for m in machines})
    libraries = ("numpy", "numba", "torch", "jax", "mygrad")
    versions = [f"{name} {machine[name]}" for name in libraries if name in machine]
    return (
        f"Measured on {' and '.join(days)}: {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['memory']}, {machine['system']}, {machine['python']}, {', '.join(versions)}."
    )


def step_table(results: Results) -> list[str]:
    """Return the training step of every library as lines of Markdown."""
    layouts = results.get("training_step", {}).get("layouts", {})
    best = FAST if any(FAST in rows for rows in layouts.values()) else PLAIN
    present = [name for name in NAMES if any(name in rows for rows in layouts.values())]
    if not present:
        return []
    head = [
        f"step of batch {_at(results, 'training_step', 'batch')}",
        *(f"{layout}, ms" for layout in layouts),
        *(f"our time / its, {layout}" for layout in layouts),
        f"first step, s, {' / '.join(layouts)}",
        "peak, MB",
    ]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in present:
        rows = [layouts[layout].get(name) for layout in layouts]
        lines.append(
            _row([
                NAMES[name],
                *(_median(row, "step", ".1f") for row in rows),
                *(_median(row, f"{best} over it", ".2f") for row in rows),
                " / ".join(_first_step(row) for row in rows),
                " / ".join("–" if row is None else f"{row['peak MB']:.0f}" for row in rows),
            ])
        )  # fmt: skip
    return lines


def _first_step(row: Mapping[str, Any] | None) -> str:
    """Return the seconds of a first step, and of one that found compiled code on disk."""
    if row is None:
        return "–"
    again = row.get("first step, again")
    return f"{row['first step']:.1f}" + ("" if again is None else f" ({again:.1f} again)")


def _median(row: Mapping[str, Any] | None, key: str, digits: str) -> str:
    value = _at(row, key, "median")
    return "–" if value is None else format(value, digits)


def bar_table(found: Sequence[Bar]) -> list[str]:
    """Return the bars as lines of Markdown."""
    lines = [_row(["aim", "measured", "at most", "unit", ""]), _row(["---"] * 5)]
    for bar in found:
        value = "–" if bar.value is None else f"{bar.value:.2f}"
        lines.append(_row([bar.name, value, f"{bar.limit:.2f}", bar.unit, bar.verdict]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_section(text: str, new: str) -> str:
    """Return a README in which `new` stands between the marks; ValueError if they are not there."""
    begin, end = map(re.escape, MARKS)
    pattern = re.compile(f"({begin}\n).*?(\n{end})", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the README lacks the marks {MARKS[0]!r} and {MARKS[1]!r}")
    return pattern.sub(lambda match: f"{match[1]}{new}{match[2]}", text)


# --- as a picture ----------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """Draw the training step of every library, and every ratio beside its limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layouts = results.get("training_step", {}).get("layouts", {})
    names = [name for name in NAMES if any(name in rows for rows in layouts.values())]
    figure, (steps, aims) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    height = 0.8 / max(1, len(layouts))
    for i, (layout, rows) in enumerate(layouts.items()):
        present = [k for k, name in enumerate(names) if name in rows]
        summaries = [rows[names[k]]["step"] for k in present]
        medians = [s["median"] for s in summaries]
        spread = [
            [s["median"] - s["low"] for s in summaries],
            [s["high"] - s["median"] for s in summaries],
        ]
        steps.barh([k + i * height for k in present], medians, height, xerr=spread, label=layout)
    steps.set_yticks(range(len(names)), [NAMES[name].replace("`", "") for name in names])
    steps.invert_yaxis()
    steps.set_xlabel("milliseconds a training step (median, quartiles)")
    if names:
        steps.legend()
    measured = [bar for bar in bars(results) if bar.value is not None]
    colors = ["tab:green" if bar.verdict == "met" else "tab:red" for bar in measured]
    aims.barh(range(len(measured)), [bar.value / bar.limit for bar in measured], color=colors)  # pyrefly: ignore
    aims.axvline(1, color="black", linewidth=1)
    labels = [f"{bar.name}, {bar.unit}".replace("`", "").rstrip(", ") for bar in measured]
    aims.set_yticks(range(len(measured)), labels, fontsize=8)
    aims.invert_yaxis()
    aims.set_xlabel("measured over the limit (left of 1: met)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- the command -----------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any]:
    """Return the results of the scripts that have left some in `folder`."""
    paths = {name: folder / f"{name}.json" for name in SCRIPTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def measure(names: Sequence[str], folder: Path, quick: bool) -> None:
    """Run the scripts one after another; each leaves its results in `folder`."""
    for name in names:
        output = str(folder / f"{name}.json")
        script = str(Path(__file__).parent / f"{name}.py")
        command = [sys.executable, script, "--output", output, *(["--quick"] if quick else [])]
        print(f"\n=== {name}", flush=True)
        subprocess.run(command, check=True)


def main() -> None:
    """Measure if asked to, print the table, write it everywhere it belongs."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--measure", nargs="*", metavar="SCRIPT", help="run these scripts, or all")
    flags.add_argument("--quick", action="store_true", help="few rounds; writes nothing")
    options = flags.parse_args()
    unknown = set(options.measure or ()) - set(SCRIPTS)
    if unknown:
        flags.error(f"--measure: unknown {sorted(unknown)}; expected some of {list(SCRIPTS)}")
    names = list(SCRIPTS) if options.measure == [] else options.measure or []
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            measure(names, Path(folder), quick=True)
            print(f"\n{section(load(Path(folder)))}")
        return
    measure(names, RESULTS, quick=False)
    results = load(RESULTS)
    print(f"\n{section(results)}")
    summary = [{**asdict(bar), "verdict": bar.verdict.replace("*", "")} for bar in bars(results)]
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    draw(results, RESULTS / "steps.png")
    README.write_text(with_section(README.read_text(), section(results)))


if __name__ == "__main__":
    main()
