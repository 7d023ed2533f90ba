"""Every kernel compiles for the GPUs that it is meant for, with all it has in registers.

No GPU and no driver takes part. What is proven is that the text is CUDA, and what it takes.
"""

import re

import pytest

from tests.kernels.cuda import nvrtc
from tests.kernels.cuda.programs import PROGRAMS, source
from tinygrad_bn.kernels.cuda import launch

needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


def cases():
    """Every program for one architecture; for the other, what its text can make a difference to:
    bfloat16 is integer arithmetic there, and float64 no other code than float32."""
    for file, programs in PROGRAMS.items():
        for defines in programs:
            for architecture in ("sm_80", "sm_90"):
                if architecture == "sm_90" or defines.get("ELEMENT") not in ("BFloat16", "double"):
                    name = "-".join(f"{value}" for value in defines.values())
                    yield pytest.param(
                        file, defines, architecture, id=f"{file}-{name}-{architecture}"
                    )


def test_every_file_is_compiled():
    assert set(PROGRAMS) == {path.name for path in launch.FOLDER.glob("*.cu")}


@needs_nvrtc
@pytest.mark.parametrize(("file", "defines", "architecture"), list(cases()))
def test_kernels_compile_without_spills(file, defines, architecture, record_property):
    text = source(file, defines)
    cubin, usage = nvrtc.compiled(text, architecture)
    assert cubin[:4] == b"\x7fELF"
    assert set(usage) == set(re.findall(r"__global__ void __launch_bounds__\(.*\)\s(\w+)\(", text))
    record_property("registers", {name: u.registers for name, u in usage.items()})
    assert {name: u.spilled for name, u in usage.items() if u.spilled} == {}


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
