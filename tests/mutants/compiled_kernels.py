"""Faults in the compiled kernels: batch norm, ReLU after it, and the convolution block.

A fault in a loop is planted around the compiled one: what goes in or comes out is changed. Small
arrays are served too, in rows, chunks and shares to match. Without Numba nothing here applies.
"""

import importlib.util
import weakref

import numpy as np

from tests.mutants.bfloat16 import as_narrow
from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.verifiers import as_op
from tinygrad_bn import functional as F
from tinygrad_bn.backend import LentMemory
from tinygrad_bn.kernels.cpu import (
    channel_loops,
    channels,
    conv_block_loops,
    conv_block_plan,
    memory,
    numba_batch_norm,
    numba_conv_block,
    threads,
    vector_loops,
)
from tinygrad_bn.kernels.cpu.channels import Channels
from tinygrad_bn.kernels.cpu.conv_block_plan import Plan
from tinygrad_bn.op import REGISTRY

_HERE = importlib.util.find_spec("numba") is not None

_SMALL = (
    (channels, "SMALLEST", 1),
    (channels, "SMALLEST_SHARE", 1),
    (channels, "SHORTEST_RUN", 4),
    (channels, "SHORTEST_ROW", 8),
    (conv_block_plan, "SMALLEST", 1),
    (conv_block_plan, "CHUNK_BYTES", 1),
    (conv_block_plan, "WIDTH", 8),
    (conv_block_plan, "_plan", conv_block_plan._plan.__wrapped__),  # it would keep what is wrong
    (memory, "SMALLEST", 1),
    (threads, "num_threads", lambda: 2),
    (numba_conv_block, "num_threads", lambda: 2),
)


def small_parts():
    """Return the context in which the kernels, right as they are, serve arrays of any size."""
    return replaced(*_SMALL)


class Loop:
    """A loop with a fault: `change` takes the compiled function and returns the wrong one."""

    def __init__(self, right, change):
        self.right, self.change = right, change

    def of(self, *dtypes):
        return self.change(self.right.of(*dtypes))


def planting(owner, attribute, change):
    right = getattr(owner, attribute)
    wrong = Loop(right, change) if hasattr(right, "of") else change(right)
    return lambda: replaced(*_SMALL, (owner, attribute, wrong))


def norm(fault, owner, attribute, change):
    """Return a mutant of the Numba batch norm."""
    return Mutant(f"compiled: {fault}", F.batch_norm, planted=planting(owner, attribute, change))


def narrow(fault, owner, attribute, change):
    """Return a mutant of it where x is bfloat16."""
    planted = planting(owner, attribute, change)
    return Mutant(f"compiled, bfloat16: {fault}", F.batch_norm, as_narrow, planted)


def op(name, fault, owner, attribute, change):
    """Return a mutant of a kernel of the library's op `name`."""
    planted = planting(owner, attribute, change)
    return Mutant(f"{name}, compiled: {fault}", REGISTRY[name], as_op(name), planted)


# --- batch norm ----------------------------------------------------------------------------------


def whole_rows_alone(parts):
    """Leave out the last samples, if they fill no row."""

    def call(self):
        *most, last = parts(self)
        return [*most, slice(last.start, self.size // self.row * self.row)]

    return call


def in_whole_rows(function):
    def call(channels, *args):
        with replaced((Channels, "parts", whole_rows_alone(Channels.parts))):
            return function(channels, *args)

    return call


def first_share_alone(sums):
    def call(self, add):
        found = sums(self, add)
        found[1:] = 0
        return found

    return call


def about_zero(statistics):
    def call(channels, laid):
        x = laid.reshape(-1, channels.channels, channels.run).astype(np.float64)
        mean = x.mean(axis=(0, 2))
        return np.stack([mean, np.maximum((x * x).mean(axis=(0, 2)) - mean * mean, 0.0)])

    return call


def channel_after_channel(affine):
    """Take each channel's values in a row of several samples to lie together."""

    def call(found, *args):
        *_, run, repeats, vectors = args
        held, wide = affine(found, *args), found.shape[1] * run
        rows = vectors[:3]
        rows[:, : wide * repeats] = np.repeat(rows[:, :wide:run], run * repeats, axis=1)
        return held

    return call


def first_of_a_row_alone(affine):
    def call(found, *args):
        *_, run, repeats, vectors = args
        held, wide = affine(found, *args), found.shape[1] * run
        vectors[:3, wide : wide * repeats] = 0
        return held

    return call


def mean_rounded(loop):
    """Take the mean for one that the dtype of x holds: no low part is left."""

    def call(*args):
        at = 0 if args[0].ndim == 2 else 1
        found, vectors = args[at].copy(), args[-1 - at]
        found[0] = found[0].astype(vectors.dtype)
        return loop(*args[:at], found, *args[at + 1 :])

    return call


def folded_in_the_wrong_order(moments):
    def call(sums, shift, C, run, repeats, count, found):
        wrong, wide = sums.copy(), C * run * repeats
        split = sums[:, :, :wide].reshape(len(sums), 2, repeats, run, C)
        wrong[:, :, :wide] = split.swapaxes(3, 4).reshape(len(sums), 2, wide)
        moments(wrong, shift, C, run, repeats, count, found)

    return call


def shift_forgotten(moments):
    def call(sums, shift, C, run, repeats, count, found):
        moments(sums, shift, C, run, repeats, count, found)
        found[0] -= shift[: C * run : run]

    return call


def offset_forgotten(moments):
    def call(sums, shift, C, run, repeats, count, found):
        moments(sums, shift, C, run, repeats, count, found)
        found[1] += (found[0] - shift[: C * run : run]) ** 2

    return call


def unbiased(moments):
    def call(sums, shift, C, run, repeats, count, found):
        moments(sums, shift, C, run, repeats, count, found)
        found[1] *= count / (count - 1)

    return call


def moments_of_eighths(add):
    """Leave out what eighths of whole rows leave over, where channels are neighbours."""

    def call(x, shift, C, S, total):
        kept = len(x) if S > 1 else len(x) // (8 * C) * 8 * C
        add(x[:kept], shift, C, S, total)

    return call


def products_of_halves(add):
    """Leave out what halves of whole rows leave over, where channels are neighbours."""

    def call(g, x, vectors, C, S, relu, total):
        kept = len(x) if S > 1 else len(x) // (2 * C) * 2 * C
        add(g[:kept], x[:kept], vectors, C, S, relu, total)

    return call


def values_of_halves(normalize):
    def call(x, vectors, C, S, relu, y):
        y[...] = 0
        kept = len(x) if S > 1 else len(x) // (2 * C) * 2 * C
        normalize(x[:kept], vectors, C, S, relu, y[:kept])

    return call


def gradients_of_halves(combine):
    def call(g, x, vectors, C, S, relu, gx):
        gx[...] = 0
        kept = len(x) if S > 1 else len(x) // (2 * C) * 2 * C
        combine(g[:kept], x[:kept], vectors, C, S, relu, gx[:kept])

    return call


def another_eighth_twice(add):
    """Take the seventh eighth for the last one too, where channels are neighbours."""

    def call(x, shift, C, S, total):
        eighth = len(x) // (8 * C) * C
        wrong = x.copy()
        if S == 1:
            wrong[7 * eighth : 8 * eighth] = wrong[6 * eighth : 7 * eighth]
        add(wrong, shift, C, S, total)

    return call


def halves_swapped(loop):
    """Write each half where the other belongs, where channels are neighbours."""

    def call(*args):
        loop(*args)
        *_, C, S, _, out = args
        halves = out[: len(out) // (2 * C) * 2 * C]
        if S == 1:
            halves[:] = np.roll(halves, len(halves) // 2)

    return call


def moments_in_float32(add):
    def call(x, shift, C, S, total):
        add(x, shift, C, S, total)
        total[...] = total.astype(np.float32)

    return call


def with_row(row, value, at):
    """Return a change that gives a loop vectors of which one row holds `value`."""

    def change(loop):
        def call(*args):
            vectors = args[at].copy()
            vectors[row] = value
            return loop(*args[:at], vectors, *args[at + 1 :])

        return call

    return change


def without_sum(row):
    def change(add):
        def call(*args):
            add(*args)
            args[-1][row] = 0

        return call

    return change


def without_weight(at):
    return lambda loop: lambda *args: loop(*args[:at], np.empty(0), *args[at + 1 :])


def first_share_of_the_gradients(slopes):
    return lambda sums, *args: slopes(sums[:1].copy(), *args)


def bits_of_float16(stored):
    """Take what bfloat16 is stored in for a float16."""
    return lambda x: x if x.dtype.itemsize > 2 else x.view(np.int16)


def last_bit_lost(loop):
    def call(*args):
        loop(*args)
        args[-1][...] &= ~1

    return call


def without_limits():
    """Take every number for one that float32 holds."""
    every = np.array([0.0, np.inf])
    limits = dict.fromkeys(_K.NUMBERS, every)
    return replaced(*_SMALL, (_K, "VARIANCES", limits), (_K, "NUMBERS", limits))


_K, _C, _V = numba_batch_norm, channel_loops, vector_loops

NORM = [
    norm("part of a row forgotten", Channels, "parts", whole_rows_alone),
    norm("part of a row left out of the statistics", _K, "_statistics", in_whole_rows),
    norm("part of a row left out of the backward", _K, "_vjp_of_group", in_whole_rows),
    norm("part of a row not normalized", _K, "apply", in_whole_rows),
    norm("sums of the first share alone", Channels, "sums", first_share_alone),
    norm("sums of the first share alone in the backward", _K, "slopes",
         first_share_of_the_gradients),
    norm("numbers of a row in the wrong order", _V, "affine", channel_after_channel),
    norm("numbers for the first sample of a row alone", _V, "affine", first_of_a_row_alone),
    norm("sums folded in the wrong order", _K, "moments", folded_in_the_wrong_order),
    norm("sums about 0", _K, "_statistics", about_zero),
    norm("shift not added back to the mean", _K, "moments", shift_forgotten),
    norm("offset from the shift left in the variance", _K, "moments", offset_forgotten),
    norm("variance by m - 1", _K, "moments", unbiased),
    norm("statistics of full eighths alone", _K, "add_moments", moments_of_eighths),
    norm("an eighth twice in the statistics, for another", _K, "add_moments", another_eighth_twice),
    norm("halves of y swapped", _K, "normalize", halves_swapped),
    norm("halves of dx swapped", _K, "combine", halves_swapped),
    norm("backward sums of full halves alone", _K, "add_products", products_of_halves),
    norm("y of full halves alone", _K, "normalize", values_of_halves),
    norm("dx of full halves alone", _K, "combine", gradients_of_halves),
    norm("sums kept in float32", _K, "add_moments", moments_in_float32),
    norm("Σ d² missing", _K, "add_moments", without_sum(1)),
    norm("low part of the mean dropped", _V, "affine", mean_rounded),
    norm("low part of the mean dropped in the backward", _K, "slopes", mean_rounded),
    norm("γ forgotten", _V, "affine", without_weight(1)),
    norm("β forgotten", _V, "affine", without_weight(2)),
    norm("constant forgotten", _K, "normalize", with_row(_C.CONSTANT, 0, 1)),
    norm("slope forgotten in dx", _K, "combine", with_row(_C.SLOPE, 0, 2)),
    norm("level forgotten in dx", _K, "combine", with_row(_C.LEVEL, 0, 2)),
    norm("γ forgotten in the slopes of dx", _K, "slopes", without_weight(2)),
    norm("Σ g x̂ missing", _K, "add_products", without_sum(1)),
    narrow("taken for float16", channels, "stored", bits_of_float16),
    narrow("last bit of y lost", _K, "normalize", last_bit_lost),
    narrow("last bit of dx lost", _K, "combine", last_bit_lost),
    Mutant("compiled: numbers beyond float32 rounded to it", F.batch_norm, planted=without_limits),
]  # fmt: skip


# --- batch norm and ReLU -------------------------------------------------------------------------


def as_if_not_relu(at):
    return lambda loop: lambda *args: loop(*args[:at], False, *args[at + 1 :])


def distance_from_zero(normalize):
    def call(x, vectors, C, S, relu, y):
        normalize(x, vectors, C, S, False, y)
        if relu:
            np.abs(y, out=y)

    return call


def leaky(normalize):
    def call(x, vectors, C, S, relu, y):
        normalize(x, vectors, C, S, False, y)
        if relu:
            y[y < 0] *= 0.125

    return call


def relu(fault, attribute, change):
    return op("batch_norm_relu", fault, _K, attribute, change)


RELU = [
    relu("nothing cut off", "normalize", as_if_not_relu(4)),
    relu("leaky", "normalize", leaky),
    relu("|y| for max(y, 0)", "normalize", distance_from_zero),
    relu("all cotangents in the sums", "add_products", as_if_not_relu(5)),
    relu("all cotangents in dx", "combine", as_if_not_relu(5)),
    relu("cotangent passes by x̂, β apart, in the sums", "add_products", with_row(
        _C.CONSTANT, 0, 2)),
    relu("cotangent passes by x̂, β apart, in dx", "combine", with_row(_C.CONSTANT, 0, 2)),
    relu("γ forgotten in the slopes of dx", "slopes", without_weight(2)),
]  # fmt: skip


# --- convolution block ---------------------------------------------------------------------------


def block(fault, owner, attribute, change):
    return op("conv_block", fault, owner, attribute, change)


def deviations_within_parts_alone(merged):
    """Leave out how the means of the threads' parts differ."""

    def call(parts):
        mean, _ = merged(parts)
        squares = sum(np.maximum(two - one * one / n, 0) for n, _, one, two in parts)
        return mean, squares / sum(n for n, *_ in parts)

    return call


def parts_weighted_alike(merged):
    def call(parts):
        _, var = merged(parts)
        return np.mean([shift + one / n for n, shift, one, _ in parts], axis=0), var

    return call


def shifts_forgotten(merged):
    return lambda parts: merged([(n, shift * 0, *sums) for n, shift, *sums in parts])


def first_part_alone(merged):
    return lambda parts: merged(parts[:1])


def affine_without(at):
    return lambda activate: lambda *args: activate(*args[:at], None, *args[at + 1 :])


def without_last_chunk(chunks):
    return lambda self, share: chunks(self, share)[: max(1, len(chunks(self, share)) - 1)]


def without_last_entry(pool):
    def call(middle, entries, *args):
        pool(middle, max(1, entries - 1), *args)

    return call


def first_place_if_none(pool):
    """Say that the first entry won where nothing was above 0."""

    def call(*args):
        pool(*args)
        args[-2][args[-2] == 0] = 1

    return call


def next_place(pool):
    def call(*args):
        pool(*args)
        places, entries = args[-2], args[1]
        places[places > 0] = places[places > 0] % entries + 1

    return call


def smallest_for_largest(pool):
    def call(middle, entries, high, scale, constant, places, out):
        pool(middle, entries, high, -scale, constant, places, out)

    return call


def without_the_rest(add_sums):
    """Leave the last row, where pixels stand that no window covers, out of the sums."""

    def call(middle, shift, sums):
        add_sums(middle[: max(len(shift), len(middle) - len(shift))], shift, sums)

    return call


def rest_without_gradient(combine):
    def call(*args):
        combine(*args)
        entries, plane, gmiddle = args[3], args[0].shape[1], args[-1]
        gmiddle[:, entries * plane :] = 0

    return call


def winners_alone(combine):
    """Forget that every pixel has a part in the mean and the variance."""

    def call(g, places, middle, entries, high, scale, slope, constant, gmiddle):
        combine(g, places, middle, entries, high, scale, slope * 0, constant * 0, gmiddle)

    return call


def without_term(at):
    def change(combine):
        return lambda *args: combine(*args[:at], args[at] * 0, *args[at + 1 :])

    return change


def from_the_first_entry(fields):
    """Take the windows of all entries of a pool's window from where the first one's stand."""

    def call(view, kernel, pooled):
        for i, field in enumerate(fields(view, kernel, pooled)):
            yield field._replace(origin=0) if i < kernel[0] * kernel[1] else field

    return call


def not_cropped(add_back):
    """Cut the images out of the padded ones as if there were no padding."""

    def call(plan, columns, gx):
        view = plan.view
        if view.padding == (0, 0):
            return add_back(plan, columns, gx)
        padded = np.empty((len(gx), *view.padded, view.channels), gx.dtype)
        loop = conv_block_loops.add_back.of(gx.dtype)
        loop(columns, *plan.geometry, padded.reshape(len(gx), -1))
        h, w = view.size
        np.copyto(gx.transpose(view.axes), padded[:, :h, :w])

    return call


def kernel_flipped(through):
    def call(*args):
        gx, gkernel = through(*args)
        return gx, None if gkernel is None else gkernel[:, :, ::-1, ::-1].copy()

    return call


def offset_counted(vjp):
    """Give the offset the sum of the cotangents, as if no mean were taken off."""

    def call(g, x, kernel, offset_dtype, weight, var, kept, eps, needs):
        grads = list(vjp(g, x, kernel, offset_dtype, weight, var, kept, eps, needs))
        if needs[2]:
            high = kept.mean.astype(x.dtype)
            grads[2], _ = numba_conv_block._sums(kept.plan, g, kept.places, kept.middle, high)
        return tuple(grads)

    return call


_B, _L = numba_conv_block, conv_block_loops

BLOCK = [
    block("deviations within the threads' parts alone", _B, "_merged",
          deviations_within_parts_alone),
    block("parts of the mean weighted alike", _B, "_merged", parts_weighted_alike),
    block("shifts not added back", _B, "_merged", shifts_forgotten),
    block("statistics of the first part alone", _B, "_merged", first_part_alone),
    block("last images of a share left out", _B._Shares, "chunks", without_last_chunk),
    block("pixels that no window covers left out of the statistics", _L, "add_sums",
          without_the_rest),
    block("γ forgotten", _B, "_affine", affine_without(2)),
    block("β forgotten", _B, "_affine", affine_without(3)),
    block("last entry of a window never wins", _L, "pool", without_last_entry),
    block("smallest for largest", _L, "pool", smallest_for_largest),
    block("cotangent passes where nothing is above 0", _L, "pool", first_place_if_none),
    block("cotangent to the next entry", _L, "pool", next_place),
    block("mean and variance taken for constants", _L, "combine", winners_alone),
    block("slope forgotten", _L, "combine", without_term(6)),
    block("constant forgotten", _L, "combine", without_term(7)),
    block("pixels that no window covers take no gradient", _L, "combine", rest_without_gradient),
    block("Σ g x̂ about 0", _L, "add_pooled_sums", without_term(4)),
    block("Σ g x̂ missing", _L, "add_pooled_sums", without_sum(1)),
    block("windows of the pool's first entry for all", conv_block_plan, "_fields",
          from_the_first_entry),
    block("sums folded over channels that lie together", Plan, "folded", lambda folded: (
        lambda self, sums: sums.reshape(2, self.outputs, -1).sum(axis=2, dtype=np.float64))),
    block("vectors repeated value by value", Plan, "spread", lambda spread: (
        lambda self, vector, dtype: np.repeat(
            vector.astype(dtype), self.width // self.outputs))),
    block("padding not cropped off dx", _B, "_add_back", not_cropped),
    block("kernel's gradient flipped", _B, "_through", kernel_flipped),
    block("offset takes gradient", _B, "_vjp", offset_counted),
]  # fmt: skip


# --- memory that comes back ----------------------------------------------------------------------


def one_for_each_size(empty):
    """Hand the same memory out again whoever still holds it."""
    kept = {}

    def call(shape, dtype):
        key = shape, np.dtype(dtype)
        if key not in kept:
            kept[key] = np.empty(*key)
        return kept[key]

    return call


def back_with_the_array(empty):
    """Take memory back with the array that was handed out, though a view of it may live."""
    waiting = {}

    def call(shape, dtype):
        key = shape, np.dtype(dtype)
        block = waiting[key].pop() if waiting.get(key) else np.empty(*key)
        array = block.view()
        weakref.finalize(array, waiting.setdefault(key, []).append, block)
        return array

    return call


def from_scratch(empty):
    return lambda shape, dtype: threads.scratch("kept", shape, np.dtype(dtype))


def never_taken_off_the_list(empty):
    """Hand out what has come back, and leave it where the next one finds it."""
    waiting = {}

    class Owner(LentMemory):
        def __init__(self, block):
            self.block, self.__array_interface__ = block, block.__array_interface__

        def __del__(self):
            waiting.setdefault((self.block.shape, self.block.dtype), self.block)

    def call(shape, dtype):
        key = tuple(shape), np.dtype(dtype)
        return np.asarray(Owner(waiting[key] if key in waiting else np.empty(*key)))

    return call


def added_to_what_was_there(add_back):
    """Take fresh memory to be 0."""

    def call(columns, fields, taps, run, images):
        before = images.copy()
        add_back(columns, fields, taps, run, images)
        images += np.nan_to_num(before)

    return call


MEMORY = [
    block("memory handed out while it is held", memory, "empty", one_for_each_size),
    block("memory back while a view of it is held", memory, "empty", back_with_the_array),
    block("memory handed out twice when it has come back", memory, "empty",
          never_taken_off_the_list),
    block("results in scratch memory", memory, "empty", from_scratch),
    block("dx added to what memory held", _L, "add_back", added_to_what_was_there),
]  # fmt: skip

if not _HERE:
    NORM = RELU = BLOCK = MEMORY = []

RIGHT = (
    Mutant("the compiled kernels in small parts", F.batch_norm, planted=small_parts),
    Mutant("the compiled kernels of bfloat16", F.batch_norm, as_narrow, small_parts),
    Mutant("the compiled ReLU in small parts", REGISTRY["batch_norm_relu"],
           as_op("batch_norm_relu"), small_parts),
    Mutant("the convolution block in small parts", REGISTRY["conv_block"], as_op("conv_block"),
           small_parts),
) if _HERE else ()  # fmt: skip
