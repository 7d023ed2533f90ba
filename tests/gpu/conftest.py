"""The tests of this folder run on a GPU, or, to try out the tests themselves, on the stand-in.

    pytest --require-gpu -m gpu                              on a machine with a GPU
    TINYGRAD_BN_STAND_IN=1 pytest --require-gpu tests/gpu    anywhere that has g++
    make test-emulated-gpu                                   on real CuPy, whose GPU is emulated

All are marked `gpu`. Those that need a second GPU, or what only CUDA has, say so when they are
skipped.
"""

import os
from contextlib import ExitStack

import pytest

import tinygrad_bn as tg
from tinygrad_bn.backend import cuda, kernels
from tinygrad_bn.testing.backends import RunsOn

STACK = ExitStack()
STAND_IN = os.environ.get("TINYGRAD_BN_STAND_IN") == "1"
EMULATED = os.environ.get("TINYGRAD_BN_EMULATED_GPU") == "1"

if STAND_IN:
    from tests.kernels.cuda.strict_runtime import strict_kernels

    STACK.enter_context(strict_kernels())


def pytest_unconfigure():
    STACK.close()


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


def pytest_generate_tests(metafunc):
    """Run what takes `on_gpu` with the generic forms and with the fused kernels."""
    if "on_gpu" in metafunc.fixturenames:
        metafunc.parametrize("on_gpu", ["generic", "cuda"], indirect=True)


@pytest.fixture
def on_gpu(request):
    """Return the GPU as the kit's `RunsOn`, with its kernel family in force."""
    on = RunsOn("cuda", request.param)
    # Kernels are asked first and may decline: then the generic form serves, as for users.
    with tg.default_device("cuda"), kernels.use_kernels(request.param):
        yield on


@pytest.fixture
def second_gpu():
    """Return the name of the second GPU; skip where there is none."""
    if cuda.devices().count() < 2:
        pytest.skip("needs a second GPU")
    return "cuda:1"


@pytest.fixture
def cupy():
    """Return CuPy; skip on the stand-in."""
    if STAND_IN:
        pytest.skip("needs CUDA itself, not the stand-in")
    return cuda._registered().xp


@pytest.fixture(autouse=EMULATED)
def nan_in_new_memory():
    """Have what CuPy allocates hold NaN: in order with the work on the memory before and behind."""
    cupy = cuda._registered().xp

    class Fill(cupy.cuda.MemoryHook):
        name = "NaN in new memory"

        def malloc_postprocess(self, *, mem_ptr, mem_size, **others):
            if mem_ptr:
                stream = cupy.cuda.get_current_stream().ptr
                cupy.cuda.runtime.memsetAsync(mem_ptr, 0xFF, mem_size, stream)

    with Fill():
        yield


@pytest.fixture
def emulated():
    """Return whether the GPU is emulated: it is slow, then, and timings mean nothing."""
    return EMULATED
