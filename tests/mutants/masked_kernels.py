"""Faults in the kernels of batch norm with a mask, in NumPy and compiled, and in their shares.

As in `batch_norm_kernels` and `compiled_kernels`, a fault is planted in or around one function, and
small arrays are served too.
"""

import numpy as np

from tests.mutants import batch_norm_kernels, compiled_kernels
from tests.mutants.compiled_kernels import Loop, with_row, without_sum
from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tinygrad_bn import functional as F
from tinygrad_bn.kernels.cpu import (
    channel_blocks,
    channel_loops,
    numba_masked_batch_norm,
    numpy_masked_batch_norm,
)

_P, _K = numpy_masked_batch_norm, numba_masked_batch_norm
#: What has to be small for the module to serve, and the module.
_NUMPY, _NUMBA = (batch_norm_kernels._SMALL, _P), (compiled_kernels._SMALL, _K)
#: With rows that are never cut into columns, and with rows that nearly always are.
_WHOLE = ((*_NUMPY[0], (channel_blocks, "WIDEST", 1 << 14)), _P)
_CUT = ((*_NUMPY[0], (channel_blocks, "SHORTEST_ROW", 2), (channel_blocks, "WIDEST", 4)), _P)


def mutant(family, fault, attribute, change):
    small, module = family
    right = getattr(module, attribute)
    wrong = Loop(right, change) if hasattr(right, "of") else change(right)
    planted = (*small, (module, attribute, wrong))
    where = "kernel" if module is _P else "compiled"
    return Mutant(f"mask, {where}: {fault}", F.batch_norm, planted=lambda: replaced(*planted))


# --- shares --------------------------------------------------------------------------------------


def of_the_mask(change):
    """Return a change of `shares_of` that gives it another mask."""
    return lambda shares_of: lambda mask, *args: shares_of(change(mask), *args)


def with_shares(change):
    """Return a change of `shares_of` that gives out other shares."""

    def changed(shares_of):
        def call(*args):
            found = shares_of(*args)
            return None if found is None else (change(found[0]), found[1])

        return call

    return changed


def of_all_slots(share):
    return np.where(share > 0, 1 / share.shape[1], 0.0)


def slots_counted(shares_of):
    def call(*args):
        found = shares_of(*args)
        return None if found is None else (found[0], (found[0] > 0).sum(axis=1).astype(np.float64))

    return call


def one_value_is_enough(shares_of):
    def call(mask, shape, axis, order, groups):
        sizes = tuple(1 if i in axis else n for i, n in enumerate(shape))
        often = np.broadcast_to(mask, sizes).transpose(order).astype(np.float64)
        often = often.reshape(groups, -1)
        total = often.sum(axis=1)
        return often / np.where(total > 0, total, 1)[:, None], total

    return call


def in_the_order_of_x(shares_of):
    """Flatten the mask as if x lay in memory as its axes say."""
    return lambda mask, shape, axis, order, groups: shares_of(
        mask, shape, axis, tuple(range(len(shape))), groups
    )


# --- NumPy ---------------------------------------------------------------------------------------


def walking(change):
    """Return a change of `_walk` that gives out other shares p, or another `off`, of a block."""

    def changed(walk):
        def call(blocks, *args):
            for task, p, off, arrays, spread in walk(blocks, *args):
                p, off = change(blocks, task, p.copy(), off.copy())
                yield task, p, off, arrays, spread

        return call

    return changed


def everything_counts(blocks, task, p, off):
    return p, np.zeros_like(off)


def position_after_position(blocks, task, p, off):
    """Take the channels of a position to lie together, where a channel's positions do."""
    if task.left or task.right % blocks.period:
        return p, off
    each = p.reshape(len(p), -1, blocks.channels, blocks.run)[:, :, 0]
    p = each.repeat(blocks.channels, axis=2).reshape(p.shape)
    return p, p == 0


def without_regard_to_the_cut(blocks, task, p, off):
    if task.left == 0:
        return p, off
    p = np.roll(p, task.left % blocks.run, axis=1)
    return p, p == 0


def nothing(function):
    return lambda *args: None


def zeros_for(at):
    return lambda function: (
        lambda *args: function(*args[:at], np.zeros_like(args[at]), *args[at + 1 :])
    )


def shift_forgotten(statistics):
    def call(blocks, laid, share, shift):
        mean, var = statistics(blocks, laid, share, shift)
        return mean - shift, var

    return call


def offset_forgotten(statistics):
    def call(blocks, laid, share, shift):
        mean, var = statistics(blocks, laid, share, shift)
        return mean, var + (mean - shift) ** 2

    return call


def sums_given_out(change):
    return lambda sums: lambda *args: change(*sums(*args))


def evenly(combine):
    """Give all that counts the same part in mean and variance."""

    def call(blocks, laid_g, laid, share, *args):
        counts = share > 0
        even = (counts / max(counts.sum(), 1)).astype(share.dtype)
        return combine(blocks, laid_g, laid, even, *args)

    return call


def without_vector(at):
    def change(combine):
        def call(blocks, laid_g, laid, share, vectors, out):
            vectors = [v * 0 if i == at else v for i, v in enumerate(vectors)]
            return combine(blocks, laid_g, laid, share, vectors, out)

        return call

    return change


# --- compiled ------------------------------------------------------------------------------------


def counting_evenly(at):
    """Return a change that gives a loop equal shares for all that counts."""

    def change(loop):
        def call(*args):
            even = np.where(args[at] > 0, 1 / max((args[at] > 0).sum(), 1), 0.0)
            return loop(*args[:at], even, *args[at + 1 :])

        return call

    return change


def all_counting(at):
    """Return a change that gives a loop a share for what has none."""

    def change(loop):
        def call(*args):
            some = np.where(args[at] > 0, args[at], 1e-3)
            return loop(*args[:at], some, *args[at + 1 :])

        return call

    return change


def zero_otherwise(normalize):
    return lambda x, share, vectors, otherwise, *args: normalize(
        x, share, vectors, otherwise * 0, *args
    )


def beta_of_what_counts(add):
    def call(*args):
        add(*args)
        args[-1][2] = args[-1][0]

    return call


def all_cotangents(add):
    def call(*args):
        add(*args)
        args[-1][0] = args[-1][2]

    return call


def of_the_first_part(part):
    return lambda share, cut, columns: share[: (cut.stop - cut.start) // columns]


_C = channel_loops

NUMPY = [
    mutant(_NUMPY, fault, "shares_of", change)
    for fault, change in (
        ("frequencies taken for booleans", of_the_mask(lambda mask: mask > 0)),
        ("shares of all slots", with_shares(of_all_slots)),
        ("shares in another order", with_shares(lambda share: share[:, ::-1].copy())),
        ("slots counted, not frequencies", slots_counted),
        ("one value is enough", one_value_is_enough),
        ("mask flattened as x's axes stand", in_the_order_of_x),
    )
] + [
    mutant(_NUMPY, "nothing is passed over", "_walk", walking(everything_counts)),
    mutant(_WHOLE, "shares spread in the wrong order", "_walk", walking(
        position_after_position)),
    mutant(_CUT, "shares without regard to the cut", "_walk", walking(
        without_regard_to_the_cut)),
    mutant(_NUMPY, "masked slots are normalized too", "_overwrite", nothing),
    mutant(_NUMPY, "masked slots give 0, not β", "_overwrite", zeros_for(3)),
    mutant(_NUMPY, "shift not added back to the mean", "_statistics_about", shift_forgotten),
    mutant(_NUMPY, "offset from the shift left in the variance", "_statistics_about",
           offset_forgotten),
    mutant(_NUMPY, "cotangent of masked slots missing in gβ", "_sums_with_cotangent",
           sums_given_out(lambda sum_g, sum_gd, every: (sum_g, sum_gd, sum_g))),
    mutant(_NUMPY, "cotangent of masked slots in the mean term", "_sums_with_cotangent",
           sums_given_out(lambda sum_g, sum_gd, every: (every, sum_gd, every))),
    mutant(_NUMPY, "equal shares in the backward", "_combine", evenly),
    mutant(_NUMPY, "backward: x̂ term missing", "_combine", without_vector(1)),
    mutant(_NUMPY, "backward: constant missing", "_combine", without_vector(2)),
    mutant(_NUMPY, "backward: about 0", "_combine", without_vector(3)),
]  # fmt: skip

NUMBA = [
    mutant(_NUMBA, fault, "shares_of", change)
    for fault, change in (
        ("frequencies taken for booleans", of_the_mask(lambda mask: mask > 0)),
        ("shares in another order", with_shares(lambda share: share[:, ::-1].copy())),
        ("one value is enough", one_value_is_enough),
        ("mask flattened as x's axes stand", in_the_order_of_x),
    )
] + [
    mutant(_NUMBA, "shares of the first part for every thread", "_part", of_the_first_part),
    mutant(_NUMBA, "equal shares in the statistics", "add_moments", counting_evenly(1)),
    mutant(_NUMBA, "masked slots in the statistics", "add_moments", all_counting(1)),
    mutant(_NUMBA, "Σ p d² missing", "add_moments", without_sum(1)),
    mutant(_NUMBA, "masked slots are normalized too", "normalize", all_counting(1)),
    mutant(_NUMBA, "masked slots give 0, not β", "normalize", zero_otherwise),
    mutant(_NUMBA, "constant forgotten", "normalize", with_row(_C.CONSTANT, 0, 2)),
    mutant(_NUMBA, "masked slots in the backward sums", "add_products", all_counting(2)),
    mutant(_NUMBA, "cotangent of masked slots missing in gβ", "add_products",
           beta_of_what_counts),
    mutant(_NUMBA, "cotangent of masked slots in the mean term", "add_products",
           all_cotangents),
    mutant(_NUMBA, "equal shares in the backward", "combine", counting_evenly(2)),
    mutant(_NUMBA, "masked slots take gradient", "combine", all_counting(2)),
    mutant(_NUMBA, "slope forgotten in dx", "combine", with_row(_C.SLOPE, 0, 3)),
    mutant(_NUMBA, "level forgotten in dx", "combine", with_row(_C.LEVEL, 0, 3)),
]  # fmt: skip

if not compiled_kernels._HERE:
    NUMBA = []

MASKED = [*NUMPY, *NUMBA]
