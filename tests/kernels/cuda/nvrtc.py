"""CUDA's own compiler without a GPU: NVRTC from the wheel `nvidia-cuda-nvrtc`, through ctypes.

CuPy compiles with NVRTC too. Of the cubin that comes out, ptxas tells the registers and the spills.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache, lru_cache
from importlib import metadata
from typing import NamedTuple

PACKAGE = "nvidia-cuda-nvrtc"
_ABOUT = re.compile(
    r"entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What a kernel takes: registers of a thread, and bytes that do not fit into them."""

    registers: int
    spilled: int


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Return why there is no compiler, or None if there is one."""
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed: pip install 'tinygrad_bn[nvrtc]' (on Linux)"
    return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    files = metadata.files(PACKAGE) or []
    found = [f for f in files if re.fullmatch(r"libnvrtc\.so\.\d+|nvrtc64_\w+\.dll", f.name)]
    return ctypes.CDLL(str(found[0].locate()))


@cache
def compiled(text: str, architecture: str) -> tuple[bytes, dict[str, Usage]]:
    """Return the cubin that NVRTC makes of `text` for "sm_90", and what its kernels use.

    Raises AssertionError with the compiler's words if it refuses.
    """
    nvrtc = _library()
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), None, 0, None, None))
    try:
        options = [b"-std=c++17", f"-arch={architecture}".encode(), b"--ptxas-options=-v"]
        array = (ctypes.c_char_p * len(options))(*options)
        refused = nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
        assert not refused, f"NVRTC refuses it for {architecture}:\n{log[:4000]}"
        cubin = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    usage = {
        name: Usage(int(registers), int(stores) + int(loads))
        for name, _, stores, loads, registers in _ABOUT.findall(log)
    }
    return cubin, usage


def _read(size_of, read, program) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    assert result == 0, f"NVRTC failed with result {result}"
