"""A runtime that runs the text of a CUDA kernel on the CPU: compiled by g++ behind `shim.h`.

    with launch.use_runtime(ShimRuntime()):
        ...                     # kernels take NumPy arrays for arrays on a GPU

`on_cuda_kernels` also has ops on NumPy arrays served by the family `cuda`.
"""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.cuda.fake_blas import FakeBlas
from tinygrad_bn.backend import ARRAY_TYPES, kernels
from tinygrad_bn.kernels.cuda import batch_norm, channel_teams, channel_tiles, launch

HEADER = Path(__file__).with_name("shim.h")
COMPILER = os.environ.get("CXX", "g++")
# -O1 compiles fastest among what runs fast enough; a GPU contracts no more than fma() says here.
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE")

_OBSERVED = ("-fsanitize=thread", "--param=tsan-distinguish-volatile=1")
#: By the header that is told of every access, how it is compiled. To count them: so that none is
#: merged with another or made twice. To find races: so that no function returns a struct right into
#: memory, which would go unobserved.
OBSERVED = {
    "trace.h": ("-O0", *_OBSERVED),
    "races.h": (
        "-O1",
        "-fno-semantic-interposition",
        "-D__device__=__attribute__((always_inline))",
        *_OBSERVED,
    ),
}

#: Small, so that small arrays have several blocks of several warps, and more blocks than fit.
DEVICE = launch.Device(
    multiprocessors=3, threads=256, shared=12288, shared_per_block=16384, cooperative=True
)


def missing() -> str | None:
    """Return why kernels cannot run here, or None if they can."""
    if not sys.platform.startswith("linux"):
        return "the shim's fibers are written for Linux"
    return None if shutil.which(COMPILER) else f"there is no C++ compiler {COMPILER!r}"


class ShimRuntime:
    """A `launch.Runtime` whose device is the CPU and whose arrays are NumPy's.

    device: what the wrappers are told of it.
    backwards: run the last thread and the last block first.
    launched: the kernels that ran, as (name, blocks, threads).
    only: of a launch's number of blocks, the range of those that run; None for all.
    """

    def __init__(self, device: launch.Device = DEVICE, backwards: bool = False):
        self.device = device
        self.backwards = backwards
        self.only: Callable[[int], range] | None = None
        self.launched: list[tuple[str, int, int]] = []
        self.blas = FakeBlas()

    def current_device(self) -> int:
        return 0

    def current_stream(self) -> int:
        return 0

    def properties(self, index: int) -> launch.Device:
        return self.device

    def on_device_of(self, array):
        return nullcontext()

    def address(self, array) -> int:
        return _host(array).ctypes.data

    def compile(self, text: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(compiled(text)))

    def function(self, module: ctypes.CDLL, name: str):
        return name, module[f"shim_launch_{name}"], module[f"shim_parameters_{name}"]()

    def resident_blocks(self, function, threads: int, shared: int) -> int:
        by_memory = self.device.shared // shared if shared else 16
        return min(by_memory, self.device.threads // threads)

    def launch(self, function, blocks, threads, shared, arguments, cooperative) -> None:
        name, entry, parameters = function
        assert len(arguments) == parameters, f"{name} takes {parameters}, not {len(arguments)}"
        assert 0 < blocks < 2**31 and 0 < threads <= 1024
        assert shared <= self.device.shared_per_block, f"{name}: {shared} bytes of shared memory"
        if cooperative:
            room = self.resident_blocks(function, threads, shared) * self.device.multiprocessors
            assert blocks <= room, f"{name}: {blocks} blocks are not resident at once, {room} are"
        slots = [_slot(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(slots))(*(ctypes.addressof(s) for s in slots))
        sizes = (ctypes.c_uint * 3)(blocks, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1)
        self.launched.append((name, blocks, threads))
        part = range(blocks) if self.only is None else self.only(blocks)
        begin, end = ctypes.c_size_t(part.start), ctypes.c_size_t(part.stop)
        how = int(cooperative), int(self.backwards), begin, end
        failed = entry(*sizes, ctypes.c_size_t(shared), *how, pointers)
        if failed:
            raise DeadlockError(f"{name}: threads wait for ever")


class DeadlockError(RuntimeError):
    """A kernel's threads wait for what never happens."""


def _slot(argument):
    """Return one argument as the eight bytes that the kernel takes."""
    if type(argument) is int:
        return ctypes.c_int64(argument)
    if type(argument) is float:
        return ctypes.c_double(argument)
    return ctypes.c_int64(_host(argument).ctypes.data)


def _host(array) -> np.ndarray:
    return array if type(array) is np.ndarray else array._data


class Traced(ShimRuntime):
    """One that counts the bytes which kernels read and write; see trace.h.

    watch: the arrays to count for. moved: for each, bytes read and written by all launches so far.
    """

    def __init__(self, device: launch.Device = DEVICE):
        super().__init__(device)
        self.watch: list[np.ndarray] = []
        self.moved: list[list[int]] = []

    def compile(self, text: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(compiled(text, "trace.h")))

    def function(self, module: ctypes.CDLL, name: str):
        return *super().function(module, name), module

    def watching(self, *arrays: np.ndarray) -> None:
        """Count anew, for these arrays."""
        self.watch, self.moved = list(arrays), [[0, 0] for _ in arrays]

    def launch(self, function, *arguments) -> None:
        *function, module = function
        _watch(module, self.watch)
        super().launch(function, *arguments)
        found = (ctypes.c_uint64 * (2 * len(self.watch)))()
        module.counts(found)
        for k, (read, written) in enumerate(zip(found[::2], found[1::2], strict=True)):
            self.moved[k][0] += read
            self.moved[k][1] += written


class Ordered(ShimRuntime):
    """One whose launches raise RaceError for two accesses without an order; see races.h."""

    def compile(self, text: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(compiled(text, "races.h")))

    def function(self, module: ctypes.CDLL, name: str):
        return *super().function(module, name), module

    def launch(self, function, blocks, threads, shared, arguments, cooperative) -> None:
        *function, module = function
        _watch(module, [_host(a) for a in arguments if type(a) not in (int, float)])
        super().launch(function, blocks, threads, shared, arguments, cooperative)
        module.race.restype = ctypes.c_char_p
        found = module.race().decode()
        if found:
            raise RaceError(f"{function[0]}: {found}")


class RaceError(RuntimeError):
    """Two threads reach for the same memory, and nothing says who is first."""


def _watch(module: ctypes.CDLL, arrays: list[np.ndarray]) -> None:
    addresses = ctypes.c_size_t * len(arrays)
    begins = addresses(*(a.ctypes.data for a in arrays))
    ends = addresses(*(a.ctypes.data + a.nbytes for a in arrays))
    module.watch(len(arrays), begins, ends)


def compiled(text: str, observer: str | None = None) -> Path:
    """Return the library that g++ makes of a kernel's text; compiled once and kept.

    observer: the header that is told of every access to memory.
    """
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", text)
    exports = "".join(f"SHIM_EXPORT({name})\n" for name in names)
    headers = [HEADER.name, observer, "hooks.h"] if observer else [HEADER.name]
    front = "".join(HEADER.with_name(name).read_text(encoding="utf-8") for name in headers)
    whole = front + text + "\n" + exports
    key = hashlib.sha256(
        repr((COMPILER, OPTIONS, OBSERVED.get(observer), whole)).encode()
    ).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"tinygrad_bn-shim-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path, made = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
            path.write_text(whole, encoding="utf-8")
            source = path
            if observer:  # linked by itself, so without the sanitizer's library
                source = path.with_suffix(".o")
                _call(COMPILER, *OPTIONS, *OBSERVED[observer], "-c", "-o", source, path)
            _call(COMPILER, *OPTIONS, "-o", made, source)
            made.replace(library)  # whole, or not there: another process may look for it
    return library


def _call(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ refuses the kernel:\n{done.stderr[:4000]}")


@contextmanager
def on_cuda_kernels(runtime: ShimRuntime):
    """Have the family `cuda` serve ops on NumPy arrays inside the `with` block, by `runtime`."""
    before = ARRAY_TYPES[np.ndarray]
    ARRAY_TYPES[np.ndarray] = replace(before, families=("cuda",))
    try:
        with launch.use_runtime(runtime), kernels.use_kernels("cuda"):
            yield runtime
    finally:
        ARRAY_TYPES[np.ndarray] = before


@contextmanager
def small_tiles(teams: bool = True):
    """Have small arrays cut into many tiles of several blocks inside the `with` block.

    teams: False has all served by two launches.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("THREADS", 64),
            ("LONG_RUN", 12),
            ("WIDTH", 3),
            ("BLOCKS_PER_MULTIPROCESSOR", 4),
            ("VECTORS_PER_BLOCK", 4),
        ):
            patch.setattr(channel_tiles, name, value)
        # A thread keeps few vectors, so that some are read again.
        for name, value in (("THREADS", 32), ("RESERVED", 0), ("WIDTHS", (2, 4)), ("ROUND", 4)):
            patch.setattr(channel_teams, name, value)
        if not teams:
            patch.setattr(batch_norm, "teams_for", lambda *arguments: None)
        yield
