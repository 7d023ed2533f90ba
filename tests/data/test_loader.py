from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn.backend import manual_seed
from tinygrad_bn.data import DataLoader
from tinygrad_bn.tensor import Tensor

rows = st.integers(1, 40)
sizes = st.integers(1, 50)
seeds = st.integers(0, 2**70)


def epoch(loader: DataLoader) -> list[int]:
    """The rows of one epoch of a loader over arange."""
    return [int(row) for batch in loader for row in batch.numpy()]


@given(rows, sizes, st.booleans(), seeds)
def test_each_epoch_visits_every_row_once(n: int, size: int, shuffle: bool, seed: int) -> None:
    loader = DataLoader(np.arange(n), size, shuffle=shuffle, seed=seed)
    for _ in range(3):
        assert sorted(epoch(loader)) == list(range(n))


@given(rows, sizes)
def test_rows_stand_in_order_without_shuffle(n: int, size: int) -> None:
    loader = DataLoader(np.arange(n), size)
    assert epoch(loader) == epoch(loader) == list(range(n))


@given(rows, sizes, st.booleans(), st.booleans())
def test_len_is_the_number_of_batches_and_all_but_the_last_are_full(
    n: int, size: int, shuffle: bool, drop_last: bool
) -> None:
    size = min(size, n) if drop_last else size
    loader = DataLoader(np.arange(n), size, shuffle=shuffle, drop_last=drop_last, seed=0)
    lengths = [batch.shape[0] for batch in loader]
    assert len(lengths) == len(loader)
    assert all(length == size for length in lengths[:-1])
    if drop_last:
        assert lengths[-1] == size
        assert len(loader) == n // size
    else:
        assert sum(lengths) == n
        assert 1 <= lengths[-1] <= size


@given(rows, sizes, seeds)
def test_drop_last_leaves_out_only_the_last_partial_batch(n: int, size: int, seed: int) -> None:
    size = min(size, n)
    dropped = DataLoader(np.arange(n), size, shuffle=True, drop_last=True, seed=seed)
    whole = DataLoader(np.arange(n), size, shuffle=True, seed=seed)
    assert epoch(dropped) == epoch(whole)[: n // size * size]


@given(rows, sizes, seeds)
def test_the_same_seed_gives_the_same_epochs(n: int, size: int, seed: int) -> None:
    one, two = (DataLoader(np.arange(n), size, shuffle=True, seed=seed) for _ in range(2))
    assert [epoch(one) for _ in range(3)] == [epoch(two) for _ in range(3)]


def test_epochs_and_seeds_give_different_orders() -> None:
    loaders = [DataLoader(np.arange(50), 8, shuffle=True, seed=seed) for seed in range(4)]
    orders = {tuple(epoch(loader)) for loader in loaders for _ in range(4)}
    assert len(orders) == 16


def test_every_row_is_equally_likely_to_come_first() -> None:
    loader = DataLoader(np.arange(5), 5, shuffle=True, seed=0)
    first = np.bincount([epoch(loader)[0] for _ in range(2000)], minlength=5)
    # Mean 400, standard deviation 18: five deviations.
    assert (abs(first - 400) < 90).all()


@given(rows, sizes, seeds)
def test_the_rows_of_all_arrays_match(n: int, size: int, seed: int) -> None:
    images = np.arange(n * 4, dtype=np.float32).reshape(n, 2, 2)
    labels = np.arange(n, dtype=np.uint8)
    loader = DataLoader((images, labels), size, shuffle=True, seed=seed)
    for x, y in loader:
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        assert (x.dtype, y.dtype) == (np.float32, np.uint8)
        np.testing.assert_array_equal(x.numpy(), images[y.numpy()])


def test_one_array_gives_batches_and_a_tuple_of_one_gives_tuples() -> None:
    assert isinstance(next(iter(DataLoader(np.arange(3), 2))), Tensor)
    for arrays in ((np.arange(3),), [np.arange(3)]):
        batch = next(iter(DataLoader(arrays, 2)))
        assert isinstance(batch, tuple)
        assert len(batch) == 1


def test_tensors_will_do_for_arrays() -> None:
    loader = DataLoader((Tensor(np.arange(3)), np.arange(3)), 3)
    x, y = next(iter(loader))
    assert x.numpy().tolist() == y.numpy().tolist() == [0, 1, 2]
    assert epoch(DataLoader(Tensor(np.arange(3)), 2)) == [0, 1, 2]


@pytest.mark.parametrize("shuffle", [False, True])
def test_writing_into_a_batch_does_not_reach_the_data(shuffle: bool) -> None:
    source = np.arange(4.0)
    source.flags.writeable = False
    for batch in DataLoader(source, 4, shuffle=shuffle, seed=0):
        batch.numpy()[:] = -1  # shared memory on the CPU
    assert source.tolist() == [0, 1, 2, 3]


def test_iterators_may_run_side_by_side() -> None:
    loader = DataLoader(np.arange(20), 3, shuffle=True, seed=0)
    alone = [epoch(loader), epoch(loader)]
    loader.epoch = 0
    pairs = list(zip(loader, loader, strict=True))
    for i in range(2):
        assert [int(r) for pair in pairs for r in pair[i].numpy()] == alone[i]


def test_an_epoch_can_be_gone_back_to() -> None:
    loader = DataLoader(np.arange(20), 3, shuffle=True, seed=0)
    epochs = [epoch(loader) for _ in range(3)]
    assert loader.epoch == 3
    loader.epoch = 1
    assert [epoch(loader), epoch(loader)] == epochs[1:]


def test_without_a_seed_manual_seed_decides() -> None:
    def orders() -> list[list[int]]:
        return [epoch(DataLoader(np.arange(30), 7, shuffle=True)) for _ in range(2)]

    manual_seed(3)
    first = orders()
    assert first[0] != first[1]
    manual_seed(3)
    assert orders() == first
    manual_seed(4)
    assert orders() != first


def test_the_seed_that_was_drawn_reproduces_the_order() -> None:
    loader = DataLoader(np.arange(30), 7, shuffle=True)
    again = DataLoader(np.arange(30), 7, shuffle=True, seed=loader.seed)
    assert epoch(loader) == epoch(again)


@given(rows, sizes, st.integers(0, 60), seeds)
def test_steps_run_through_the_epochs(n: int, size: int, count: int, seed: int) -> None:
    loader = DataLoader(np.arange(n), size, shuffle=True, seed=seed)
    by_steps = [batch.numpy().tolist() for batch in loader.steps(count)]
    assert len(by_steps) == count
    loader.epoch = 0
    batches: list[list[int]] = []
    while len(batches) < count:
        batches += [batch.numpy().tolist() for batch in loader]
    assert by_steps == batches[:count]


def test_steps_without_a_count_never_end() -> None:
    endless = DataLoader(np.arange(3), 2).steps()
    assert len(list(itertools.islice(endless, 1001))) == 1001


@pytest.mark.parametrize(
    ("arrays", "options", "error", "told"),
    [
        ((np.ones(3), np.ones((4, 2))), {}, ValueError, r"\(3,\), \(4, 2\).*same length"),
        (np.ones((0, 2)), {}, ValueError, r"\(0, 2\).*one or more rows"),
        (np.float32(1), {}, ValueError, "rank 1"),
        ([1, 2, 3], {}, ValueError, "rank 1"),
        ((), {}, ValueError, "no array"),
        (np.ones(3), {"batch_size": 0}, ValueError, "batch_size is 0.*>= 1"),
        (np.ones(3), {"batch_size": -1}, ValueError, "batch_size is -1"),
        (np.ones(3), {"batch_size": 2.0}, TypeError, r"batch_size is 2\.0.*integer"),
        (np.ones(3), {"batch_size": 4, "drop_last": True}, ValueError, "no batch of 4 in 3"),
        (np.ones(3), {"seed": -1}, ValueError, "seed is -1"),
        (np.ones(3), {"seed": "x"}, TypeError, "seed is 'x'"),
    ],
)
def test_bad_arguments_are_refused(
    arrays: object, options: dict[str, object], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=f"(?s)DataLoader: .*{told}"):
        DataLoader(arrays, **{"batch_size": 2, **options})


def test_a_negative_number_of_steps_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        DataLoader(np.ones(3), 2).steps(-1)
