"""How precisely matrix products of float32 are computed on a GPU.

True float32 is the default. TF32, which many GPUs compute several times faster, keeps 10 of the 23
bits of a factor's fraction: errors of some 1e-3 instead of 1e-7. It is used where it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "TINYGRAD_BN_TF32"

_allowed: ContextVar[bool | None] = ContextVar("tinygrad_bn_tf32", default=None)


@contextmanager
def allow_tf32(enabled: bool = True) -> Iterator[None]:
    """Let matrix products of float32 on a GPU round their factors to TF32 inside the `with` block.

    The default is that of the environment variable `TINYGRAD_BN_TF32`: no, unless it is set to
    anything but 0. On the CPU nothing changes.

    >>> with allow_tf32():
    ...     tf32_is_allowed()
    True
    """
    before = _allowed.get()
    _allowed.set(enabled)
    try:
        yield
    finally:
        _allowed.set(before)


def tf32_is_allowed() -> bool:
    """Return whether matrix products of float32 may use TF32."""
    allowed = _allowed.get()
    return os.environ.get(VARIABLE, "0") not in ("", "0") if allowed is None else allowed
