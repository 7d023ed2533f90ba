"""The folder of a run: what was asked for, what was measured, what came out."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from pathlib import Path
from typing import Any

from _console import warn

from tinygrad_bn import nn

CONFIG, METRICS, WEIGHTS, CURVES = "config.json", "metrics.jsonl", "model.safetensors", "curves.png"
# What decides how weights are scored.
SETTINGS = ("recipe", "data", "device", "dtype", "layout")


class Run:
    """A new folder below `options.output_dir`, with the options in its config.json.

    It takes the name that was asked for, or NAME-2, NAME-3, ... where that exists: no earlier run
    is overwritten.
    """

    def __init__(self, options: argparse.Namespace):
        name = options.name or f"{options.recipe}-seed{options.seed}" + (
            "-sample" if options.data == "sample" else ""
        )
        self.folder = _new_folder(Path(options.output_dir), name)
        config = {k: v for k, v in vars(options).items() if k not in ("evaluate", "name")}
        config["python"] = platform.python_version()
        text = json.dumps(config, indent=2)
        (self.folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        self.logged: list[dict[str, float]] = []

    def log(self, **numbers: float) -> None:
        """Write a line of metrics, in the file at once."""
        self.logged.append(numbers)
        # JSON has no NaN.
        line = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)

    def save(self, model: nn.Module) -> None:
        """Write the weights and the moving statistics."""
        nn.save(model, self.folder / WEIGHTS)

    def draw(self, title: str) -> None:
        """Draw the curves of what was logged, if matplotlib is installed."""
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            warn(f"no {CURVES}: {error}; pip install 'tinygrad_bn[train]'")
            return
        from _plots import draw_curves

        draw_curves(self.logged, title, self.folder / CURVES)


def _new_folder(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def find(run: str, output_dir: str) -> tuple[Path, dict[str, Any]]:
    """Return the weights of a run and the settings that they are to be scored with.

    run: the name of a run below `output_dir`, its folder, or a file of weights; settings come from
    the config.json beside it, and there are none where that is missing.

    Raises FileNotFoundError where there are no weights, ValueError for a broken config.json.
    """
    places = [Path(run), Path(run) / WEIGHTS, Path(output_dir) / run / WEIGHTS]
    weights = next((place for place in places if place.is_file()), None)
    if weights is None:
        tried = ", ".join(map(str, places))
        raise FileNotFoundError(f"--evaluate {run}: no weights there; looked for {tried}")
    config = weights.with_name(CONFIG)
    if not config.is_file():
        return weights, {}
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        return weights, {key: found[key] for key in SETTINGS if key in found}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is not what a run writes: {error}") from None
