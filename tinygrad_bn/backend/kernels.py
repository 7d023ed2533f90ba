"""Which kernel families may serve a call: a public status, an environment variable, a lazy import.

A family is a set of fused kernels for one kind of array: `numpy` and `numba` on the CPU, `cuda` on
a GPU. An op names its kernel modules by family; this file decides which of them to ask, in which
order, and remembers why a family is out. It knows no kernel's inside.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tinygrad_bn.backend import cuda
from tinygrad_bn.backend.arrays import backend_of

VARIABLE = "TINYGRAD_BN_KERNELS"
CHOICES = ("numpy", "numba", "cuda", "generic")

_chosen: ContextVar[str | None] = ContextVar("tinygrad_bn_kernels", default=None)

# What was found out once, by name. Every call of an op with kernels asks, in every thread. (Where
# Python has no global lock, calls of what `functools.cache` makes wait for one another.)
_environment: dict[str, str | None] = {}
_reasons: dict[str, str | None] = {}
_modules: dict[str, Any] = {}


@contextmanager
def use_kernels(family: str) -> Iterator[None]:
    """Serve ops inside the `with` block by `family` alone, or by no kernels: `"generic"`.

    >>> with use_kernels("generic"):
    ...     chosen()
    'generic'
    """
    before = _chosen.get()
    _chosen.set(_checked(family, "use_kernels"))
    try:
        yield
    finally:
        _chosen.set(before)


def chosen() -> str | None:
    """Return the one family that was asked for, `"generic"`, or None for the best that works."""
    return _chosen.get() or _from_environment()


def _from_environment() -> str | None:
    if VARIABLE not in _environment:
        value = os.environ.get(VARIABLE)
        _environment[VARIABLE] = _checked(value, VARIABLE) if value else None
    return _environment[VARIABLE]


def _checked(family: str, where: str) -> str:
    if family not in CHOICES:
        raise ValueError(f"{where}: unknown kernel family {family!r}; expected one of {CHOICES}")
    return family


def unusable_because(family: str) -> str | None:
    """Return why `family` cannot serve here, or None if it can."""
    if family not in _reasons:
        # Not in the place of what another thread has found out meanwhile.
        _reasons.setdefault(family, _missing(family))
    return _reasons[family]


def _missing(family: str) -> str | None:
    if family == "numba" and importlib.util.find_spec("numba") is None:
        return "the package numba is not installed (pip install 'tinygrad_bn[fast]')"
    return None


def rule_out(family: str, reason: str) -> None:
    """Ask `family` no more: it has turned out not to work here."""
    _reasons[family] = reason


def candidates(
    modules: Mapping[str, str], kind: str, arrays: Sequence[Any]
) -> Iterator[Callable[..., Any]]:
    """Yield the kernels to ask, best first: `kind` is "forward" or "vjp"."""
    only = chosen()
    if only == "generic":
        return
    for family in backend_of(*arrays).families:
        if family not in modules or (only is not None and family != only):
            continue
        if unusable_because(family) is None:
            kernel = _load(modules[family], kind)
            if kernel is not None:
                yield kernel


def _load(module: str, kind: str) -> Callable[..., Any] | None:
    if module not in _modules:
        _modules[module] = importlib.import_module(module)
    return getattr(_modules[module], kind, None)


def status(name: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Return, for each family that op `name` has kernels for, "usable" or why it is not used."""
    only = chosen()
    result = {}
    for family in modules:
        reason = unusable_because(family)
        if reason is None and family == "cuda":
            reason = cuda.unavailable_because()  # no array ever asks where there is no GPU
        if reason is None and only is not None and family != only:
            reason = f"{only!r} was asked for"
        result[family] = "usable" if reason is None else f"not used: {reason}"
    return result or {"generic": f"{name} has no kernels"}
