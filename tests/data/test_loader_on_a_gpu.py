"""`DataLoader(device=...)`: the same batches, on the GPU, copied while it computes.

Copies to the stand-in are made only when something waits for them, so memory that is overwritten
too early arrives wrong.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import TRAFFIC
from tinygrad_bn.data import DataLoader
from tinygrad_bn.data.ahead import BUFFERS

pytestmark = pytest.mark.usefixtures("strict_gpu")

IMAGES = np.arange(23 * 6, dtype="uint8").reshape(23, 2, 3)
LABELS = np.arange(23)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 4, 23, 100])
def test_batches_are_those_of_the_cpu(size, shuffle, drop_last, device):
    drop_last = drop_last and size <= len(LABELS)  # it would leave no batch
    options = {"shuffle": shuffle, "drop_last": drop_last, "seed": 3}
    cpu = DataLoader((IMAGES, LABELS), size, **options)
    gpu = DataLoader((IMAGES, LABELS), size, device=device, **options)
    for _ in range(2):
        # All batches are kept, and read at the end: none may share memory with a later one.
        pairs = list(zip(cpu, gpu, strict=True))
        for here, there in pairs:
            for a, b in zip(here, there, strict=True):
                assert b.device == ("cuda:0" if device == "cuda" else device)
                assert b.dtype == a.dtype
                np.testing.assert_array_equal(b.numpy(), a.numpy())
    assert cpu.epoch == gpu.epoch == 2


def test_the_next_batch_is_on_its_way_before_the_present_one_is_used():
    loader = DataLoader(LABELS, 4, device="cuda")
    batches = iter(loader)
    for i in range(3):
        next(batches)
        following = loader._ahead._sent[(i + 1) % BUFFERS]
        assert [copy.copied for copy in following] == [False]
        np.testing.assert_array_equal(following[0].host, LABELS[4 * i + 4 : 4 * i + 8])


def test_nothing_is_read_back_and_nothing_copied_from_pageable_memory():
    loader = DataLoader((IMAGES, LABELS), 4, shuffle=True, seed=0, device="cuda")
    TRAFFIC.clear()
    for _ in loader.steps(9):
        pass
    assert not TRAFFIC


def test_loaders_take_turns_and_iterators_run_side_by_side():
    loader = DataLoader(LABELS, 5, shuffle=True, seed=1, device="cuda")
    expected = DataLoader(LABELS, 5, shuffle=True, seed=1)
    pairs = zip(zip(loader, loader, strict=True), zip(expected, expected, strict=True), strict=True)
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_threads_take_turns_at_the_pinned_memory():
    rows = np.arange(400_000)
    ahead = DataLoader(rows, 4_000, device="cuda")._ahead

    def sent(first):
        arrived = []
        for start in range(first * 100_000, (first + 1) * 100_000, 500):
            (copy,) = ahead.send(rows[start : start + 500], 500)
            copy.wait()
            arrived.append(copy.target._data)
        return np.concatenate(arrived)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(sent, range(4)))
    finally:
        sys.setswitchinterval(before)
    np.testing.assert_array_equal(np.concatenate(found), rows)


def test_batches_own_their_memory():
    loader = DataLoader(LABELS, 23, device="cuda")
    (first,) = loader
    first[...] = 0
    (second,) = loader
    np.testing.assert_array_equal(second.numpy(), LABELS)


def test_on_the_cpu_it_is_as_without():
    for device in (None, "cpu"):
        loader = DataLoader(LABELS, 23, device=device)
        assert loader._ahead is None
        assert next(iter(loader)).device == "cpu"


def test_a_captured_step_takes_the_batches():
    step = tg.capture(lambda x: x.sum())
    sums = [step(x).item() for x in DataLoader(LABELS, 4, drop_last=True, device="cuda")]
    assert sums == [LABELS[i : i + 4].sum() for i in range(0, 20, 4)]
    assert step.graphs == 1


def test_a_gpu_that_cannot_be_used_is_an_error_at_once():
    with pytest.raises(RuntimeError, match="'cuda:7' cannot be used"):
        DataLoader(LABELS, 4, device="cuda:7")
    with pytest.raises(ValueError, match="unknown device"):
        DataLoader(LABELS, 4, device="gpu")
