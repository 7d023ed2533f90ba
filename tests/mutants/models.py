"""Small models with batch norms in them, and batches to run them on, drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tinygrad_bn import nn
from tinygrad_bn.testing.strategies.arrays import seeds


@dataclass(frozen=True, repr=False)
class Drawn:
    """A model, in training mode, and batches for it, whose sizes and statistics differ."""

    model: nn.Sequential
    batches: tuple[np.ndarray, ...]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{b.dtype}{list(b.shape)}" for b in self.batches)
        return f"{self.model!r}, batches {shapes}"


@st.composite
def normalized_models(draw: st.DrawFn) -> Drawn:
    """Return a strategy for one or two convolutions or linear layers, each before a batch norm.

    A Sequential, or one within another; ReLU after a batch norm or not, and between the two what
    does nothing in evaluation, or not; layers with bias or without, of one group or two, in either
    layout; batch norms with weight and bias, one of them or neither, of any eps, momentum and
    correction, Batch Renorm among them; a last layer without one, or not. All parameters and
    statistics are drawn.
    """
    blocks = draw(st.integers(1, 2))
    convolutions, nested = draw(st.booleans()), draw(st.booleans())
    layout = draw(st.sampled_from(("NCHW", "NHWC"))) if convolutions else "NC"
    dtype = draw(st.sampled_from(("float64", "float32")))
    rng = np.random.default_rng(draw(seeds()))
    layers: list[nn.Module] = []
    for i in range(blocks):
        picks = draw(st.binary(min_size=8, max_size=8))
        layers += _block(picks, (2, 4)[i], 4, layout)
    if draw(st.booleans()):
        layers.append(nn.Linear(4, 2) if layout == "NC" else nn.Conv2d(4, 2, 1, layout=layout))
    model = nn.Sequential(nn.Sequential(*layers[:1]), *layers[1:]) if nested else None
    model = (model or nn.Sequential(*layers)).astype(dtype)
    _fill(model, rng)
    shape = {"NC": (2,), "NCHW": (2, 5, 4), "NHWC": (5, 4, 2)}[layout]
    batches = []
    for size in (4, 6, 3):
        spread, offset = rng.uniform(0.5, 2), rng.uniform(-3, 3)
        batches.append((spread * rng.standard_normal((size, *shape)) + offset).astype(dtype))
    return Drawn(model, tuple(batches))


def _block(picks: bytes, inputs: int, outputs: int, layout: str) -> list[nn.Module]:
    """Return the layers that eight bytes say."""
    left = iter(picks)

    def one_of(*values: Any) -> Any:
        return values[next(left) % len(values)]

    bias, groups = one_of(True, False), one_of(1, 2)
    scale, center = one_of((True, True), (False, False), (True, False), (False, True))
    layer: Any = nn.Linear(inputs, outputs, bias=bias)
    if layout != "NC":
        layer = nn.Conv2d(
            inputs, outputs, 3, padding=1, groups=groups, bias=bias, layout=layout
        )  # fmt: skip
    norm = one_of(nn.BatchNorm, nn.BatchNorm, nn.BatchNorm, nn.BatchRenorm)(
        outputs,
        eps=one_of(1e-5, 1e-3, 0.5),
        momentum=one_of(0.1, None, 0.5),
        correction=one_of(1, 0),
        axis=-1 if layout == "NHWC" else 1,
        scale=scale,
        center=center,
    )
    after = next(left)
    between: list[list[nn.Module]] = [[], [], [nn.Identity()], [nn.Dropout(0.5)]]
    return [layer, *between[after % 4], norm, *([nn.ReLU()] if after // 4 % 2 else [])]


def _fill(model: nn.Module, rng: np.random.Generator) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("num_batches_tracked"):
            tensor.data[...] = rng.integers(1, 9)
            continue
        values = rng.uniform(0.5, 1.5, tensor.shape)
        if not name.endswith("running_var"):
            values *= rng.choice((-1.0, 1.0), tensor.shape)
        tensor.data[...] = values
