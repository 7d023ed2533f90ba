"""The picture of a training run: loss and accuracy over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TRAIN, TEST, TEXT, GRID = "#3b78a8", "#c8511b", "#3c4043", "#e3e5e8"
SMOOTHED_OVER = 25  # steps
STYLE = {"fontsize": 10, "color": TEXT}


def draw_curves(logged: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Write a PNG with loss (left) and accuracy (right) of every step and every test.

    logged: the lines of metrics.jsonl, in order.
    """
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=TEXT)
    loss, accuracy = figure.subplots(1, 2)
    _panel(loss, logged, "loss", "Cross-entropy")
    _panel(accuracy, logged, "accuracy", "Accuracy")
    if accuracy.get_legend_handles_labels()[0]:
        accuracy.legend(frameon=False, fontsize=9, labelcolor=TEXT, loc="lower right")
    losses = _series(logged, "loss")[1]
    losses = losses[np.isfinite(losses)]
    if len(losses):
        # A few batches, and the first tests, may lie far above; the rest is what there is to see.
        loss.set_ylim(0, 1.15 * float(np.quantile(losses, 0.98)))
    accuracy.set_ylim(0, 1)
    figure.savefig(path)


def _panel(axes: Any, logged: Sequence[Mapping[str, float]], key: str, title: str) -> None:
    steps, values = _series(logged, key)
    tests, scores = _series(logged, f"test_{key}")
    axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=0.8)
    if len(values) > 2 * SMOOTHED_OVER:
        label = f"training batch, mean of {SMOOTHED_OVER} steps"
        axes.plot(*_smoothed(steps, values), color=TRAIN, linewidth=1.8, label=label)
    if len(scores):
        axes.plot(
            tests, scores, "o-", color=TEST, markersize=4.5, linewidth=1.2, label="all test images"
        )
        axes.annotate(
            f"{scores[-1]:.3f}",
            (tests[-1], scores[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            fontsize=10,
            color=TEST,
            fontweight="bold",
        )
    axes.set_title(title, loc="left", **STYLE)
    axes.set_xlabel("Step", **STYLE)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.margins(x=0.01)


def _series(logged: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    lines = [(line["step"], line[key]) for line in logged if key in line]
    points = np.array(lines, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return centred means over a window, and the steps in the middle of the windows."""
    window = np.ones(SMOOTHED_OVER) / SMOOTHED_OVER
    middle = SMOOTHED_OVER // 2
    return steps[middle : len(steps) - middle], np.convolve(values, window, mode="valid")
