"""Loops compiled by Numba, each for the dtypes it is asked for, once, and kept on disk.

    @compiled("T[:], T, out T[:]")
    def scale(x, factor, y):
        for i in range(len(x)):
            y[i] = factor * x[i]

    scale.of(x.dtype)(x, factor, y)

The signature lists the parameters: a dtype as NumPy abbreviates it (`f8`, `u1`), or a letter that
`of` replaces, in the order of the letters' first appearance; `[:]` with a colon for each axis of an
array, which must be contiguous; `out` before an array that is written. (Any other may be
read-only.) `int` and `bool` are Python's.

Compiled code holds no lock of Python's while it runs, so `threads.parallel` runs it side by side.
It starts no threads of its own: Numba's must not be entered from several threads at once, nor after
a fork. NaN and infinities keep their meaning. A sum is regrouped only where `sums=True` allows it,
and then in the same way every time. A product and a sum may be rounded once, as one operation,
unless `each_rounded=True`: then the bits are those of the same operations in NumPy.

Numba is imported by the first `of`, or by `usable()`. A kernel asks that after it has declined what
is too small for it, so a program with small arrays alone never waits for the import.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_bn.backend import kernels
from tinygrad_bn.backend.folders import cache_folder

Function = Callable[..., Any]

# Held while a function is made: Numba's settings are the whole process's.
_making = threading.RLock()
_said: set[str] = set()


@cache
def usable() -> bool:
    """Return whether Numba can be imported; where it cannot, its kernels are not asked again."""
    with _making:
        try:
            importlib.import_module("numba")
        except Exception as error:  # a NumPy newer than it knows, a broken installation, ...
            kernels.rule_out("numba", f"the package numba cannot be imported: {error}")
            warnings.warn(f"tinygrad_bn works without Numba: {error}", stacklevel=2)
            return False
    return True


def compiled(
    signature: str = "", *, sums: bool = False, each_rounded: bool = False
) -> Callable[[Function], Compiled]:
    """Return the decorator that makes a function a `Compiled`; see the module's docstring.

    signature: "" for a function that only other compiled ones call.
    sums: additions may be regrouped, so that a sum may be kept as a vector of partial sums.
    each_rounded: every operation is rounded by itself.
    """
    freedom = {"contract", "reassoc", "nsz"} if sums else {"contract"}
    return lambda function: Compiled(function, signature, set() if each_rounded else freedom)


class Compiled:
    """A function that is compiled when it is first asked for."""

    def __init__(self, function: Function, signature: str, freedom: set[str]):
        self.function = function
        self.parameters = re.split(r", (?![^\[]*\])", signature) if signature else []
        self.options = {"nogil": True, "error_model": "numpy", "fastmath": freedom}
        self._made: dict[tuple[Any, ...], Function] = {}
        self._inner: Function | None = None
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __call__(self, *args: Any) -> Any:
        """Run the function in Python, slowly: to step through it."""
        return self.function(*args)

    def made(self, *dtypes: Any) -> bool:
        """Return whether the function for these dtypes is there already."""
        return dtypes in self._made

    def of(self, *dtypes: Any) -> Function:
        """Return the function for arguments of these dtypes, made now if it is not there yet."""
        if dtypes not in self._made:
            with _making:
                if dtypes not in self._made:
                    self._made[dtypes] = self._make(dtypes)
        return self._made[dtypes]

    def _make(self, dtypes: tuple[Any, ...]) -> Function:
        numba = importlib.import_module("numba")
        letters = dict.fromkeys(re.findall(r"\b[A-Z]\b", " ".join(self.parameters)))
        chosen = dict(zip(letters, map(np.dtype, dtypes), strict=True))
        signature = tuple(_numba_type(numba, parameter, chosen) for parameter in self.parameters)
        function, sources = self._linked(numba)
        root = _cache_root(numba)
        if root is not None and not _cache_is_out():
            name = f"{function.__module__}.{function.__qualname__}"
            # One folder for each combination: whatever processes do there at once, they do alike.
            folder = root / "-".join([name, *map(str, chosen.values()), _digest(numba, sources)])
            try:
                return self._kept(numba, function, signature, folder)
            except Exception as error:  # a full disk, say, or a file of somebody else's
                _warn_of_cache(folder, error)
        _announce()
        return numba.njit(signature, **self.options)(function)

    def _kept(self, numba: Any, function: Any, signature: Any, folder: Path) -> Function:
        """Return `function` out of the cache's `folder`, or compiled now and put there."""

        def kept() -> Function:
            if not folder.exists():
                _announce()
            with _caching_in(numba, folder):
                return numba.njit(signature, cache=True, **self.options)(function)

        try:
            return kept()
        except OSError:
            raise
        except Exception:  # what is there cannot be read
            shutil.rmtree(folder, ignore_errors=True)
        return kept()

    def _inner_of(self, numba: Any) -> tuple[Function, set[str]]:
        """Return what other compiled functions call, and the files in which that is written."""
        function, sources = self._linked(numba)
        if self._inner is None:
            self._inner = numba.njit(**self.options)(function)
        return self._inner, sources

    def _linked(self, numba: Any) -> tuple[Function, set[str]]:
        """Return the function with what Numba can call in place of each `Compiled` and `Lowered`
        that it names, and the files in which it and they are written."""
        code = self.function.__code__
        names, sources = dict(self.function.__globals__), {code.co_filename}
        for name in code.co_names:
            value = names.get(name)
            if isinstance(value, (Compiled, Lowered)):
                names[name], its_sources = value._inner_of(numba)
                sources |= its_sources
        function = types.FunctionType(
            code, names, code.co_name, self.function.__defaults__, self.function.__closure__
        )
        function.__module__, function.__qualname__ = self.function.__module__, code.co_qualname
        return function, sources


class Lowered:
    """A function for compiled ones to call that says itself which instructions it is.

    function: does the same in Python. make: given Numba, returns the function for it to call.
    """

    def __init__(self, function: Function, make: Function):
        self.function = function
        self._make = make
        self._inner: Function | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the function in Python, slowly: to step through it."""
        return self.function(*args)

    def _inner_of(self, numba: Any) -> tuple[Function, set[str]]:
        if self._inner is None:
            self._inner = self._make(numba)
        return self._inner, {self.function.__code__.co_filename}


def _numba_type(numba: Any, parameter: str, chosen: dict[str, np.dtype]) -> Any:
    """Return the type of one parameter of a signature."""
    match = re.fullmatch(r"(out )?(\w+)(\[:(?:, ?:)*\])?", parameter)
    if match is None:
        raise ValueError(f"compiled: cannot read {parameter!r}; write for example 'out T[:]'")
    out, name, axes = match.groups()
    if name in ("int", "bool"):
        return numba.types.intp if name == "int" else numba.types.boolean
    entry = numba.from_dtype(chosen.get(name) or np.dtype(name))
    if axes is None:
        return entry
    return numba.types.Array(entry, axes.count(":"), "C", readonly=out is None)


# --- the cache ---------------------------------------------------------------------------------


@cache
def _cache_root(numba: Any) -> Path | None:
    """Return the folder for compiled code, or None, after a warning, if it cannot be written."""
    chosen = numba.config.CACHE_DIR  # the variable NUMBA_CACHE_DIR
    folder = Path(chosen, "tinygrad_bn") if chosen else cache_folder() / "numba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _warn_of_cache(folder, error)
        return None
    return folder


@contextmanager
def _caching_in(numba: Any, folder: Path) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _digest(numba: Any, sources: set[str]) -> str:
    """Return what compiled code depends on besides its own file, which Numba looks at."""
    binding = importlib.import_module("llvmlite.binding")
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(sources, key=os.path.basename):
        digest.update(Path(source).read_bytes())
    digest.update(binding.get_host_cpu_name().encode())
    digest.update(binding.get_host_cpu_features().flatten().encode())
    return digest.hexdigest()[:16]


def _announce() -> None:
    if _first_time("announcement"):
        print("tinygrad_bn: compiling CPU kernels, which takes some seconds", file=sys.stderr)


def _cache_is_out() -> bool:
    """Return whether the cache has failed in this process: it is not tried for every function."""
    with _making:
        return "warning" in _said


def _warn_of_cache(folder: Path, error: Exception) -> None:
    if _first_time("warning"):
        warnings.warn(
            f"tinygrad_bn cannot keep compiled code in {folder} ({error}), so every process has to "
            f"compile it anew; name a folder that can be written in NUMBA_CACHE_DIR",
            stacklevel=2,
        )


def _first_time(said: str) -> bool:
    with _making:
        if said in _said:
            return False
        _said.add(said)
        return True


if hasattr(os, "register_at_fork"):
    # A child must not begin with half a function, nor with a lock that nobody will release.
    os.register_at_fork(
        before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
    )
