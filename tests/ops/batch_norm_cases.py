"""Inputs and an independent reference for batch norm, shared by its tests.

The reference is written from the formula alone, in longdouble, one channel after another.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tinygrad_bn.testing.hard_cases import least_rounding


@dataclass
class Case:
    x: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    g: np.ndarray
    axis: tuple[int, ...]
    eps: float

    @property
    def reduced(self):
        return tuple(i for i in range(self.x.ndim) if i not in self.axis)

    def along(self, vector):
        shape = [n if i in self.axis else 1 for i, n in enumerate(self.x.shape)]
        return np.asarray(vector).reshape(shape)


@st.composite
def cases(draw, dtype=np.float64, max_offset=1.0):
    """Draw a batch of 2 to 5 dimensions with one or two channel axes, at least 3 values a channel.

    Arrays are expanded from a drawn seed, so no channel is constant and no cotangent degenerate;
    gamma has zeros, and offset and spread differ from channel to channel.
    """
    ndim = draw(st.integers(2, 5), label="ndim")
    kept = draw(st.sets(st.integers(0, ndim - 1), min_size=1, max_size=min(2, ndim - 1)))
    axis = tuple(sorted(kept))
    shape = [draw(st.integers(1, 4), label="size") for _ in range(ndim)]
    reduced = [i for i in range(ndim) if i not in axis]
    shape[reduced[0]] = draw(st.integers(3, 9), label="batch")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    channels = [shape[i] for i in axis]
    case = Case(rng.standard_normal(shape), None, None, rng.standard_normal(shape), axis, 1e-5)
    spread = 10.0 ** rng.uniform(-2, 2, channels)
    offset = spread * max_offset * rng.uniform(-1, 1, channels)
    case.x = case.x * case.along(spread) + case.along(offset)
    if draw(st.booleans(), label="weight"):
        case.weight = rng.standard_normal(channels) * rng.integers(0, 2, channels)
    if draw(st.booleans(), label="bias"):
        case.bias = rng.standard_normal(channels)
    case.eps = draw(st.sampled_from([1e-5, 1e-12, 1e-1, 10.0]), label="eps")
    for name in ("x", "weight", "bias", "g"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.astype(dtype))
    return case


@dataclass
class Answer:
    """Right answers in longdouble, and the scale against which an error of each is measured."""

    y: np.ndarray
    gx: np.ndarray
    gweight: np.ndarray
    gbias: np.ndarray
    scales: dict[str, np.ndarray]

    def errors(self, **got):
        """Return, for each named result, its largest error relative to its scale.

        Half the least number of a result's dtype is no error: so far it must be rounded.
        """
        result = {}
        for name, value in got.items():
            error = np.abs(np.asarray(value, np.longdouble) - getattr(self, name))
            error = np.maximum(error - least_rounding(value.dtype), 0)
            scale = np.broadcast_to(self.scales[name], error.shape)
            result[name] = float(np.where(error == 0, 0, error / np.maximum(scale, 1e-300)).max())
        return result


def reference(case: Case) -> Answer:
    """Return y and the three gradients by the formula, channel by channel."""
    wide = np.longdouble
    x, g = (np.moveaxis(a.astype(wide), case.axis, range(len(case.axis))) for a in (case.x, case.g))
    channels = x.shape[: len(case.axis)]
    y, gx = np.empty_like(x), np.empty_like(x)
    gweight, gbias = np.empty(channels, wide), np.empty(channels, wide)
    names = ("y", "gx", "gweight", "gbias")
    scales = {name: np.empty(channels, wide) for name in names}
    for c in np.ndindex(*channels):
        gamma = wide(1) if case.weight is None else case.weight[c].astype(wide)
        beta = wide(0) if case.bias is None else case.bias[c].astype(wide)
        xc, gc = x[c], g[c]
        mean = xc.mean()
        s = 1 / np.sqrt(((xc - mean) ** 2).mean() + wide(case.eps))
        x_hat = (xc - mean) * s
        y[c] = gamma * x_hat + beta
        gx[c] = gamma * s * (gc - gc.mean() - x_hat * (gc * x_hat).mean())
        gweight[c], gbias[c] = (gc * x_hat).sum(), gc.sum()
        scales["y"][c] = np.abs(gamma) * np.abs(x_hat).max() + np.abs(beta)
        scales["gx"][c] = np.abs(gamma) * s * np.abs(gc).max()
        scales["gweight"][c], scales["gbias"][c] = np.abs(gc * x_hat).sum(), np.abs(gc).sum()
    back = range(len(case.axis)), case.axis
    for name in ("y", "gx"):
        scales[name] = case.along(scales[name])
    return Answer(np.moveaxis(y, *back), np.moveaxis(gx, *back), gweight, gbias, scales)
