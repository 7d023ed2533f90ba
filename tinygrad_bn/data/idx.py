"""The IDX format, in which the MNIST family of data sets is kept.

    two zero bytes | element type: 1 byte | rank: 1 byte | sizes: rank x uint32 | elements

Everything is big-endian; elements run in C order.
Source: the format's description at the foot of LeCun's page, http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import math

import numpy as np

from tinygrad_bn.data.errors import DatasetCorruptError

_ELEMENT_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def parse_idx(payload: bytes, name: str = "idx data") -> np.ndarray:
    """Return the array that an uncompressed IDX payload holds: own memory, native byte order.

    payload: the whole file, already decompressed.
    name: what error messages call it.

    Raises DatasetCorruptError where the header is not IDX, or the elements are fewer or more than
    the header announces.

    >>> header = bytes([0, 0, 0x08, 2]) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")
    >>> parse_idx(header + bytes(range(6)))
    array([[0, 1, 2],
           [3, 4, 5]], dtype=uint8)
    """
    if len(payload) < 4 or payload[:2] != b"\0\0" or payload[2] not in _ELEMENT_TYPES:
        raise DatasetCorruptError(
            f"parse_idx: {name} begins with {payload[:4].hex(' ') or 'nothing'}; an idx file "
            "begins with 00 00, an element type (08 for uint8) and a rank. Decompress it first, or "
            "fetch it again."
        )
    rank = payload[3]
    start = 4 + 4 * rank
    if len(payload) < start:
        raise DatasetCorruptError(
            f"parse_idx: {name} has {len(payload)} bytes, too few for the header of a rank-{rank} "
            f"array ({start} bytes). The file is cut short: fetch it again."
        )
    shape = tuple(int.from_bytes(payload[i : i + 4], "big") for i in range(4, start, 4))
    dtype = np.dtype(_ELEMENT_TYPES[payload[2]])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        raise DatasetCorruptError(
            f"parse_idx: {name} has {len(payload)} bytes; its header announces shape {shape} of "
            f"{dtype.newbyteorder('=').name}, which takes {expected}. Fetch it again."
        )
    elements = np.frombuffer(payload, dtype, offset=start).reshape(shape)
    return elements.astype(dtype.newbyteorder("="))  # a copy: bytes are read-only
