"""Memory that is used again: what somebody holds, in whatever form, is never given out twice."""

import gc
import threading

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.backend import is_view
from tinygrad_bn.kernels.cpu import memory

SHAPE = (300, 500)


@pytest.fixture(autouse=True)
def nothing_waiting(monkeypatch):
    monkeypatch.setattr(memory, "_waiting", {})
    monkeypatch.setattr(memory, "_waiting_bytes", 0)


def address(x):
    return x.ctypes.data


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: x[3:, ::2],
        lambda x: x.T,
        lambda x: x.reshape(-1),
        lambda x: x.view(np.uint8),
        lambda x: memoryview(x),
        lambda x: np.asarray(memoryview(x)),
        lambda x: np.from_dlpack(x),
        lambda x: {"deep": [x[0]]},
    ],
    ids=["itself", "a slice", "a transpose", "flat", "bytes", "a memoryview", "of that an array",
         "through DLPack", "in a container"],
)  # fmt: skip
def test_memory_that_is_held_in_any_form_is_not_given_out(hold):
    x = memory.empty(SHAPE, np.float32)
    before = address(x)
    held = hold(x)
    del x
    gc.collect()
    others = [memory.empty(SHAPE, np.float32) for _ in range(3)]
    assert before not in map(address, others)
    del held
    gc.collect()
    assert address(memory.empty(SHAPE, np.float32)) == before


def test_an_array_is_contiguous_writable_and_of_the_shape_and_dtype_asked_for():
    for shape, dtype in (((0, 5), "f4"), ((), "f8"), ((700, 701), "f4"), ((3, 333, 333), "u1")):
        x = memory.empty(shape, dtype)
        assert (x.shape, x.dtype) == (shape, np.dtype(dtype))
        assert x.flags.c_contiguous
        assert x.flags.writeable
        x.fill(7)
        assert (x == 7).all()


def test_another_shape_of_nearly_the_same_size_takes_the_same_memory():
    x = memory.empty((1000, 1000), np.float32)
    before = address(x)
    del x
    assert address(memory.empty((999, 500), np.float64)) == before


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", 3 * 2**20)
    arrays = [memory.empty((2**20,), np.uint8) for _ in range(8)]
    del arrays
    assert memory._waiting_bytes == 3 * 2**20
    assert sum(len(blocks) for blocks in memory._waiting.values()) == 3


def test_threads_never_share_an_array():
    wrong = []

    def work(number):
        for i in range(300):
            x = memory.empty((40_000,), np.float32)
            x.fill(number)
            if i % 3 == 0:
                gc.collect(0)
            if not (x == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("hold_a_view", [False, True])
def test_a_gradient_in_lent_memory_is_taken_over_unless_somebody_else_sees_it(hold_a_view):
    seen = []

    @tg.op
    def same(x):
        return x.copy()

    @same.def_vjp
    def _(g):
        gx = memory.empty(SHAPE, np.float32)
        gx[...] = g
        seen.append(address(gx))
        if hold_a_view:
            seen.append(gx[1:])
        return (gx,)

    x = tg.zeros(SHAPE, requires_grad=True)
    same(x).backward(tg.ones(SHAPE))
    assert (address(x.grad.data) == seen[0]) != hold_a_view
    assert (x.grad.data == 1).all()


def test_a_view_of_lent_memory_is_a_view():
    x = memory.empty(SHAPE, np.float32)
    assert not is_view(x)
    assert is_view(x[1:])
    assert is_view(x.T)
