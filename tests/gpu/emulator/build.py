"""Build a virtual environment in which CuPy finds GPUs: the emulated ones of this package.

    python -m tests.gpu.emulator.build FOLDER

It is made once, and its libraries again when a file of this folder has changed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

CUPY = "14.2.0"
#: What CuPy's wheel was made with: modules share memory that is laid out by these.
CYTHON, CUDA = "3.2.4", 13020
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SHIM = ROOT / "tests" / "kernels" / "cuda" / "shim.h"
KERNEL_OPTIONS = "-std=c++17 -O1 -ffp-contract=off -fPIC -w -U_FORTIFY_SOURCE"


def run(*command: str | Path, **variables: str) -> str:
    """Run a command and return what it prints; exit with all of it where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Environment:
    """The virtual environment at `folder`, and the emulator in it."""

    def __init__(self, folder: Path):
        self.python = folder / "bin" / "python"
        self.emulator = folder / "emulator"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / "lib" / version / "site-packages"
        self.cuda = self.packages / "nvidia" / "cu13"
        self.source = self.emulator / f"cupy-{CUPY}"

    def install(self) -> None:
        """Install CuPy, CUDA's headers, CuPy's source and what the tests need."""
        venv.create(self.python.parents[1], with_pip=True)
        pip = (self.python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        run(*pip, "install", f"cupy-cuda13x=={CUPY}", f"cython=={CYTHON}", "setuptools>=77",
            "nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*", "--editable",
            f"{ROOT}[test]")  # fmt: skip
        # Without this variable its setup looks for CUDA before it tells its name.
        run(*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary=cupy",
            "--dest", self.emulator, f"cupy=={CUPY}", CUPY_INSTALL_USE_STUB="1")  # fmt: skip
        with tarfile.open(self.emulator / f"cupy-{CUPY}.tar.gz") as archive:
            archive.extractall(self.emulator, filter="data")

    def library(self, name: str, *sources: str, users: Path, options: tuple[str | Path, ...] = ()):
        """Link a library under a name of CUDA's.

        users: what needs it. Functions that this names and our sources lack, fail.
        """
        target, listed = self.cuda / "lib" / name, self.emulator / f"{name}.map"
        listed.write_text(f"{name} {{ global: *; }};\n")  # symbols have versions, as NVIDIA's have
        command = [
            "g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-deprecated-declarations",
            f"-I{self.cuda}/include", f"-Wl,-soname,{name}", f"-Wl,--version-script,{listed}",
            "-Wl,-rpath,$ORIGIN", "-o", target, *(HERE / source for source in sources),
        ]  # fmt: skip
        run(*command, *options)
        wanted = symbols(users, "--undefined-only") - symbols(target, "--defined-only")
        prefix = "cublas" if "cublas" in name else "cuda"
        lacks = sorted(symbol for symbol in wanted if symbol.startswith(prefix))
        missing = self.emulator / f"{name}.missing.cpp"
        missing.write_text("".join(f'extern "C" int {s}() {{ return 801; }}\n' for s in lacks))
        run(*command, missing, *options)

    def runtime(self) -> None:
        """Build CuPy's wrapper of the CUDA runtime, which in the wheel contains NVIDIA's."""
        (found,) = self.packages.glob("cupy_backends/cuda/api/runtime.*.so")
        api = self.source / "cupy_backends" / "cuda" / "api"
        env = f"CUPY_CUDA_VERSION={CUDA},CUPY_HIP_VERSION=0,CUPY_USE_CUDA_PYTHON=False"
        run(self.python, "-m", "cython", "--cplus", "-3", "-X", "binding=False", "-E", env,
            api / "runtime.pyx", "-o", api / "runtime.cpp")  # fmt: skip
        (self.cuda / "include" / "cuda_profiler_api.h").write_text(
            'extern "C" cudaError_t cudaProfilerStart();\n'
            'extern "C" cudaError_t cudaProfilerStop();\n'
        )
        made = self.emulator / "runtime.o"
        run("g++", "-c", "-O1", "-fPIC", "-w", f"-I{sysconfig.get_path('include')}",
            f"-I{self.cuda}/include", '-DCYTHON_EXTERN_C=extern "C"', api / "runtime.cpp",
            "-o", made)  # fmt: skip
        self.library("libcuda.so.1", "memory.cpp", "streams.cpp", "driver.cpp", users=made)
        lib = self.cuda / "lib"
        run("g++", "-shared", made, lib / "libcuda.so.1", f"-Wl,-rpath,{lib}", "-o", found)

    def prelude(self) -> None:
        """Precompile what stands in front of every kernel."""
        headers = self.packages / "cupy" / "_core" / "include"
        (self.emulator / "prelude.h").write_text("#error prelude.h was not precompiled\n")
        parts = ["", "cupy/_cccl/cub", "cupy/_cccl/thrust", "cupy/_cccl/libcudacxx"]
        run("g++", *KERNEL_OPTIONS.split(), *(f"-I{headers / part}" for part in parts),
            f"-I{self.cuda}/include", "-x", "c++-header", HERE / "prelude.h",
            "-o", self.emulator / "prelude.h.gch")  # fmt: skip
        (self.emulator / "prelude.key").write_text(key(HERE / "prelude.h", SHIM))
        (self.emulator / "kernels").mkdir(exist_ok=True)

    def build(self) -> None:
        """Bring everything up to date."""
        if not self.source.exists():
            self.install()
        stamp, now = self.emulator / "key", key(*sorted(HERE.glob("*.*")), SHIM)
        if stamp.exists() and stamp.read_text() == now:
            return
        self.runtime()
        (cublas,) = self.packages.glob("cupy_backends/cuda/libs/cublas.*.so")
        cuda = self.cuda / "lib" / "libcuda.so.1"
        self.library("libcublas.so.13", "cublas.cpp", users=cublas, options=(cuda,))
        self.library("libcublasLt.so.13", users=cublas)  # asked for and not used
        self.library("libnvrtc.so.13", "nvrtc.cpp", users=cublas,
                     options=(f'-DEMULATOR="{self.emulator}"',
                              f'-DEMULATOR_OPTIONS="{KERNEL_OPTIONS}"'))  # fmt: skip
        self.prelude()
        stamp.write_text(now)


def key(*files: Path) -> str:
    """Return what changes with these files and the compiler."""
    text = b"".join(path.read_bytes() for path in files) + run("g++", "--version").encode()
    return hashlib.sha256(text).hexdigest()


def symbols(library: Path, which: str) -> set[str]:
    """Return the names of symbols of a library or an object file, without their versions."""
    dynamic = ["-D"] if library.suffix != ".o" else []
    lines = run("nm", *dynamic, which, library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


if __name__ == "__main__":
    Environment(Path(sys.argv[1]).resolve()).build()
