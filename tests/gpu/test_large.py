"""Batch norm beyond 2³¹ and 2³² entries: no index or count is cut to 32 bits."""

import pytest

from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.tensor import Tensor

CHANNELS, LENGTH = 3, 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("bits", [31, 32])
def test_every_entry_is_normalized(cupy, bits, layout):
    # Entries alternate between ±1 around a mean of their channel's own, so y is ±1 everywhere, and
    # a cotangent that alternates with another period keeps its values but for its mean, 0.
    samples = (1 << bits) // (CHANNELS * LENGTH) + 2
    size = samples * CHANNELS * LENGTH
    assert size > 1 << bits
    cupy.get_default_memory_pool().free_all_blocks()
    free = cupy.cuda.runtime.memGetInfo()[0]
    needed = 4 * 2 * size + 2 * GIB
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of GPU memory, {free / GIB:.0f} are free")
    shape = (samples, CHANNELS, LENGTH) if layout == "NCL" else (samples, LENGTH, CHANNELS)
    along = (1, CHANNELS, 1) if layout == "NCL" else (1, 1, CHANNELS)
    places = (1, 1, LENGTH) if layout == "NCL" else (1, LENGTH, 1)
    means = cupy.arange(CHANNELS, dtype="float16").reshape(along)
    signs = (1 - 2 * (cupy.arange(LENGTH) % 2)).astype("float16").reshape(places)
    slow = (1 - 2 * (cupy.arange(LENGTH) // 2 % 2)).astype("float16").reshape(places)
    data, cotangent = (cupy.empty(shape, "float16") for _ in range(2))
    data[...] = means + signs
    cotangent[...] = slow
    x = Tensor(data, requires_grad=True)
    with use_kernels("cuda"):  # the generic form would need 8 bytes an entry, several times
        y = F.batch_norm(x, None, None, None, None, True, eps=0.0, axis=1 if layout == "NCL" else 2)
        y.backward(cotangent)
    for i in range(samples):
        assert bool((y.data[i : i + 1] == signs).all()), f"sample {i} of y"
        # Σ g = Σ g x̂ = 0 and s = 1, so gx = g.
        assert bool((x.grad.data[i : i + 1] == slow).all()), f"sample {i} of gx"
