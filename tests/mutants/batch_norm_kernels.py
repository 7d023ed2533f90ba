"""Faults in the fused NumPy kernels of batch norm, planted by replacing one of their functions.

The kernels serve large arrays and cut them into blocks of cache size. Here small arrays are served
too, in blocks to match, so that what is drawn has several blocks, cut rows and a tail.
"""

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tinygrad_bn import functional as F
from tinygrad_bn.kernels.cpu import (
    channel_blocks,
    numpy_batch_norm,
    numpy_batch_norm_given,
    threads,
)
from tinygrad_bn.kernels.cpu.channel_blocks import Blocks

_SMALL = (
    (numpy_batch_norm, "SMALLEST", 1),
    (channel_blocks, "BLOCK", 32),
    (channel_blocks, "SHORTEST_ROW", 8),
    (channel_blocks, "WIDEST", 16),
    (threads, "num_threads", lambda: 2),
)


def small_blocks():
    """Return the context in which the kernels, right as they are, serve arrays of any size."""
    return replaced(*_SMALL)


def mutant(name, owner, attribute, change):
    """Return a mutant: `change` takes the right function and returns the wrong one."""
    wrong = change(getattr(owner, attribute))
    planted = (*_SMALL, (owner, attribute, wrong))
    return Mutant(f"kernel: {name}", F.batch_norm, planted=lambda: replaced(*planted))


# --- changes -------------------------------------------------------------------------------------


def without_tail(tasks):
    return lambda blocks: [task for task in tasks(blocks) if not task.tail]


def without_tail_in_sums(function):
    """The tail is written, but its values are left out of the sums."""

    def call(blocks, *args):
        with replaced((Blocks, "tasks", without_tail(Blocks.tasks))):
            return function(blocks, *args)

    return call


def first_row_alone(column_sums):
    return lambda block: column_sums(block[:1])


def shift_not_added_back(statistics):
    def call(blocks, laid):
        mean, var = statistics(blocks, laid)
        shift = numpy_batch_norm._shift(blocks, laid)
        return (mean if shift is None else mean - shift), var

    return call


def offset_forgotten(statistics):
    """The square of the mean's distance from the shift stays in the variance."""

    def call(blocks, laid):
        mean, var = statistics(blocks, laid)
        shift = numpy_batch_norm._shift(blocks, laid)
        return mean, var + (mean - (0 if shift is None else shift)) ** 2

    return call


def about_zero(statistics):
    return lambda blocks, laid: numpy_batch_norm._statistics_about(blocks, laid, None)


def low_part_dropped(high_part):
    def call(blocks, mean, *args):
        return None if high_part(blocks, mean, *args) is None else mean

    return call


def shift_of_the_first_channel(statistics_about):
    def call(blocks, laid, shift):
        shift = None if shift is None else np.full_like(shift, shift[0])
        return statistics_about(blocks, laid, shift)

    return call


def channel_after_channel(spread):
    """Take each channel's values in a row of several periods to lie together."""

    def call(blocks, vector, left, right):
        if left == 0 and right % blocks.period == 0:
            return np.repeat(vector, right // blocks.channels)
        return spread(blocks, vector, left, right)

    return call


def ignoring_the_cut(spread):
    def call(blocks, vector, left, right):
        return spread(blocks, vector, 0, right - left)

    return call


def folding_the_wrong_axis(fold):
    def call(blocks, total, sums, left, right):
        if left == 0 and right % blocks.period == 0:
            total += sums.reshape(-1, blocks.run, blocks.channels).sum(axis=(0, 1))
        else:
            fold(blocks, total, sums, left, right)

    return call


def overwriting(fold):
    def call(blocks, total, sums, left, right):
        mine = np.zeros_like(total)
        fold(blocks, mine, sums, left, right)
        total[mine != 0] = mine[mine != 0]

    return call


def counting_without_tail(init):
    def call(blocks, *args):
        init(blocks, *args)
        blocks.m -= blocks.tail // blocks.channels

    return call


def without_widening(widen):
    return lambda block, name: block


def first_thread_alone(share_out):
    return lambda blocks, work: share_out(blocks, work)[:1]


def handing_out_scratch(empty):
    return lambda blocks, dtype: threads.scratch("handed out", blocks.sizes, np.dtype(dtype))


def axes_not_put_back(back):
    return lambda blocks, laid: laid.transpose(blocks.order)


def without(position):
    """Return a change that passes zeros for one of the vectors."""

    def change(function):
        def call(*args):
            listed = list(args)
            listed[position] = np.zeros_like(listed[position])
            return function(*listed)

        return call

    return change


def negated(position):
    def change(function):
        return lambda *args: function(*args[:position], -args[position], *args[position + 1 :])

    return change


def sums_swapped(sums):
    return lambda *args: sums(*args)[::-1]


def affine_with(**changes):
    """Return a change of `affine` that replaces some of its arguments by functions of them."""
    names = ("blocks", "laid", "mean", "var", "weight", "bias", "eps", "out")

    def change(affine):
        def call(*args, **options):
            given = dict(zip(names, args, strict=True))
            return affine(**given | {name: new(given) for name, new in changes.items()}, **options)

        return call

    return change


_K = numpy_batch_norm

KERNELS = [
    mutant("tail block forgotten", Blocks, "tasks", without_tail),
    mutant("tail left out of the statistics", _K, "_statistics", without_tail_in_sums),
    mutant("tail left out of the backward sums", _K, "_sums_with_cotangent", without_tail_in_sums),
    mutant("tail not counted", Blocks, "__init__", counting_without_tail),
    mutant("sums of each block's first row alone", _K, "column_sums", first_row_alone),
    mutant("sums of the last block alone", Blocks, "fold", overwriting),
    mutant("sums of the first thread alone", Blocks, "share_out", first_thread_alone),
    mutant("sums folded along the wrong axis", Blocks, "fold", folding_the_wrong_axis),
    mutant("values spread in the wrong order over rows", Blocks, "spread", channel_after_channel),
    mutant("values spread without regard to the cut", Blocks, "spread", ignoring_the_cut),
    mutant("shift not added back to the mean", _K, "_statistics", shift_not_added_back),
    mutant("offset from the shift left in the variance", _K, "_statistics", offset_forgotten),
    mutant("sums about 0 alone", _K, "_statistics", about_zero),
    mutant("shift of the first channel for all", _K, "_statistics_about",
           shift_of_the_first_channel),
    mutant("low part of the mean dropped", _K, "_high_part", low_part_dropped),
    mutant("no high part of the mean", _K, "_high_part", lambda high: lambda *args: None),
    mutant("float16 summed in float16", _K, "widen", without_widening),
    mutant("result handed out in scratch memory", Blocks, "empty", handing_out_scratch),
    mutant("axes not put back", Blocks, "back", axes_not_put_back),
    mutant("backward: x̂ term missing", _K, "_combine", without(5)),
    mutant("backward: wrong sign of the x̂ term", _K, "_combine", negated(5)),
    mutant("backward: constant missing", _K, "_combine", without(6)),
    mutant("backward: the two sums swapped", _K, "_sums_with_cotangent", sums_swapped),
    mutant("ε twice", _K, "affine", affine_with(eps=lambda a: 2 * a["eps"])),
    mutant("γ forgotten", _K, "affine", affine_with(weight=lambda a: None)),
    mutant("β forgotten where there is no γ", _K, "affine", affine_with(
        bias=lambda a: None if a["weight"] is None else a["bias"])),
    mutant("evaluation: ε forgotten", numpy_batch_norm_given, "affine", affine_with(
        eps=lambda a: 0.0)),
    mutant("evaluation: β forgotten", numpy_batch_norm_given, "affine", affine_with(
        bias=lambda a: None)),
    mutant("out of range not noticed", _K, "in_range", lambda right: lambda var: True),
]  # fmt: skip
