"""float16 and bfloat16 in compiled loops: all entries, widened and narrowed as NumPy casts them."""

import ml_dtypes
import numpy as np
import pytest

from tinygrad_bn.kernels.cpu.compiled import compiled
from tinygrad_bn.kernels.cpu.stored import loops_take, narrowed, stored, widened

pytest.importorskip("numba")

HALVES = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
EVERY = np.arange(2**16, dtype=np.uint16)


@compiled("H[:], out f4[:]")
def widen(x, y):
    for i in range(len(x)):
        y[i] = widened(x[i])


@compiled("T[:], out H[:]")
def narrow(x, y):
    for i in range(len(x)):
        y[i] = narrowed(x[i], y[i])


@HALVES
def test_every_entry_is_widened_as_numpy_does(dtype):
    x = EVERY.view(dtype)
    found = np.empty(x.shape, np.float32)
    widen.of(stored(x).dtype)(stored(x), found)
    np.testing.assert_array_equal(found, x.astype(np.float32))  # NaN where NaN is
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
    some = slice(None, None, 97)
    by_python = [widened(entry) for entry in stored(x)[some]]
    np.testing.assert_array_equal(by_python, found[some])


@HALVES
def test_every_entry_halfway_points_and_their_neighbours_are_narrowed_as_numpy_does(dtype):
    x = EVERY.view(dtype).astype(np.float32)
    bits = np.sort(x[np.isfinite(x)])
    with np.errstate(over="ignore"):
        halfway = bits[:-1] + (bits[1:] - bits[:-1]) / 2  # exact: float32 has more bits
        largest = bits[-1] + (bits[-1] - bits[-2]) / 2  # from here on, infinity
    around = [np.nextafter(halfway, np.float32(end)) for end in (-np.inf, np.inf)]
    ends = np.float32([0, -0.0, largest, np.nextafter(largest, np.float32(0)), 3e38, 1e-45, np.nan])
    values = np.concatenate([x, halfway, *around, ends, -ends])
    found = np.empty(values.shape, dtype)
    narrow.of(np.float32, stored(found).dtype)(values, stored(found))
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
    nan = np.isnan(values)
    assert np.isnan(found[nan].astype(np.float32)).all()
    # As bits, so that -0 is not 0.
    np.testing.assert_array_equal(found[~nan].view(np.int16), expected[~nan].view(np.int16))
    some = np.flatnonzero(~nan)[::997]
    with np.errstate(over="ignore"):
        by_python = [narrowed(value, stored(found)[0]) for value in values[some]]
    np.testing.assert_array_equal(by_python, stored(found)[some])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_wider_dtypes_go_through_as_they_are(dtype):
    x = np.random.default_rng(0).standard_normal(99).astype(dtype)
    assert stored(x) is x and loops_take(x.dtype)
    found = np.empty_like(x)
    narrow.of(dtype, dtype)(x, found)
    np.testing.assert_array_equal(found, x)
    assert widened(x[0]) == x[0] and narrowed(x[0], x[1]) == x[0]
