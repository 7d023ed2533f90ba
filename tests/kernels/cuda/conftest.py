"""Kernels run on the CPU here: see `shim.py`. Without g++ their tests are skipped."""

import pytest

from tests.kernels.cuda import shim


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def small(request):
    """Have ops on NumPy arrays served by CUDA kernels that cut small arrays into many tiles, with
    the first or the last thread of a block being the first to run."""
    if shim.missing() is not None:
        pytest.skip(shim.missing())
    with shim.small_tiles(), shim.on_cuda_kernels(shim.ShimRuntime(backwards=request.param)) as on:
        yield on
