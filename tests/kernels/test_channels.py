"""How tensors are handed to the compiled loops: in which rows, and in which shares."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn.kernels.cpu import channels, threads
from tinygrad_bn.kernels.cpu.channels import Channels, channels_of


@pytest.mark.parametrize(
    ("shape", "axis", "columns", "inner"),
    [
        ((32, 64, 56, 56), (1,), 64, 3136),  # long runs are left as they are
        ((32, 56, 56, 64), (3,), 128, 1),  # two pixels make a row
        ((256, 20, 5, 5), (1,), 500, 1),  # one sample is a row by itself
        ((4096, 3), (1,), 192, 1),  # 43 samples of 3 would do, but 64 are whole vectors
        ((4096, 49), (1,), 196, 1),  # 147 + 19, 196 + 4 and 245 + 21 beyond whole vectors
        ((4096, 1000), (1,), 1000, 1),
        ((2, 8, 5000, 10), (1, 2), 40000, 10),  # a row would be too long
        ((1, 100), (1,), 100, 1),  # no more than there are
    ],
)
def test_rows_are_of_whole_samples_and_whole_vectors_if_they_can_be(shape, axis, columns, inner):
    made = Channels(shape, axis, tuple(range(len(shape))))
    assert (made.columns, made.inner) == (columns, inner)
    run, repeats = made.spreading
    assert columns * inner == made.channels * made.run * repeats == made.row
    assert run * inner == made.run


@given(period=st.integers(1, 5000))
def test_no_row_that_would_do_has_a_smaller_part_beyond_whole_vectors(period):
    def beyond(repeats):
        return repeats * period % channels.VECTOR / (repeats * period)

    fewest = next(n for n in range(1, 129) if n * period >= channels.SHORTEST_ROW)
    chosen = channels._repeats(period)
    assert fewest <= chosen < 2 * fewest
    assert beyond(chosen) == min(map(beyond, range(fewest, 2 * fewest)))


def test_masked_tensors_keep_their_samples_apart():
    made = Channels((4096, 3), (1,), (0, 1), may_spread=False)
    assert (made.columns, made.inner, made.row, made.spreading) == (3, 1, 3, (1, 1))


@given(data=st.data())
def test_shares_are_whole_rows_and_cover_a_group_once(data):
    samples, groups, count = (data.draw(st.integers(1, most)) for most in (300, 3, 7))
    shape = (samples * groups, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6)))
    smallest = data.draw(st.sampled_from([1, 50, 1000]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "SMALLEST_SHARE", smallest)
        patch.setattr(threads, "_count", count)
        made = Channels(shape, (1,), (0, 1, 2), groups)
        parts = made.parts()
    assert parts[0].start == 0 and parts[-1].stop == made.size == math.prod(shape) // groups
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert all(part.start % made.row == 0 and part.stop > part.start for part in parts)
    rows = made.size // made.row
    assert len(parts) == max(1, min(count, rows, made.size // smallest))
    # None has more than a row, and the end's part of one, beyond another.
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) < 2 * made.row


@given(order=st.permutations(range(4)), data=st.data())
def test_what_is_laid_comes_back_and_is_copied_only_if_it_is_not_dense(order, data):
    shape = data.draw(st.tuples(*[st.integers(2, 4)] * 4))
    axis = data.draw(st.sampled_from([(0,), (1,), (3,), (0, 1), (1, 2), (0, 2)]))
    x = np.arange(math.prod(shape), dtype=np.float32).reshape([shape[i] for i in order])
    x = x.transpose(np.argsort(order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channels, "SMALLEST", 0)
        made = channels_of(x, axis)
    laid, out = made.lay(x), made.empty(x.dtype)
    places = [order.index(i) for i in axis]
    together = places == list(range(places[0], places[0] + len(axis)))
    assert np.shares_memory(laid, x) == together
    made.laid(out)[...] = laid
    np.testing.assert_array_equal(made.back(out), x)
    # The channels in x's order, with everything after them in memory for a run.
    of_channel = np.moveaxis(x, axis, range(len(axis))).reshape(made.channels, -1)
    split = laid.reshape(-1, made.channels, made.run).swapaxes(0, 1).reshape(made.channels, -1)
    np.testing.assert_array_equal(np.sort(split), np.sort(of_channel))
    assert made.count == of_channel.shape[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channel_count", [1, 3, 128, 129, 944])
def test_rows_of_vectors_are_zeros_that_begin_at_lines_of_the_cache(channel_count, dtype):
    made = Channels((64, channel_count), (1,), (0, 1))
    vectors = made.rows(5, dtype)
    assert vectors.dtype == dtype and len(vectors) == 5 and not vectors.any()
    assert vectors.shape[1] >= made.columns and vectors.flags.c_contiguous
    assert all(row.ctypes.data % channels.LINE == 0 for row in vectors)


def test_shares_add_to_sums_of_their_own(monkeypatch):
    monkeypatch.setattr(channels, "SMALLEST_SHARE", 1)
    monkeypatch.setattr(threads, "_count", 3)
    made = Channels((700, 5), (1,), (0, 1))
    assert len(made.parts()) == 3

    def add(part, sums):
        sums[:, : made.columns] += [[part.start], [part.stop]]

    sums = made.sums(add)
    assert sums.dtype == np.float64 and sums.flags.c_contiguous
    expected = [[part.start, part.stop] for part in made.parts()]
    np.testing.assert_array_equal(sums[:, :, 0], expected)
    np.testing.assert_array_equal(sums[:, :, made.columns - 1], expected)
    assert all(row.ctypes.data % channels.LINE == 0 for share in sums for row in share)
