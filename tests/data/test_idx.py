from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_bn.data import DatasetCorruptError, parse_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def encode(array: np.ndarray, code: int) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    elements = array.astype(array.dtype.newbyteorder(">")).tobytes()
    return bytes([0, 0, code, array.ndim]) + sizes + elements


@given(st.data(), st.sampled_from(sorted(CODES)))
def test_every_array_that_the_format_can_hold_comes_back(data: st.DataObject, kind: str) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    array = data.draw(hnp.arrays(kind, shape))
    came = parse_idx(encode(array, CODES[kind]))
    assert came.dtype == array.dtype
    assert came.dtype.isnative
    np.testing.assert_array_equal(came, array)


def test_the_array_may_be_written_into() -> None:
    came = parse_idx(encode(np.zeros(3, "u1"), 8))
    came += 1
    assert came.tolist() == [1, 1, 1]


@given(st.integers(1, 4 + 8 + 6))
def test_a_truncated_payload_is_refused_wherever_it_is_cut(missing: int) -> None:
    payload = encode(np.ones((2, 3), "u1"), 8)
    with pytest.raises(DatasetCorruptError, match="some-file"):
        parse_idx(payload[: len(payload) - missing], "some-file")


def test_a_wrong_length_is_told_beside_the_announced_one() -> None:
    payload = encode(np.ones((2, 3), "i2"), 0x0B)
    size = 12 + math.prod((2, 3)) * 2
    with pytest.raises(DatasetCorruptError, match=rf"{size + 1} bytes.*\(2, 3\) of int16.*{size}"):
        parse_idx(payload + b"\0")


@pytest.mark.parametrize(
    "payload",
    [b"", b"\0\0", b"\x1f\x8b\x08\0" + bytes(20), b"<html>", bytes([0, 0, 7, 0]), b"\0\1\x08\0\0"],
    ids=["empty", "short", "gzip", "html", "unknown type", "not zero"],
)
def test_what_is_not_idx_is_refused(payload: bytes) -> None:
    with pytest.raises(DatasetCorruptError, match="begins with"):
        parse_idx(payload)


def test_a_payload_that_ends_within_its_header_is_told_so() -> None:
    with pytest.raises(DatasetCorruptError, match=r"11 bytes, too few for .* rank-2 array \(12"):
        parse_idx(encode(np.ones((2, 3), "u1"), 8)[:11])
