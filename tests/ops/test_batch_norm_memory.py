"""What batch norm keeps between forward and backward: x, two vectors a channel, and no more."""

import gc
import tracemalloc

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import threads

#: What the graph itself takes: nodes, their tuples, and a few vectors of 32 channels. x has 2.4 MB.
LITTLE = 16 * 2**10


@pytest.fixture(params=["generic", "numpy", "numba"])
def family(request):
    status = tg.kernel_status()["batch_norm"].get(request.param, "has no kernels")
    if request.param != "generic" and status != "usable":
        pytest.skip(f"{request.param}: {status}")
    with use_kernels(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    # Which thread takes which block is chance, and each keeps scratch memory once it needed some.
    monkeypatch.setattr(threads, "num_threads", lambda: 1)


def kept(forward):
    """Return the bytes that `forward()` leaves allocated, its result's among them, and the result.

    A first call warms up what is allocated once: kernels, threads and their scratch memory.
    """
    forward()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = forward()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before, result


def leaves(axis, dtype):
    shape = (32, 32, 24, 24) if axis == 1 else (32, 24, 24, 32)
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    ones, zeros = np.ones(32, np.float32), np.zeros(32, np.float32)
    return [tg.Tensor(a, requires_grad=True) for a in (x, ones, zeros)]


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_keeps_nothing_of_the_size_of_x_but_its_output(family, axis, dtype, training):
    x, weight, bias = leaves(axis, dtype)
    mean, var = np.zeros(32, np.float32), np.ones(32, np.float32)

    def forward():
        return F.batch_norm(x, mean, var, weight, bias, training=training, axis=axis)

    size, y = kept(forward)
    assert y.requires_grad
    assert size <= y.data.nbytes + LITTLE


@pytest.mark.parametrize("groups", [1, 4])
def test_groups_keep_two_vectors_each(family, groups):
    x, weight, bias = leaves(1, np.float32)
    size, y = kept(lambda: F.batch_norm(x, weight=weight, bias=bias, training=True, groups=groups))
    assert size <= y.data.nbytes + LITTLE


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_mask_is_kept_as_it_is(family, axis, dtype):
    x, weight, bias = leaves(axis, dtype)
    mask = np.ones((32, 1, 24, 24) if axis == 1 else (32, 24, 24, 1), np.float32)
    mask[::2, ::3] = 0

    def forward():
        return F.batch_norm(x, weight=weight, bias=bias, training=True, axis=axis, mask=mask)

    size, y = kept(forward)
    assert size <= y.data.nbytes + LITTLE


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_with_relu_no_mask_above_a_byte_an_element_is_kept(family, with_residual, dtype):
    x, weight, bias = leaves(1, dtype)
    residual = tg.Tensor(x.data[::-1].copy(), requires_grad=True) if with_residual else None

    def forward():
        return F.batch_norm_relu(x, weight=weight, bias=bias, training=True, residual=residual)

    size, y = kept(forward)
    assert size <= y.data.nbytes + x.size + LITTLE
    # It is what the rule needs: the right gradient comes of it.
    y.backward(tg.Tensor(np.ones(x.shape, dtype)))
    positive = (y.data > 0).astype(np.float32)
    np.testing.assert_allclose(bias.grad.numpy(), positive.sum(axis=(0, 2, 3)), rtol=1e-6)


def test_what_is_measured_would_notice_a_second_array():
    x, weight, bias = leaves(1, np.float32)
    size, y = kept(lambda: F.batch_norm_composite(x, weight, bias))
    assert size > 3 * y.data.nbytes  # the tape keeps x̂, the centred x and more
