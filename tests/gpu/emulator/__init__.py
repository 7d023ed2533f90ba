"""Real CuPy on a GPU that is emulated on the CPU, so that the tests for a GPU run anywhere.

    make test-emulated-gpu                          # needs g++ and a network for pip; Linux
    make test-emulated-gpu ARGS="-k capture"

All of it takes some 20 minutes on two busy cores. Most of that is g++, whose results are kept.

CuPy comes from its wheel: its ufuncs, reductions, indexing, memory pools, streams, graphs and the
kernels that it writes are its own. What lies below is written anew, for the host's memory:

| file | in place of |
|---|---|
| `memory.cpp`, `streams.cpp` | the CUDA runtime: memory, copies, streams, events, graphs |
| `driver.cpp` | the driver's part: modules, launches, occupancy |
| `nvrtc.cpp`, `prelude.h` | NVRTC: g++ compiles kernels behind CUDA's headers and our shim |
| `cublas.cpp` | the products of cuBLAS, as loops |
| `build.py` | the installation of all that, in a virtual environment of its own |
| `plain/` | CUDA's header where there is none: `tests/backend/test_emulated_runtime.py` |

One module of CuPy has NVIDIA's runtime linked into it (`cupy_backends.cuda.api.runtime`); it is
built again from CuPy's source. The others reach the runtime through it.

What is emulated honestly:

- **Work is done as late as possible**: when somebody waits for it, or for work behind it. Where a
  stream should wait for another one, or the host for a copy, and does not, the numbers are wrong.
- **New memory holds NaN**, from CuPy's pools too, and is followed by a page that nobody may touch.
  Work on memory that has been freed is an error.
- There are **two devices**, without access to each other's memory; a function, a stream or an event
  of one is refused on the other.
- While a stream is **capturing**, what CUDA refuses is refused, and spoils the capture.
- float32 has **no subnormals** in kernels, as CuPy asks of NVRTC (`-ftz=true`); for the processor
  flushes doubles too, not in kernels on doubles.

What it cannot show: speed, races between threads, memory order, what NVRTC refuses, rounding in
CUDA's mathematical functions, and whatever calls NVIDIA's runtime past CuPy's wrapper of it: CUB
and Thrust, so CuPy's sorting and its faster sums (`CUPY_ACCELERATORS` is empty), and curand,
cusolver, cufft.
"""
