"""NumPy's matrix products on one thread each, while our own threads share the work.

A product that splits itself over all CPUs from within each of our threads would queue behind the
others. OpenBLAS, which NumPy's wheels carry, is asked directly; any other library through
threadpoolctl, where that is installed; failing both, products keep their threads and the results
stay right.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Limit = tuple[Callable[[], int], Callable[[int], Any]]

_lock = threading.Lock()
_holders: set[object] = set()
_before: int | None = None  # the number to go back to; None while nobody holds


def hold(holder: object) -> None:
    """Keep products to one thread until `release(holder)`; several may hold at once."""
    global _before
    limit = _limit()
    if limit is None:
        return
    get, put = limit
    with _lock:
        if _before is None:
            _before = get()
            put(1)
        _holders.add(holder)


def release(holder: object) -> None:
    """End what `hold(holder)` began; the last one gives products their threads back.

    An interrupt may have cut that short, or this: it can be called again.
    """
    limit = _limit()
    if limit is None:
        return
    with _lock:
        _holders.discard(holder)
        if not _holders:
            _restore(limit)


def set_num_threads(count: int) -> None:
    """Let each product outside of `hold` use `count` threads."""
    global _before
    limit = _limit()
    if limit is None:
        return
    with _lock:
        if _before is None:
            limit[1](count)
        else:
            _before = count


def num_threads() -> int | None:
    """Return how many threads a product outside of `hold` uses; None where that is not known."""
    limit = _limit()
    if limit is None:
        return None
    with _lock:
        return limit[0]() if _before is None else _before


def forget_holders() -> None:
    """Undo all holds: in a forked child, whose parent's threads are not there to release theirs."""
    global _lock
    _lock = threading.Lock()
    _holders.clear()
    if _before is not None:
        _restore(_limit())


def _restore(limit: Limit | None) -> None:
    global _before
    if limit is not None and _before is not None:
        limit[1](_before)
        _before = None


@lru_cache(maxsize=1)
def _limit() -> Limit | None:
    """Return how to read and to set the number of threads of NumPy's products, or None."""
    return _bundled_openblas() or _through_threadpoolctl()


def _bundled_openblas() -> Limit | None:
    for path in _bundled_libraries():
        try:
            library = ctypes.CDLL(str(path))  # loaded already: this finds it
        except OSError:
            continue
        # The wheels prefix and suffix every symbol, so as not to meet another OpenBLAS.
        for prefix, suffix in itertools.product(("scipy_", ""), ("64_", "_64", "")):
            try:
                get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}")
                put = getattr(library, f"{prefix}openblas_set_num_threads{suffix}")
            except AttributeError:
                continue
            get.restype, get.argtypes = ctypes.c_int, []
            put.restype, put.argtypes = None, [ctypes.c_int]
            return get, put
    return None


def _bundled_libraries() -> Iterator[Path]:
    home = Path(np.__file__).parent
    for folder in (home.parent / "numpy.libs", home / ".libs", home / ".dylibs"):
        yield from sorted(folder.glob("*openblas*"))


def _through_threadpoolctl() -> Limit | None:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    pools = ThreadpoolController().select(user_api="blas").lib_controllers
    if not pools:
        return None

    def put(count: int) -> None:
        for pool in pools:
            pool.set_num_threads(count)

    return pools[0].get_num_threads, put
