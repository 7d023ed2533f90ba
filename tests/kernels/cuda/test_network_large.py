"""Arrays of more than 2³² elements: the last block of a network's kernel reaches the last elements.

The memory is only promised, and of a launch nothing but that block runs.
"""

import math
import mmap

import numpy as np
import pytest

from tests.kernels.cuda import shim
from tests.kernels.cuda.test_batch_norm_large import NORESERVE
from tinygrad_bn.kernels.cuda import (
    avg_pool,
    avg_pool_input_grad,
    convolution,
    convolution_input_grad,
    convolution_weight_grad,
    launch,
    max_pool,
    optimizers,
    relu,
    scatter_windows,
)
from tinygrad_bn.windows import convolution_windows

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))


def promised(shape, dtype=float):
    """Return zeros of a shape that no memory need hold: none of it is there yet."""
    shape = (shape,) if isinstance(shape, int) else shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    dtype = np.dtype(dtype)
    memory = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize, flags=flags)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


@pytest.fixture(autouse=True)
def last_block(monkeypatch):
    """Run the last block of each launch alone, on memory that is only promised."""
    runtime = shim.ShimRuntime(shim.DEVICE._replace(shared_per_block=49152))
    runtime.only = lambda blocks: range(blocks - 1, blocks)
    monkeypatch.setattr(np, "empty", promised)
    with launch.use_runtime(runtime):
        yield


#: 4.6 · 10⁹ elements; the last entry, of the last channel of the last image.
SHAPE, LAST = (70001, 4, 128, 128), (-1, -1, -1, -1)
IMAGES = (70001, 1, 256, 256)


def test_pools():
    x = promised(SHAPE, "float16")
    x[-1, -1, -2:, -2:] = [[1, 2], [5, 4]]
    result = max_pool.forward(x, kernel_size=2)
    places, view = result.residuals["places"], result.residuals["view"]
    assert (result.out[LAST], places[LAST]) == (5, 2)
    assert avg_pool.forward(x, kernel_size=2).out[LAST] == 3
    gx = scatter_windows.forward(result.out, places, view=view)
    assert gx[-1, -1, -2:, -2:].tolist() == [[0, 0], [5, 0]]
    gx = avg_pool_input_grad.forward(result.out, view=view)
    assert gx[-1, -1, -1, -2:].tolist() == [1.25, 1.25]


def test_relu():
    x = promised(SHAPE, "float16")
    x[-1, -1, -1, -2:] = [3, -3]
    y = relu.forward(x)
    assert y[-1, -1, -1, -2:].tolist() == [3, 0]
    assert relu.vjp(x, y)[0][-1, -1, -1, -2:].tolist() == [3, 0]


def test_convolution_and_its_gradients():
    x, y = promised(IMAGES, "f"), promised(IMAGES, "f")
    x[LAST], y[LAST] = 3, 5
    weight = np.full((1, 1, 1, 1), 2, "f")
    view = convolution_windows(x.shape, weight.shape)
    assert convolution.forward(x, weight).out[LAST] == 6
    assert convolution_input_grad.forward(y, weight, view=view)[LAST] == 10
    # The sum of all shares, of which only the last has been filled.
    assert convolution_weight_grad.forward(x, y, view=view).item() == 15


def test_a_parameter_of_an_optimizer():
    p, g = promised(2**32 + 70, "f"), promised(2**32 + 70, "f")
    g[-1] = 2
    optimizers.run("sgd", [(p, g)], None, -0.5, 0.0, 0.0, 0, 0)
    assert p[-1] == -1
