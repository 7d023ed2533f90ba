"""Launching, and the shim that runs kernels on the CPU: does it do what CUDA would?"""

import shutil

import numpy as np
import pytest

from tests.kernels.cuda import shim
from tinygrad_bn.kernels.cuda import launch

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))

COMMON = '#include "common.cuh"\n'


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def run(request, monkeypatch, tmp_path):
    """Return a function that compiles a text with one kernel, `k`, and launches it."""
    shutil.copy(launch.FOLDER / "common.cuh", tmp_path)
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    runtime = shim.ShimRuntime(backwards=request.param)

    def call(text, blocks, threads, *arguments, shared=0, cooperative=False):
        (tmp_path / "k.cu").write_text(COMMON + text, encoding="utf-8")
        program = launch.Program(runtime, launch.source("k.cu"), runtime.device)
        program.launch("k", blocks, threads, shared, *arguments, cooperative=cooperative)

    return call


def kernel(parameters, body):
    return f'extern "C" __global__ void k({parameters}) {{ {body} }}'


def test_arguments_arrive_whole(run):
    out = np.zeros(4)
    text = kernel(
        "double* out, long long big, double small, const void* none",
        "out[0] = big >> 32; out[1] = (int)big; out[2] = small; out[3] = none == nullptr;",
    )
    run(text, 1, 1, out, 5 * 2**32 + 7, 1e-300, None)
    assert out.tolist() == [5, 7, 1e-300, 1]


def test_every_thread_of_every_block_runs_once(run):
    out = np.zeros(7 * 40)
    run(kernel("double* out", "out[blockIdx.x * blockDim.x + threadIdx.x] += 1;"), 7, 40, out)
    assert (out == 1).all()


REVERSE = """
    double* shared = (double*)dynamic_shared();
    shared[threadIdx.x] = in[threadIdx.x];
    %s
    out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
"""


def test_shared_memory_is_exchanged_across_a_barrier_and_a_missing_barrier_shows(run):
    values, out = np.arange(96.0), np.zeros(96)
    text = kernel("const double* in, double* out", REVERSE % "__syncthreads();")
    run(text, 1, 96, values, out, shared=96 * 8)
    np.testing.assert_array_equal(out, values[::-1])
    text = kernel("const double* in, double* out", REVERSE % "")
    run(text, 1, 96, values, out, shared=96 * 8)
    assert np.isnan(out).sum() == 48  # half of what was read had not been written


def test_a_barrier_that_not_all_threads_reach_is_an_error(run):
    with pytest.raises(shim.DeadlockError, match="wait for ever"):
        run(kernel("double* out", "if (threadIdx.x < 40) __syncthreads();"), 1, 64, np.zeros(1))
    out = np.zeros(1)
    run(kernel("double* out", "__syncthreads(); out[0] = 1;"), 1, 64, out)  # it recovers
    assert out[0] == 1


def test_shuffles_stay_within_the_warp(run):
    out = np.zeros((3, 70), np.float64)
    text = kernel(
        "double* out",
        """int t = threadIdx.x; double v = t;
        out[t] = __shfl_down_sync(~0u, v, 5);
        out[70 + t] = __shfl_xor_sync(~0u, (float)v, 1);
        out[140 + t] = __shfl_sync(~0u, t, 2);""",
    )
    run(text, 1, 70, out)
    t = np.arange(70)
    last = np.minimum(t // 32 * 32 + 31, 69)
    np.testing.assert_array_equal(out[0], np.where(t + 5 > last, t, t + 5))
    np.testing.assert_array_equal(out[1], t ^ 1)
    np.testing.assert_array_equal(out[2], t // 32 * 32 + 2)


WAIT = """
    if (threadIdx.x == 0) {
      atomicAdd((unsigned*)arrived, 1u);
      while (*(volatile unsigned*)arrived < gridDim.x) __nanosleep(20);
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = *(unsigned*)arrived;
"""


def test_blocks_wait_for_each_other_only_in_a_cooperative_launch(run):
    text = kernel("unsigned* arrived, double* out", WAIT)
    out, arrived = np.zeros(6 * 32), np.zeros(1, np.uint32)
    run(text, 6, 32, arrived, out, cooperative=True)
    assert (out == 6).all()
    with pytest.raises(shim.DeadlockError, match="wait for ever"):
        run(text, 6, 32, np.zeros(1, np.uint32), out)


@pytest.mark.parametrize(("width", "lanes"), [(1, 64), (1, 32), (5, 12), (7, 9), (64, 1), (32, 2)])
def test_sums_over_lanes(run, width, lanes):
    rng = np.random.default_rng(0)
    values, out = rng.standard_normal((64, 2)), np.zeros((width, 2))
    text = kernel(
        "const double* in, double* out, long long width, long long lanes",
        """int t = threadIdx.x, x = t % width, y = t / width;
        double v[2] = {in[2 * t], in[2 * t + 1]};
        double* scratch = (double*)dynamic_shared();
        sum_lanes<2>(v, scratch, x, y, width, lanes);
        if (t == 63) for (int k = 0; k < 2 * width; ++k) out[k] = scratch[k];""",
    )
    run(text, 1, 64, values, out, width, lanes, shared=64 * 16)
    want = values[: width * lanes].reshape(lanes, width, 2).sum(axis=0)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "element"), [("float16", "Half"), ("bfloat16", "BFloat16")])
def test_half_precision_is_read_and_rounded_as_numpy_does(run, name, element):
    dtype = (
        np.dtype(name) if name == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    )
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    wide = np.zeros(2**16, np.float32)
    body = "for (int k = 0; k < 65536; ++k) wide[k] = real(narrow[k]);"
    run(kernel(f"const {element}* narrow, float* wide", body), 1, 1, every, wide)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide, every.astype(np.float32))
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2**16, np.uint32)
    bits[:4096] &= 0xFFFF8000  # ties among them
    values = bits.view(np.float32)
    narrow = np.zeros(2**16, dtype)
    body = "for (int k = 0; k < 65536; ++k) round_to(narrow[k], wide[k]);"
    run(kernel(f"{element}* narrow, const float* wide", body), 1, 1, narrow, values)
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(dtype)
        np.testing.assert_array_equal(narrow.astype(np.float32), want.astype(np.float32))


def test_an_array_with_gaps_is_refused(run):
    with pytest.raises(ValueError, match=r"launch k: an array of shape \(2,\) is not C-contiguous"):
        run(kernel("double* out", ""), 1, 1, np.zeros(4)[::2])


def test_a_program_is_compiled_once_and_again_for_another_runtime():
    defines = {"ELEMENT": "float", "VECTOR": 1, "COLUMNS": 0, "RELU": 0, "THREADS": 64}
    with launch.use_runtime(shim.ShimRuntime()):
        first = launch.program("batch_norm.cu", **defines)
        assert launch.program("batch_norm.cu", **defines) is first
    with launch.use_runtime(shim.ShimRuntime()):
        assert launch.program("batch_norm.cu", **defines) is not first


def test_alignment_is_that_of_the_worst_array():
    bytes_ = np.zeros(64, np.uint8)
    start = -bytes_.ctypes.data % 16
    with launch.use_runtime(shim.ShimRuntime()):
        assert launch.alignment(bytes_[start:], bytes_[start + 16 :]) == 16
        assert launch.alignment(bytes_[start:], bytes_[start + 12 :]) == 4
        assert launch.alignment(bytes_[start + 1 :]) == 1
