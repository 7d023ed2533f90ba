"""What `gpu.py` measures, and what the memory would allow: plain data, no GPU needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
#: How often a tensor of x's size crosses the memory bus: forward reads x twice and writes y,
#: backward reads x and g twice and writes gx. Less is possible where a channel stays on the chip.
PASSES = {"forward": 3, "backward": 5}
PHASES = tuple(PASSES)


@dataclass(frozen=True)
class Norm:
    """A batch norm to be measured.

    axis: of the channels. relu: whether max(y, 0) belongs to it.
    """

    shape: tuple[int, ...]
    axis: int = 1
    dtype: str = "float32"
    relu: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        layout = " channels last" if self.axis == -1 and len(self.shape) > 2 else ""
        return f"{'×'.join(map(str, self.shape))}{layout} {self.dtype}{' + ReLU' * self.relu}"

    def floor(self, phase: str, bandwidth: float) -> float:
        """Return milliseconds that `PASSES` take at `bandwidth`, in bytes a second."""
        return PASSES[phase] * math.prod(self.shape) * ITEM[self.dtype] / bandwidth * 1e3


_LARGE = (256, 64, 56, 56)
#: Images channels last have their shape written so: (N, H, W, C).
NORMS = (
    Norm(_LARGE),
    Norm((64, 256, 56, 56)),
    Norm((256, 2048, 7, 7)),
    Norm((256, 20, 24, 24)),
    Norm((256, 50, 10, 10)),
    Norm((65536, 1024)),
    Norm((8192, 4096)),
    Norm((256, 56, 56, 64), -1),
    Norm((64, 56, 56, 256), -1),
    Norm((256, 7, 7, 2048), -1),
    Norm(_LARGE, dtype="float16"),
    Norm(_LARGE, dtype="bfloat16"),
    Norm(_LARGE, relu=True),
    Norm((256, 56, 56, 64), -1, relu=True),
)


def norm_rows(results: Mapping[str, Any], bandwidth: float) -> list[list[str]]:
    """Return the table's rows: case, phase, floor, and for each library milliseconds and ratio.

    results: by case's name, {phase: {library: median milliseconds}}.
    """
    rows = []
    for norm in NORMS:
        for phase in PHASES:
            times = results.get(norm.name, {}).get(phase)
            if not times:
                continue
            floor, ours = norm.floor(phase, bandwidth), times["tinygrad_bn"]
            rows.append([norm.name, phase, f"{floor:.3f}", f"{ours:.3f}", f"{floor / ours:.2f}"])
            for library in ("torch", "compile"):
                theirs = times.get(library)
                rows[-1] += [f"{theirs:.3f}", f"{ours / theirs:.2f}"] if theirs else ["", ""]
    return rows


NORM_HEADERS = (
    *("batch norm", "phase", "floor ms", "ours ms", "of the floor's speed"),
    *("PyTorch ms", "ours over it", "compiled ms", "ours over it"),
)


def roofline(results: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Return (library, phase, bytes that must move, bytes a second that they moved at)."""
    points = []
    for norm in NORMS:
        for phase, times in results.get(norm.name, {}).items():
            moved = PASSES[phase] * math.prod(norm.shape) * ITEM[norm.dtype]
            points += [(name, phase, moved, moved / ms * 1e3) for name, ms in times.items()]
    return points


def draw_roofline(results: Mapping[str, Any], bandwidth: float, device: str, path: Any) -> None:
    """Draw how fast each library moved the bytes that must move, beside the memory's copy speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    points = roofline(results)
    for library in dict.fromkeys(name for name, *_ in points):
        for phase, marker in zip(PHASES, "ov", strict=True):
            chosen = [(x, y / 1e9) for name, p, x, y in points if (name, p) == (library, phase)]
            if chosen:
                axes.scatter(*zip(*chosen, strict=True), marker=marker, label=f"{library} {phase}")
    axes.axhline(bandwidth / 1e9, color="black", linestyle="--", label="copying")
    axes.set(
        xscale="log", yscale="log", xlabel="bytes that must move (3 or 5 passes)",
        ylabel="GB a second", title=f"Batch norm on {device}",
    )  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def disagreement(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest difference of arrays, relative to the largest entry of each."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        scale = float(abs(b).max()) or 1.0
        difference = float(abs(a - b).max()) / scale
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference)
    return worst
