"""Faults in the compiled kernels of pools, planted around their loops; any size is served."""

import importlib.util
from contextlib import contextmanager

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.updates import Loop
from tests.mutants.verifiers import as_op
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import (
    numba_avg_pool,
    numba_avg_pool_input_grad,
    numba_pooling,
    numba_scatter_windows,
    numpy_avg_pool,
    numpy_avg_pool_input_grad,
    planes,
    pools,
    threads,
)
from tinygrad_bn.op import REGISTRY

_SMALL = (
    (pools, "SMALLEST", 1),
    (numba_pooling, "FEWEST_CHANNELS", 1),
    (numba_scatter_windows, "FEWEST_CHANNELS", 1),
    (planes, "CHUNK_BYTES", 1),
    (threads, "num_threads", lambda: 2),
)


def small_chunks():
    """Return the context in which the kernels, right as they are, serve images of any size."""
    return replaced(*_SMALL)


def mutant(op, fault, owner, attribute, change):
    """Return a mutant: `change` takes the right function, or loop, and gives the wrong one."""
    right = getattr(owner, attribute)
    wrong = Loop(right, change) if hasattr(right, "of") else change(right)
    planted = (*_SMALL, (owner, attribute, wrong))
    return Mutant(f"{op}, compiled: {fault}", REGISTRY[op], as_op(op), lambda: replaced(*planted))


def few(op, fault, owner, change):
    """Return a mutant of a NumPy kernel of a mean pool with few windows."""

    @contextmanager
    def planted():
        with replaced((owner, "each", change(owner.each))), use_kernels("numpy"):
            yield

    return Mutant(f"{op}, few windows: {fault}", REGISTRY[op], as_op(op), planted)


def with_sizes(at, change):
    """Return a change that hands a loop other sizes; these are its argument `at`."""

    def planted(loop):
        def call(*args):
            sizes = args[at].copy()
            change(sizes)
            return loop(*args[:at], sizes, *args[at + 1 :])

        return call

    return planted


def without_last_row_of_a_window(sizes):
    sizes[5] = max(1, sizes[5] - 1)


def without_last_column_of_a_window(sizes):
    sizes[6] = max(1, sizes[6] - 1)


def padding_swapped(sizes):
    sizes[9], sizes[10] = sizes[10], sizes[9]


def places_moved(loop):
    def call(images, sizes, starts, best, places):
        loop(images, sizes, starts, best, places)
        places += 1

    return call


def compared_after_rounding(loop):
    """Choose places as if numbers that round to the same were equal."""

    def call(images, sizes, starts, best, places):
        loop(images, sizes, starts, best, places)
        lower = best.copy()
        loop(np.round(images), sizes, starts, lower, places)

    return call


def smallest(loop):
    def call(images, sizes, starts, best, places):
        loop(-images, sizes, starts, best, places)
        best *= -1

    return call


def ones(at):
    return lambda loop: lambda *a: loop(*a[:at], np.ones_like(a[at]), *a[at + 1 :])


def added_to_what_was_there(loop):
    def call(*args):
        before = np.nan_to_num(args[-1].copy())
        loop(*args)
        args[-1][...] += before

    return call


def chosen_by_all(loop):
    def call(y, places, sizes, images):
        loop(y, np.zeros_like(places), sizes, images)

    return call


def without_last_chunk(for_chunks):
    def call(work, images):
        for_chunks(lambda first, last: work(first, last) if last < len(images) else None, images)

    return call


def padding_counted(counts):
    return lambda view, dtype, include: counts(view, dtype, True)


def padding_not_counted(counts):
    return lambda view, dtype, include: counts(view, dtype, False)


def first_alone(each):
    return lambda view: list(each(view))[:1]


def a_column_short(each):
    def call(view):
        for i, j, (rows, columns) in each(view):
            last = max(columns.start + 1, columns.stop - 1)
            yield i, j, (rows, slice(columns.start, last))

    return call


def as_far_as_padding(each):
    """Take windows to begin at the edge of the image, and not before it."""

    def call(view):
        for i, j, (rows, columns) in each(view):
            down = max(0, view.padding[0] - view.stride[0] * i)
            right = max(0, view.padding[1] - view.stride[1] * j)
            rows = slice(rows.start, rows.stop + down)
            yield i, j, (rows, slice(columns.start, columns.stop + right))

    return call


_MAX, _AVG = numba_pooling, numba_avg_pool
_SCATTER, _SPREAD = numba_scatter_windows, numba_avg_pool_input_grad

POOLS = [
    mutant("max_pool2d", "last row of a window left out", _MAX, "largest",
           with_sizes(1, without_last_row_of_a_window)),
    mutant("max_pool2d", "paddings swapped", _MAX, "largest", with_sizes(1, padding_swapped)),
    mutant("max_pool2d", "places moved by one", _MAX, "largest", places_moved),
    mutant("max_pool2d", "compared after rounding", _MAX, "largest", compared_after_rounding),
    mutant("max_pool2d", "smallest for largest", _MAX, "largest", smallest),
    mutant("max_pool2d", "last chunk left out", pools, "for_chunks", without_last_chunk),
    mutant("scatter_windows", "last column of a window left out", _SCATTER, "scatter",
           with_sizes(2, without_last_column_of_a_window)),
    mutant("scatter_windows", "paddings swapped", _SCATTER, "scatter",
           with_sizes(2, padding_swapped)),
    mutant("scatter_windows", "first entry chosen by all", _SCATTER, "scatter", chosen_by_all),
    mutant("scatter_windows", "added to what memory held", _SCATTER, "scatter",
           added_to_what_was_there),
    mutant("avg_pool2d", "last column of a window left out", _AVG, "average",
           with_sizes(1, without_last_column_of_a_window)),
    mutant("avg_pool2d", "sums for means", _AVG, "average", ones(2)),
    mutant("avg_pool2d", "padding counted always", _AVG, "counts", padding_counted),
    mutant("avg_pool2d", "padding never counted", _AVG, "counts", padding_not_counted),
    mutant("avg_pool2d_input_grad", "last row of a window left out", _SPREAD, "spread",
           with_sizes(1, without_last_row_of_a_window)),
    mutant("avg_pool2d_input_grad", "paddings swapped", _SPREAD, "spread",
           with_sizes(1, padding_swapped)),
    mutant("avg_pool2d_input_grad", "shares not divided", _SPREAD, "spread", ones(2)),
    mutant("avg_pool2d_input_grad", "padding counted always", _SPREAD, "counts", padding_counted),
    mutant("avg_pool2d_input_grad", "added to what memory held", _SPREAD, "spread",
           added_to_what_was_there),
    few("avg_pool2d", "first window alone", numpy_avg_pool, first_alone),
    few("avg_pool2d", "windows a column short", numpy_avg_pool, a_column_short),
    few("avg_pool2d", "windows begin at the edge", numpy_avg_pool, as_far_as_padding),
    few("avg_pool2d_input_grad", "windows a column short", numpy_avg_pool_input_grad,
        a_column_short),
    few("avg_pool2d_input_grad", "windows begin at the edge", numpy_avg_pool_input_grad,
        as_far_as_padding),
]  # fmt: skip

RIGHT = tuple(
    Mutant(f"the compiled {name} in small chunks", REGISTRY[name], as_op(name), small_chunks)
    for name in ("max_pool2d", "scatter_windows", "avg_pool2d", "avg_pool2d_input_grad")
)

if importlib.util.find_spec("numba") is None:
    POOLS, RIGHT = [], ()
