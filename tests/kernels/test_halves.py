"""float16 to float32 and back by bits, against NumPy's casts, which are right but slow."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn.kernels.cpu.halves import narrow, widen, work_dtype

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]


def check_narrow(values):
    out = np.empty(values.shape, np.float16)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
        narrow(values.copy(), out)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(out), nan)
    # As bits, so that -0 is not 0.
    np.testing.assert_array_equal(out[~nan].view(np.int16), expected[~nan].view(np.int16))


def test_every_float16_is_widened_as_numpy_does():
    for values in (EVERY, FINITE):
        np.testing.assert_array_equal(widen(values, "test"), values.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(widen(FINITE, "test")), np.signbit(FINITE))


def test_numbers_halfway_between_two_float16_and_their_neighbours_are_narrowed_as_numpy_does():
    small = np.sort(FINITE[np.abs(FINITE) < 2**15]).astype(np.float32)
    halfway = (small[1:] + small[:-1]) / 2  # exact: float32 has 13 more bits
    for values in (
        small,
        halfway,
        np.nextafter(halfway, np.float32(np.inf)),
        np.nextafter(halfway, np.float32(-np.inf)),
    ):
        check_narrow(values)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 18))
def test_any_float32_is_narrowed_as_numpy_does(seed, exponent):
    rng = np.random.default_rng(seed)
    check_narrow((rng.standard_normal((8, 33)) * 2.0**exponent).astype(np.float32))
    bits = rng.integers(0, 2**32, 999, dtype=np.uint64).astype(np.uint32).view(np.float32)
    check_narrow(bits)
    check_narrow(bits[np.abs(bits) < 2**15])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_blocks_that_are_views_are_widened_and_written_in_place(dtype):
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(dtype)
    np.testing.assert_array_equal(widen(x[1:4, 2:7], "test"), x[1:4, 2:7].astype(np.float32))
    out = np.zeros((6, 10), dtype)
    narrow(widen(x[1:4, 2:7], "test"), out[1:4, 2:7])
    np.testing.assert_array_equal(out[1:4, 2:7], x[1:4, 2:7])
    assert np.count_nonzero(out.astype(np.float32)) == 15


def test_wider_dtypes_are_left_as_they_are():
    for dtype in (np.float32, np.float64):
        x = np.ones(3, dtype)
        assert widen(x, "test") is x and work_dtype(x.dtype) == dtype
    assert work_dtype(np.dtype(np.float16)) == work_dtype(np.dtype(ml_dtypes.bfloat16)) == "f4"
    assert work_dtype(np.dtype(np.longdouble)) is work_dtype(np.dtype(int)) is None
