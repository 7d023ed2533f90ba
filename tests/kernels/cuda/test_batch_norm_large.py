"""Tensors of more than 2³² elements: the last block reaches the last elements, and no others.

The memory is only promised, and of a launch nothing but that block runs.
"""

import math
import mmap

import numpy as np
import pytest

from tests.kernels.cuda import shim
from tinygrad_bn.kernels.cuda import channel_tiles, launch
from tinygrad_bn.kernels.cuda.batch_norm import AFFINE, GRADIENT
from tinygrad_bn.kernels.cuda.channel_tiles import tiles_for, view_of

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))

NORESERVE = 0x4000  # MAP_NORESERVE, which Python 3.11 does not name


def promised(shape):
    """Return float16 zeros of a shape that no memory need hold: none of it is there yet."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 2 * math.prod(shape), flags=flags)
    return np.frombuffer(memory, np.float16).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((2, 70001, 65536), np.s_[-1, -1, -8192:]),  # runs of a channel 4.6 · 10⁹ elements apart
        ((70001, 3, 65536), np.s_[-1, -1, -8192:]),  # 70001 runs of a channel
        ((2**21, 4104), np.s_[-512:, -8:]),  # rows of columns
    ],
    ids=["far", "many", "columns"],
)
def test_the_last_block_reaches_the_last_elements(shape, last, monkeypatch):
    for name, value in (("BLOCKS_PER_MULTIPROCESSOR", 2**30), ("THREADS", 64), ("WIDTH", 2)):
        monkeypatch.setattr(channel_tiles, name, value)  # as many blocks as there is work for
    x, g, y, gx = (promised(shape) for _ in range(4))
    rng = np.random.default_rng(0)
    x[last], g[last] = rng.integers(1, 9, (2, *x[last].shape))
    wide_x, wide_g = (a[last].astype(np.float64).reshape(512, -1) for a in (x, g))
    per_channel = (lambda a: a.sum(axis=0)) if len(shape) == 2 else np.sum
    mean, var = np.full(shape[1], 2.0), np.full(shape[1], 4.0)
    statistics = (mean, 3, var, 3, None, 0, None, 0)
    runtime = shim.ShimRuntime()
    with launch.use_runtime(runtime):
        tiles = tiles_for(view_of(x, (1,), 1), (x, g, y, gx))
        runtime.only = lambda blocks: range(blocks - 1, blocks)
        partials = tiles.partials(np.empty(1), 2)
        mine = partials.reshape(-1, tiles.tile, 2)[-1]
        # The shift, the channel's first value, is 0 here.
        tiles.launch_sums("forward_sums", 2, x, None, None, None, partials)
        np.testing.assert_array_equal(mine[:, 0], per_channel(wide_x))
        np.testing.assert_array_equal(mine[:, 1], per_channel(wide_x**2))
        tiles.launch_sums("backward_sums", 2, g, x, None, partials, *statistics, None, 0.0)
        np.testing.assert_array_equal(mine[:, 0], per_channel(wide_g))
        np.testing.assert_array_equal(mine[:, 1], per_channel(wide_g * (wide_x - 2)))
        runtime.only = lambda blocks: range(1)  # these take the tiles in reversed order
        tail = (None, None, None, 0.0)
        tiles.launch_apply("forward_apply", 2, AFFINE, x, None, y, None, *statistics, *tail)
        np.testing.assert_array_equal(y[last].reshape(512, -1), (wide_x - 2) / 2)
        inputs = (g, x, None, gx, None)
        tail = (None, 0, None, 0, None, None, 1, None, None, 0.0)
        tiles.launch_apply("backward_apply", 2, GRADIENT, *inputs, *statistics, *tail)
        np.testing.assert_array_equal(gx[last].reshape(512, -1), wide_g / 2)
