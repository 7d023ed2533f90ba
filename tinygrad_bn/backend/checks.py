"""Checks that depend on data, such as whether labels are in range: always on the CPU, on a GPU by
request.

A GPU would have to finish all it was given before the host could look, at every step. So what is
wrong there gives wrong numbers, not an error: CuPy wraps an index that is out of bounds. While
looking for a fault, `TINYGRAD_BN_CHECK_DATA=1` or `with tg.check_data():` asks for the checks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tinygrad_bn.backend.arrays import backend_of
from tinygrad_bn.backend.recording import refuse

VARIABLE = "TINYGRAD_BN_CHECK_DATA"

_wanted: ContextVar[bool | None] = ContextVar("tinygrad_bn_check_data", default=None)


@contextmanager
def check_data(enabled: bool = True) -> Iterator[None]:
    """Check labels and indices on a GPU too inside the `with` block, which waits for it each time.

    The default is that of the environment variable `TINYGRAD_BN_CHECK_DATA`: no, unless it is set
    to anything but 0. On the CPU the checks are always made.

    >>> with check_data():
    ...     pass
    """
    before = _wanted.get()
    _wanted.set(enabled)
    try:
        yield
    finally:
        _wanted.set(before)


def extremes(array: Any) -> tuple[Any, Any] | None:
    """Return the least and the largest entry of a raw array, or None where no one should look."""
    if not array.size:
        return None
    if backend_of(array).accelerator is not None:
        wanted = _wanted.get()
        if wanted is None:
            wanted = os.environ.get(VARIABLE, "0") not in ("", "0")
        if not wanted:
            return None
        refuse(f"checks data ({VARIABLE} or tg.check_data)", "capture without these checks")
    return array.min().item(), array.max().item()
