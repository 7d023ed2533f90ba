"""Every kernel compiles for the GPUs that it is meant for, with all it has in registers.

No GPU and no driver takes part. What is proven is that the text is CUDA, and what it takes.
"""

import re

import pytest

from tests.kernels.cuda import nvrtc
from tests.kernels.cuda.programs import PROGRAMS, source
from tinygrad_bn.kernels.cuda import channel_teams, launch

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


def cases():
    """Every program for one architecture; those of batch norm, of which none may spill, and those
    whose numbers are float32 or float16, for the other too. (The rest is the same code there.)"""
    for file, programs in PROGRAMS.items():
        for defines in programs:
            rest = defines.get("ELEMENT") in ("BFloat16", "double") and "batch_norm" not in file
            for architecture in ("sm_80",) if rest else ("sm_80", "sm_90"):
                name = "-".join(f"{value}" for value in defines.values())
                yield pytest.param(file, defines, architecture, id=f"{file}-{name}-{architecture}")


def test_every_file_is_compiled():
    assert set(PROGRAMS) == {path.name for path in launch.FOLDER.glob("*.cu")}


def test_the_only_atomic_operation_counts_arrivals_at_a_barrier():
    """Sums have one order each: nothing is added to memory by whoever comes first."""
    texts = {path.name: path.read_text() for path in launch.FOLDER.glob("*.cu*")}
    found = [
        (name, line.strip())
        for name, text in texts.items()
        for line in text.splitlines()
        if re.search(r"\batomic\w*\(|\bred\.|\batom\.|__reduce", line)
    ]
    line = "unsigned before = atomicAdd(arrived, step);"
    assert found == [("batch_norm_teams.cu", line)]


@needs_nvrtc
@pytest.mark.parametrize(("file", "defines", "architecture"), list(cases()))
def test_kernels_compile_without_spills(file, defines, architecture, record_property):
    text = source(file, defines)
    cubin, usage = nvrtc.compiled(text, architecture)
    assert cubin[:4] == b"\x7fELF"
    assert set(usage) == set(re.findall(r"__global__ void __launch_bounds__\(.*\)\s(\w+)\(", text))
    record_property("registers", {name: u.registers for name, u in usage.items()})
    assert {name: u.spilled for name, u in usage.items() if u.spilled} == {}


def resident_blocks(registers, threads):
    """Return how many blocks find room among the 65,536 registers of a multiprocessor, of which a
    thread gets a multiple of eight."""
    return 65536 // (-(-registers // 8) * 8 * threads)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_multiprocessor_has_registers_for_the_blocks_that_teams_count_on(architecture):
    for defines in PROGRAMS["batch_norm_teams.cu"]:
        _, usage = nvrtc.compiled(source("batch_norm_teams.cu", defines), architecture)
        found = {
            name: resident_blocks(u.registers, channel_teams.THREADS) for name, u in usage.items()
        }
        tight = defines["ELEMENT"] == "BFloat16" and defines["VECTOR"] == 8 and not defines["RELU"]
        assert found["forward_teams"] >= channel_teams.RESIDENT
        assert found["backward_teams"] >= channel_teams.RESIDENT - tight, defines


@needs_nvrtc
def test_a_spill_is_seen():
    text = """extern "C" __global__ void __launch_bounds__(1024, 2) spills(double* x) {
        double many[64];
        for (int i = 0; i < 64; ++i) many[i] = x[threadIdx.x + 1024 * i];
        __syncthreads();
        for (int k = 0; k < 9; ++k)
          for (int i = 0; i < 64; ++i) many[i] = fma(many[i], many[(i + 7) % 64], x[k]);
        for (int i = 0; i < 64; ++i) x[threadIdx.x + 1024 * i] = many[i];
    }"""
    _, usage = nvrtc.compiled(text, "sm_90")
    assert usage["spills"].spilled > 0


@needs_nvrtc
def test_what_is_no_cuda_is_refused():
    with pytest.raises(AssertionError, match="NVRTC refuses it for sm_90"):
        nvrtc.compiled('extern "C" __global__ void broken( {}', "sm_90")
