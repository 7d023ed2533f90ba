"""Inputs on which batch norm goes wrong: one list, for the tests and for the table in the docs.

Each has an answer in long double, and errors are measured on the scales on which they matter, per
channel, with s = 1/√(v + ε):

    y: |γ| max|x̂| + |β|      dx: |γ| s max|g|      dγ: Σ|g x̂|      dβ: Σ|g|

Where the right value overflows the dtype, an infinity is right; where it is NaN, NaN is. Where a
scale is 0 (dγ of a constant channel), the error counts as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.testing.batch_norm_reference import Expected, expected

#: What an error may be, as a share of its scale: for float16 two units in the last place.
BOUNDS = {"float32": 1e-5, "float16": 2 * 2.0**-10, "bfloat16": 2 * 2.0**-7}

#: The results that are compared, as `Expected` and as texts call them.
NAMES = {"y": "y", "gx": "dx", "gweight": "dγ", "gbias": "dβ"}


@dataclass(frozen=True)
class HardCase:
    """A batch, what it is multiplied and shifted by, and the cotangent g of the output.

    x, g: (N, C, *spatial), or with the channels on `axis`. weight, bias: (C,). eps: of x².
    repeats: how often x and g are repeated along axis 0 to make the batch that is meant: the
        answer is the same, but for the sums.
    """

    name: str
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    g: np.ndarray
    eps: float = 1e-5
    axis: int = 1
    repeats: int = 1

    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return x, weight, bias and g of the batch that is meant."""
        x, g = (np.tile(a, (self.repeats,) + (1,) * (a.ndim - 1)) for a in (self.x, self.g))
        return x, self.weight, self.bias, g

    def expected(self) -> Expected:
        """Return the right answer for x as it stands here, not repeated."""
        return expected(self.x, self.weight, self.bias, self.g, eps=self.eps, axis=self.axis)

    def errors(self, **results: Any) -> dict[str, float]:
        """Return the largest error of each result as a share of its scale: of y, gx, gweight and
        gbias, arrays. Infinite for NaN where a number belongs, and the reverse.

        >>> case = hard_case("ordinary")
        >>> case.errors(y=case.expected().y, gbias=case.g.sum(axis=(0, 2, 3)))
        {'y': 0.0, 'gbias': 0.0}
        """
        want = self.expected()
        found = {}
        for name, got in results.items():
            right, scale = getattr(want, name), want.scales[name]
            if name in ("gweight", "gbias"):
                right, scale = right * self.repeats, scale * self.repeats
            else:
                # The smallest and the largest of what is meant to be the same stand for them all.
                got = got.reshape(self.repeats, *self.x.shape)
                got = np.stack([got.min(axis=0), got.max(axis=0)])
            found[name] = _error(got, right, scale, self.x.dtype)
        return found


def _error(got: np.ndarray, right: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> float:
    """Return the largest |got - right| / scale; less than half the least number is no error."""
    with np.errstate(all="ignore"):
        rounded = right.astype(got.dtype)
        error = np.abs(got.astype(np.longdouble) - right)
        error = np.maximum(error - least_rounding(got.dtype), 0) / np.where(scale == 0, 1, scale)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    error = np.where(same & ~np.isfinite(rounded), 0.0, error)
    error = np.where(np.isnan(error), np.where(same, 0.0, np.inf), error)
    return float(error.max(initial=0))


def least_rounding(dtype: np.dtype) -> float:
    """Return how far rounding to `dtype` may move any number: half the least there is."""
    if dtype.name == "bfloat16":
        return 2.0**-133 / 2
    return float(np.finfo(dtype).smallest_subnormal) / 2


# --- the list --------------------------------------------------------------------------------


def hard_cases(dtype: str = "float32") -> Iterator[HardCase]:
    """Yield the cases of one dtype, drawn from fixed seeds: "float32", "float16" or "bfloat16".

    >>> [case.name for case in hard_cases("bfloat16")]
    ['bfloat16', 'bfloat16, mean 100 × spread']
    """
    yield from {"float32": _float32, "float16": _float16, "bfloat16": _bfloat16}[dtype]()


def hard_case(name: str) -> HardCase:
    """Return the case of that name; ValueError for another."""
    for dtype in BOUNDS:
        for case in hard_cases(dtype):
            if case.name == name:
                return case
    raise ValueError(f"hard_case: there is no case {name!r}; hard_cases() yields all")


_CHANNELS = 4


def _case(
    name: str,
    dtype: str = "float32",
    offset: Any = 0.0,
    spread: Any = 1.0,
    shape: tuple[int, ...] = (64, _CHANNELS, 12, 12),
    axis: int = 1,
    **fields: Any,
) -> HardCase:
    """Return a batch of normal numbers with that mean and spread, one for all channels or each."""
    rng = np.random.default_rng(20)
    along = [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
    offset, spread = (np.reshape(value, along) for value in (offset, spread))
    channels = shape[axis]
    case = HardCase(
        name,
        rng.standard_normal(shape) * spread + offset,
        rng.uniform(0.5, 2.0, channels),
        rng.standard_normal(channels),
        rng.standard_normal(shape),
        axis=axis,
    )
    case = replace(case, **fields)
    arrays = {
        name: getattr(case, name).astype(backend.as_dtype(dtype))
        for name in ("x", "weight", "bias", "g")
    }
    if dtype != "float32":  # parameters are kept in float32
        arrays |= {name: arrays[name].astype(np.float32) for name in ("weight", "bias")}
    return replace(case, **arrays)


def _with(case: HardCase, value: float, *index: Any) -> HardCase:
    """Return the case with x at `index` replaced."""
    case.x[index] = value
    return case


def _float32() -> Iterator[HardCase]:
    last: dict[str, Any] = {"shape": (64, 12, 12, _CHANNELS), "axis": -1}
    yield _case("ordinary")
    for power in (3, 6, 7):
        yield _case(f"mean 10{_UP[power]} × spread", offset=10.0**power)
    yield _case(f"mean 10{_UP[7]} × spread, channels last", offset=1e7, **last)
    for text, constant in (("0.1", 0.1), ("10⁴", 1e4), ("10⁷", 1e7), ("10¹⁰", 1e10)):
        yield _case(f"constant {text}", offset=constant, spread=0.0)
    yield _with(_case("10⁴, but for one value", offset=1e4, spread=0.0), 1e4 + 1, 40, slice(None))
    yield _with(_case("first sample 10⁶, others ordinary"), 1e6, 0)
    odd = _case("first sample ordinary, others mean 10⁶", offset=1e6)
    odd.x[0] -= np.float32(1e6)
    yield odd
    for power in (-38, -30, -15, 15, 30, 38):
        yield _case(f"magnitude 10{_UP[power]}", spread=10.0**power * (0.5 if power > 37 else 1))
    yield _case("magnitudes 10⁻³⁰, 1, 10¹⁵, 10³⁰", spread=(1e-30, 1.0, 1e15, 1e30))
    yield _case("magnitude 10⁻¹⁵, ε = 10⁻³²", spread=1e-15, eps=1e-32)
    g = _case("").g
    yield _case("g of 10⁻³⁰", g=g * 1e-30)
    yield _case("g of 10³⁰", g=g * 1e30)
    yield _case("g of 10⁻³⁰, x of 10⁻¹⁵", g=g * 1e-30, spread=1e-15)
    yield _case("g with mean 10⁶ × spread", g=g + 1e6)
    yield _case("γ of 0, 10⁻³⁰, 1, 10³⁰", weight=np.array([0, 1e-30, 1, 1e30]))
    yield _case("two values a channel", shape=(2, 4096))
    yield _with(_case("NaN in one channel"), np.nan, 3, 1)
    yield _with(_case("∞ in one channel"), np.inf, 3, 1)
    rows = _case("20,000,000 rows, mean 10 × spread", offset=10.0, shape=(1000, 2))
    yield replace(rows, repeats=20_000)


def _float16() -> Iterator[HardCase]:
    yield _case("float16", "float16")
    yield _case("float16, mean 10³ × spread", "float16", offset=1e3)
    yield _case("float16, up to 60,000", "float16", spread=1e4)
    yield _case("float16 constants", "float16", offset=(0.1, 1e3, 6e4, -6e-8), spread=0.0)
    yield _case("float16 subnormals", "float16", spread=1e-6)
    small = _case("", "float16").g * np.float16(1e-7)
    yield _case("float16, g of 10⁻⁷", "float16", g=small)
    # γ s g passes 65,504 in one entry of three, and what is left is just below.
    yield _case("float16, dx overflows", "float16", spread=1e-3, weight=np.full(_CHANNELS, 200.0))
    yield _case("float16, 100,000 rows of 100 ± 1", "float16", offset=100.0, shape=(100_000, 2))
    yield _with(_case("float16, NaN in one channel", "float16"), np.nan, 3, 1)


def _bfloat16() -> Iterator[HardCase]:
    yield _case("bfloat16", "bfloat16")
    yield _case("bfloat16, mean 100 × spread", "bfloat16", offset=100.0)


_UP = {3: "³", 6: "⁶", 7: "⁷", -38: "⁻³⁸", -30: "⁻³⁰", -15: "⁻¹⁵", 15: "¹⁵", 30: "³⁰", 38: "³⁸"}
