"""Memory that is used again: what somebody holds, in whatever form, is never given out twice."""

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import nn
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
        lambda x: x.__dlpack__(),
        lambda x: np.frombuffer(x, np.uint8),
        lambda x: np.ndarray((5,), buffer=x),
        lambda x: np.lib.stride_tricks.sliding_window_view(x, 3, axis=0),
        lambda x: np.broadcast_to(x, (2, *x.shape)),
        lambda x: x.view(np.ma.MaskedArray),
        lambda x: x.flat,
        lambda x: np.nditer(x),
        lambda x: x.ctypes.data_as(ctypes.c_void_p),
        lambda x: np.ctypeslib.as_ctypes(x),
        lambda x: (ctypes.c_char * 8).from_buffer(x),
        lambda x: pickle.PickleBuffer(x),
        lambda x: (row for row in x),
        lambda x: tg.Tensor(x),
        lambda x: tg.Tensor(x)[1:].numpy(),
        lambda x: tg.Tensor(x).detach().reshape(-1),
        lambda x: {"deep": [x[0]]},
    ],
    ids=["itself", "a slice", "a transpose", "flat", "bytes", "a memoryview", "of that an array",
         "through DLPack", "a DLPack capsule", "frombuffer", "its buffer", "windows", "broadcast",
         "a subclass", "an iterator", "an nditer", "a pointer", "a C array", "a part as C",
         "out of a pickle", "a generator", "a Tensor", "a Tensor's slice", "a Tensor's view",
         "in a container"],
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


def test_sizes_may_be_any_integers():
    x = memory.empty((np.int64(300), np.uint8(250), True), np.float32)
    assert x.shape == (300, 250, 1)
    assert not is_view(x)
    assert memory.empty(np.array([2, 3]), "f8").shape == (2, 3)


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
    memory.empty((4 * 2**20,), np.uint8)  # more than may wait at all
    assert memory._waiting_bytes == 3 * 2**20


def test_sizes_that_are_no_longer_wanted_make_room_for_others(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", 8 * 2**20)
    rng = np.random.default_rng(0)
    most = 0
    for _ in range(2000):  # as batches of every size, and images of every size, would ask for it
        held = [memory.empty((int(size),), np.uint8) for size in rng.integers(2**17, 2**21, 5)]
        del held
        most = max(most, memory._waiting_bytes)
        waiting = [block.size for blocks in memory._waiting.values() for block in blocks]
        assert memory._waiting_bytes == sum(waiting) <= 8 * 2**20
    assert most > 6 * 2**20
    memory.empty((3 * 2**20,), np.uint8)
    assert 3 * 2**20 in memory._waiting  # and not what came before


def test_the_size_unused_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", 4 * 2**20)
    first, other, new = 2**20, 5 * 2**18, 3 * 2**19
    two = [memory.empty((first,), np.uint8) for _ in range(2)]
    del two
    memory.empty((other,), np.uint8)
    memory.empty((first,), np.uint8)  # in use again
    memory.empty((new,), np.uint8)
    assert {size: len(blocks) for size, blocks in memory._waiting.items()} == {first: 2, new: 1}


def block(channels):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)
    )


def test_nothing_that_a_user_holds_changes_while_training_goes_on():
    """Outputs, gradients and views of them, held in many forms through steps of other shapes."""
    tg.manual_seed(0)
    rng = np.random.default_rng(0)
    forms = (
        lambda a: a,
        lambda a: a[1:],
        lambda a: a.reshape(-1)[::7],
        memoryview,
        np.from_dlpack,
        lambda a: tg.Tensor(a).detach(),
    )
    models = [block(channels) for channels in (16, 24)]
    held: list[tuple] = []
    for step in range(40):
        model, size = models[step % 2], (30, 34)[step // 2 % 2]
        images = tg.Tensor(rng.standard_normal((16, 3, size, size), np.float32), requires_grad=True)
        middle = model[0](images)  # beside the fused block: the ops one by one
        normal = model[1](middle)
        out = model(images) + model[3](model[2](normal))
        (out * out).sum().backward()
        found = [images.grad, middle, normal, out, *(p.grad for p in model.parameters())]
        keep = rng.choice(len(found), 3, replace=False)
        for i in keep:
            form = forms[int(rng.integers(len(forms)))](found[i].data)
            held.append((form, np.array(getattr(form, "data", form), copy=True)))
        if len(held) > 30:
            del held[:: int(rng.integers(2, 5))]
        model.zero_grad()
        del found, out, normal, middle, images
        for form, copy in held:
            np.testing.assert_array_equal(getattr(form, "data", form), copy)


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


@pytest.mark.parametrize("limit", [2, 100])
def test_a_collection_of_garbage_in_the_midst_of_it_may_bring_and_ask_for_memory(
    limit, monkeypatch
):
    class Disturbed(dict):
        """Blocks by size; at each of some looks at it, blocks come back and one is asked for."""

        times, inside = 0, False

    def disturbed(name):
        def call(self, *args):
            if self.times and not self.inside:
                self.times, self.inside = self.times - 1, True
                memory._put(np.empty(memory.SMALLEST, np.uint8))
                memory._take(2 * memory.SMALLEST)
                memory._put(np.empty(2 * memory.SMALLEST, np.uint8))
                self.inside = False
            return getattr(dict, name)(self, *args)

        return call

    for name in ("__contains__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "pop"):
        setattr(Disturbed, name, disturbed(name))
    monkeypatch.setattr(memory, "_waiting", Disturbed())
    monkeypatch.setattr(memory, "LIMIT", limit * memory.SMALLEST)
    rng = np.random.default_rng(0)
    for times in range(20):
        memory._waiting.times = times
        held = [
            memory.empty((n * memory.SMALLEST,), np.uint8) for n in rng.integers(1, 3, 3).tolist()
        ]
        del held
        waiting = [block.size for blocks in dict.values(memory._waiting) for block in blocks]
        assert memory._waiting_bytes == sum(waiting) <= memory.LIMIT
        assert all(dict.values(memory._waiting))


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


def test_an_array_may_outlive_the_names_of_the_module():
    # The interpreter empties modules that something still refers to, the last imported first.
    code = """
import bisect, sys
from tinygrad_bn.kernels.cpu import memory
sys.kept = bisect, memory
bisect.kept = memory.empty((1 << 20,), "f4")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_begins_with_no_memory_waiting():
    memory.empty(SHAPE, np.float32)
    assert memory._waiting
    child = os.fork()
    if child == 0:
        os._exit(bool(memory._waiting or memory._waiting_bytes))
    assert os.waitpid(child, 0)[1] == 0
    assert memory._waiting


def test_a_dtype_that_is_not_numpys_own_is_kept():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = memory.empty((1000, 1000), ml_dtypes.bfloat16)
    x[...] = 0.5
    assert x.dtype == ml_dtypes.bfloat16 and x.sum(dtype=np.float32) == 500_000
