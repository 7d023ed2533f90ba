"""Compiling the kernels of this folder and launching them: the only file here that knows CuPy.

    program = launch.program("batch_norm.cu", ELEMENT="float", VECTOR=4)
    program.launch("forward_sums", blocks, threads, shared_bytes, x, partials, 7, 1e-5)

What holds for every kernel:

- It is `extern "C"`, and its parameters are pointers, `long long` and `double`: arrays, Python
  integers (and None, the null pointer) and Python floats. There is no narrower scalar that a
  Python number could be mistaken for, and a size is never cut to 32 bits on its way.
- Arrays are C-contiguous; a wrapper passes the transposed view that is. `launch` checks it, for
  a raw kernel ignores strides.
- It runs on CuPy's current stream, on the device of its arrays (`on_device_of`).
- What varies at compile time comes in as `#define` lines in front of the text, so that the text
  alone says what is compiled; `#include "common.cuh"` is pasted in for the same reason: CuPy's
  cache on disk would not notice a changed header.

A `Runtime` is what compiles and launches: CuPy, unless the tests put another in its place
(`use_runtime`), which runs the same text on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinygrad_bn.kernels.cuda.blas import Blas, Cublas

FOLDER = Path(__file__).parent

#: What the kernels call the dtypes they serve.
ELEMENTS = {"float32": "float", "float16": "Half", "bfloat16": "BFloat16", "float64": "double"}

#: How a kernel is told the dtype of a vector of parameters: `parameter` in common.cuh.
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "float64": 3}


class Device(NamedTuple):
    """What grid sizes depend on.

    multiprocessors: how many there are.
    threads: how many threads one of them holds.
    shared: how many bytes of shared memory one of them has.
    shared_per_block: how many of those one block may ask for.
    cooperative: whether blocks may be launched so that all are resident at once.
    """

    multiprocessors: int
    threads: int
    shared: int
    shared_per_block: int
    cooperative: bool


class Runtime(Protocol):
    """What compiles and launches kernels."""

    def current_device(self) -> int:
        """Return the index of the current device."""
        ...

    def current_stream(self) -> int:
        """Return a number for the stream that kernels run on."""
        ...

    def properties(self, index: int) -> Device:
        """Return what device `index` is like."""
        ...

    def on_device_of(self, array: Any) -> AbstractContextManager[Any]:
        """Return a context in which the device of `array` is current."""
        ...

    def address(self, array: Any) -> int:
        """Return where an array begins."""
        ...

    def compile(self, text: str) -> Any:
        """Return a module for the current device."""
        ...

    def function(self, module: Any, name: str) -> Any:
        """Return a kernel of the module, allowed all the shared memory there is."""
        ...

    def resident_blocks(self, function: Any, threads: int, shared: int) -> int:
        """Return how many blocks of this kernel one multiprocessor holds at once."""
        ...

    @property
    def blas(self) -> Blas | None:
        """What multiplies matrices, or None where nothing does."""
        ...

    def launch(
        self,
        function: Any,
        blocks: int,
        threads: int,
        shared: int,
        arguments: tuple[Any, ...],
        cooperative: bool,
    ) -> None:
        """Start a kernel on the current stream."""
        ...


class CupyRuntime:
    """CuPy: NVRTC, its cache on disk, its current device and stream."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self.current_device = cupy.cuda.runtime.getDevice
        self._devices: dict[int, Device] = {}
        self._int, self._float = cupy.int64, cupy.float64

    def current_stream(self) -> int:
        """Return a number for the stream that kernels run on."""
        return self._cupy.cuda.get_current_stream().ptr

    def properties(self, index: int) -> Device:
        """Return what device `index` is like."""
        if index not in self._devices:
            found = self._cupy.cuda.Device(index).attributes
            self._devices[index] = Device(
                found["MultiProcessorCount"],
                found["MaxThreadsPerMultiProcessor"],
                found["MaxSharedMemoryPerMultiprocessor"],
                found["MaxSharedMemoryPerBlockOptin"],
                bool(found["CooperativeLaunch"]),
            )
        return self._devices[index]

    def on_device_of(self, array: Any) -> AbstractContextManager[Any]:
        """Return a context in which the device of `array` is current."""
        index = array.device.id
        return nullcontext() if index == self.current_device() else self._cupy.cuda.Device(index)

    def address(self, array: Any) -> int:
        """Return where an array begins."""
        return array.data.ptr

    @cached_property
    def blas(self) -> Blas:
        """cuBLAS."""
        return Cublas(self._cupy)

    def compile(self, text: str) -> Any:
        """Return a module for the current device."""
        return self._cupy.RawModule(code=text, options=("-std=c++17",))

    def function(self, module: Any, name: str) -> Any:
        """Return a kernel of the module, allowed all the shared memory there is."""
        raw = module.get_function(name)
        most = self.properties(self.current_device()).shared_per_block
        raw.max_dynamic_shared_size_bytes = most - raw.shared_size_bytes
        return raw.kernel

    def resident_blocks(self, function: Any, threads: int, shared: int) -> int:
        """Return how many blocks of this kernel one multiprocessor holds at once."""
        from cupy_backends.cuda.api import driver

        return driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, threads, shared)

    def launch(
        self,
        function: Any,
        blocks: int,
        threads: int,
        shared: int,
        arguments: tuple[Any, ...],
        cooperative: bool,
    ) -> None:
        """Start a kernel on the current stream."""
        given = tuple(
            [
                self._int(a) if type(a) is int else self._float(a) if type(a) is float else a
                for a in arguments
            ]
        )
        function((blocks,), (threads,), given, shared, None, cooperative)


class Program:
    """The kernels of one file, compiled with one set of definitions for one device."""

    def __init__(self, runtime: Runtime, text: str, device: Device):
        self._runtime = runtime
        self._module = runtime.compile(text)
        self._functions: dict[str, Any] = {}
        self._resident: dict[tuple[str, int, int], int] = {}
        self.device = device

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = self._runtime.function(self._module, name)
        return self._functions[name]

    def resident_blocks(self, name: str, threads: int, shared: int) -> int:
        """Return how many blocks of a kernel the whole device holds at once."""
        key = (name, threads, shared)
        if key not in self._resident:
            each = self._runtime.resident_blocks(self._function(name), threads, shared)
            self._resident[key] = each * self.device.multiprocessors
        return self._resident[key]

    def launch(
        self,
        name: str,
        blocks: int,
        threads: int,
        shared: int,
        *arguments: Any,
        cooperative: bool = False,
    ) -> None:
        """Start `blocks` blocks of `threads` threads of kernel `name`.

        shared: bytes of dynamic shared memory a block.
        arguments: arrays, integers, floats and None, in the order of the kernel's parameters.
        cooperative: all blocks are resident at once, so that they may wait for each other; there
            may be `resident_blocks` of them.

        Raises ValueError for an array that is not C-contiguous.
        """
        given = []
        for argument in arguments:
            if argument is None:
                argument = 0  # CuPy would pass no argument at all
            elif type(argument) not in (int, float) and not argument.flags.c_contiguous:
                raise ValueError(
                    f"launch {name}: an array of shape {tuple(argument.shape)} is not "
                    f"C-contiguous; a kernel ignores strides, so pass the view of it that is"
                )
            given.append(argument)
        function = self._function(name)
        self._runtime.launch(function, blocks, threads, shared, tuple(given), cooperative)


# --- which runtime, which program ----------------------------------------------------------------

_runtime: ContextVar[Runtime | None] = ContextVar("tinygrad_bn_cuda_runtime", default=None)
_cupy_runtime = cache(CupyRuntime)


@contextmanager
def use_runtime(runtime: Runtime) -> Iterator[Any]:
    """Compile and launch by `runtime`, which is given back, inside the `with` block."""
    before = _runtime.get()
    _runtime.set(runtime)
    try:
        yield runtime
    finally:
        _runtime.set(before)


def runtime() -> Runtime:
    """Return what compiles and launches kernels here."""
    return _runtime.get() or _cupy_runtime()


def on_device_of(array: Any) -> AbstractContextManager[Any]:
    """Return a context in which the device of `array` is current, for its scratch and launches."""
    return runtime().on_device_of(array)


def program(file: str, **defines: str | int) -> Program:
    """Return the kernels of `file`, compiled for the current device; compiled once.

    defines: what the text leaves open, by the name of a macro.
    """
    now = runtime()
    return _program(now, now.current_device(), file, tuple(defines.items()))


@cache
def _program(
    runtime: Runtime, index: int, file: str, defines: tuple[tuple[str, str | int], ...]
) -> Program:
    return Program(runtime, source(file, **dict(defines)), runtime.properties(index))


def source(file: str, **defines: str | int) -> str:
    """Return the text of a `.cu` file of this folder as it is compiled.

    >>> source("batch_norm.cu", ELEMENT="float").splitlines()[0]
    '#define ELEMENT float'
    """
    text = (FOLDER / file).read_text(encoding="utf-8")
    text = re.sub(
        r'^#include "([\w.]+)"$',
        lambda found: (FOLDER / found[1]).read_text(encoding="utf-8"),
        text,
        flags=re.MULTILINE,
    )
    return "".join(f"#define {name} {value}\n" for name, value in defines.items()) + text


def alignment(*arrays: Any) -> int:
    """Return the largest power of two, up to 16 bytes, that every array's address divides by."""
    address = runtime().address
    together = 16
    for array in arrays:
        together |= address(array)
    return together & -together
