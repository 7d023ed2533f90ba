"""Kernels run on the CPU here: see `shim.py`. Without g++ their tests are skipped."""

import pytest

from tests.kernels.cuda import shim


@pytest.fixture(
    scope="module",
    params=[(teams, backwards) for teams in (True, False) for backwards in (False, True)],
    ids=["teams-forwards", "teams-backwards", "two-forwards", "two-backwards"],
)
def small(request):
    """Have ops on NumPy arrays served by CUDA kernels that cut small arrays into many tiles: by
    teams or in two launches, the first or the last thread of a block being the first to run."""
    if shim.missing() is not None:
        pytest.skip(shim.missing())
    teams, backwards = request.param
    runtime = shim.ShimRuntime(backwards=backwards)
    with shim.small_tiles(teams), shim.on_cuda_kernels(runtime):
        yield runtime


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def served(request):
    """Have ops on NumPy arrays served by CUDA kernels, the first or the last thread of a block
    being the first to run."""
    if shim.missing() is not None:
        pytest.skip(shim.missing())
    # As much shared memory as every GPU gives a block that does not ask for more.
    device = shim.DEVICE._replace(shared=3 * 49152, shared_per_block=49152)
    with shim.on_cuda_kernels(shim.ShimRuntime(device, request.param)) as runtime:
        yield runtime
