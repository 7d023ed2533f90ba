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
_holders = 0
_before = 0


def hold() -> None:
    """Keep products to one thread until the matching `release`; calls nest, from any thread."""
    global _holders, _before
    limit = _limit()
    if limit is None:
        return
    get, put = limit
    with _lock:
        if _holders == 0:
            _before = get()
            if _before != 1:
                put(1)
        _holders += 1


def release() -> None:
    """End what one `hold` began; the last one gives products their threads back."""
    global _holders
    limit = _limit()
    if limit is None:
        return
    with _lock:
        _holders -= 1
        if _holders == 0 and _before != 1:
            limit[1](_before)


def set_num_threads(count: int) -> None:
    """Let each product outside of `hold` use `count` threads."""
    global _before
    limit = _limit()
    if limit is None:
        return
    with _lock:
        _before = count
        if _holders == 0:
            limit[1](count)


def forget_holders() -> None:
    """Undo all holds: in a forked child, whose parent's threads are not there to release theirs."""
    global _lock, _holders
    _lock = threading.Lock()
    if _holders:
        _holders = 0
        limit = _limit()
        if limit is not None:
            limit[1](_before)


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
