"""Reductions, ops that move entries, and indexing, with a fault in forward or rule."""

from itertools import accumulate, pairwise

import numpy as np

from tests.mutants.mutant import op_mutant as mutant
from tests.mutants.textbook import detached
from tinygrad_bn.autograd import sum_to_shape
from tinygrad_bn.ops.indexing import scatter_add, setitem
from tinygrad_bn.ops.reduction import count, kept_shape
from tinygrad_bn.ops.shape import broadcast_to, copy, flip


def spread(g, shape, axis):
    return broadcast_to(g.reshape(kept_shape(shape, axis)), shape=shape)


def share_of_the_largest(share):
    """Return the rule of a maximum, the cotangent multiplied by `share(chosen, axis)`."""

    def rule(g, out, x, axis):
        chosen = (x == out.reshape(kept_shape(x.shape, axis))).astype(g.dtype)
        return (share(chosen, axis) * g.reshape(kept_shape(x.shape, axis)),)

    return rule


def var_rule(centre=lambda x, axis: x.mean(axis=axis, keepdims=True), lost=0, factor=2.0):
    def rule(g, x, axis, correction):
        n = count(x.shape, axis)
        centred = x - centre(x, axis)
        return (g.reshape(kept_shape(x.shape, axis)) * (
            centred * (factor / (n - correction + lost))),)  # fmt: skip

    return rule


def split_off_by_one(g, arrays_shape, axis):
    axis %= g.ndim
    ends = list(accumulate(shape[axis] for shape in arrays_shape))
    before = (slice(None),) * axis
    first = g[(*before, slice(0, ends[0]))]
    rest = pairwise(ends)
    return (first, *(g[(*before, slice(i - 1, j - 1))] for i, j in rest))


def split_evenly(g, arrays_shape, axis):
    axis %= g.ndim
    before = (slice(None),) * axis
    return tuple(g[(*before, slice(0, shape[axis]))] for shape in arrays_shape)


def pad_rule(offset):
    def rule(g, x_shape, pad_width):
        starts = (offset(before, after) for before, after in pad_width)
        return (g[tuple(slice(i, i + n) for i, n in zip(starts, x_shape, strict=True))],)

    return rule


def put(g, x_shape, index):
    """Write the cotangent where it came from: the last of repeated entries wins."""
    return setitem(np.zeros(x_shape, g.dtype), g, index=index)


def repetitions(x_shape, index):
    """Return how often an index names each entry, at least 1."""
    times = np.zeros(x_shape)
    np.add.at(times, index, 1)
    return np.maximum(times, 1)


def overwritten(x, *, index, shape):
    out = np.zeros(shape, x.dtype)
    out[index] = x
    return out


def written(x, value, *, index):
    if not x.flags.writeable:
        x = x.copy()
    x[index] = value
    return x


def first_repetition(g, x_shape):
    """Return the cotangent of the first repetition, for the sum over all."""
    extra = g.ndim - len(x_shape)
    index = [0] * extra + [slice(n) for n in x_shape]
    return copy(g[tuple(index)])


def only_the_first(shape):
    first = np.zeros(shape)
    first[(0,) * len(shape)] = 1
    return first


def one_pass(x, *, axis=None, correction=0, keepdims=False):
    x32, n = x.astype("float32"), count(x.shape, axis)
    mean = x32.mean(axis=axis, keepdims=keepdims)
    squares = (x32 * x32).mean(axis=axis, keepdims=keepdims)
    return ((squares - mean * mean) * (n / (n - correction))).astype(x.dtype)


def inverse_of_negative_axes_wrong(g, axes):
    if axes is None:
        return (g.transpose(),)
    return (g.transpose(tuple(sorted(range(len(axes)), key=lambda i: axes[i]))),)


def aliasing(x):
    return x if x.flags.writeable else x.copy()


SHAPES = [
    mutant("sum", "rule of the mean", rule=lambda g, x_shape, axis: (
        spread(g, x_shape, axis) / count(x_shape, axis),)),
    mutant("sum", "cotangent reaches the first entry alone", rule=lambda g, x_shape, axis: (
        spread(g, x_shape, axis) * only_the_first(x_shape),)),
    mutant("mean", "rule of the sum", rule=lambda g, x_shape, axis: (spread(g, x_shape, axis),)),
    mutant("mean", "divided by n - 1", rule=lambda g, x_shape, axis: (
        spread(g, x_shape, axis) / max(count(x_shape, axis) - 1, 1),)),
    mutant("mean", "divided by the size of the first axis", rule=lambda g, x_shape, axis: (
        spread(g, x_shape, axis) / max((*x_shape, 1)[0], 1),)),
    mutant("mean", "forward divided by n - 1", forward=lambda x, *, axis=None, keepdims=False: (
        x.sum(axis=axis, keepdims=keepdims) / max(count(x.shape, axis) - 1, 1))),
    mutant("max", "cotangent to every entry", rule=share_of_the_largest(
        lambda chosen, axis: chosen * 0 + 1)),
    mutant("max", "cotangent to the smallest", rule=lambda g, x, axis: (
        (x == x.min(axis=axis, keepdims=True)).astype(g.dtype)
        * g.reshape(kept_shape(x.shape, axis)),)),
    mutant("max", "cotangent divided by the count", rule=share_of_the_largest(
        lambda chosen, axis: chosen / count(chosen.shape, axis))),
    mutant("max", "largest of all, not along the axis", rule=lambda g, x, axis: (
        (x == x.max()).astype(g.dtype) * g.reshape(kept_shape(x.shape, axis)),)),
    mutant("min", "wrong sign", rule=share_of_the_largest(lambda chosen, axis: -chosen)),
    mutant("var", "correction ignored in the rule", rule=lambda g, x, axis: var_rule()(
        g, x, axis, 0)),
    mutant("var", "n - 1 always", rule=lambda g, x, axis: var_rule()(g, x, axis, 1)),
    mutant("var", "2 missing", rule=var_rule(factor=1.0)),
    mutant("var", "not centred", rule=var_rule(centre=lambda x, axis: 0.0)),
    mutant("var", "mean frozen (second order)", rule=var_rule(
        centre=lambda x, axis: detached(x).mean(axis=axis, keepdims=True))),
    mutant("var", "E[x²] - E[x]² in float32", forward=one_pass),
    mutant("reshape", "cotangent in Fortran order", x=lambda g, x_shape: (
        g.transpose().reshape(x_shape[::-1]).transpose())),
    mutant("reshape", "takes memory order for C order", forward=lambda x, *, shape: (
        np.ravel(x, order="K").reshape(shape))),
    mutant("transpose", "axes for their inverse", rule=lambda g, axes: (g.transpose(axes),)),
    mutant("transpose", "inverse of negative axes wrong", rule=inverse_of_negative_axes_wrong),
    mutant("broadcast_to", "not summed: the first repetition's cotangent", x=lambda g, x_shape: (
        first_repetition(g, x_shape))),
    mutant("broadcast_to", "averaged, not summed", x=lambda g, x_shape: (
        sum_to_shape(g, x_shape) * (max(np.prod(x_shape, dtype=int), 1) / g.size))),
    mutant("concatenate", "split off by one", rule=split_off_by_one),
    mutant("concatenate", "every part is the first", rule=split_evenly),
    mutant("stack", "parts reversed", rule=lambda g, arrays_shape, axis: tuple(
        g[(*(slice(None),) * (axis % g.ndim), i)] for i in reversed(range(len(arrays_shape))))),
    mutant("stack", "split along axis 0 whatever is asked", rule=lambda g, arrays_shape: tuple(
        g[i].reshape(shape) for i, shape in enumerate(arrays_shape))),
    mutant("pad", "offset forgotten", rule=pad_rule(lambda before, after: 0)),
    mutant("pad", "before and after swapped", rule=pad_rule(lambda before, after: after)),
    mutant("astype", "gradient halved", x=lambda g: g * 0.5),
    mutant("copy", "no copy", forward=aliasing),
    mutant("copy", "no gradient", x=lambda g: None),
    mutant("flip", "cotangent not flipped back", x=lambda g: copy(g)),
    mutant("flip", "cotangent flipped along all axes", x=lambda g: flip(g)),
    mutant("getitem", "repeated entries overwritten, not added", x=lambda g, x_shape, index: (
        put(g, x_shape, index))),
    mutant("getitem", "cotangent divided among repetitions", x=lambda g, x_shape, index: (
        scatter_add(g, index=index, shape=x_shape) / repetitions(x_shape, index))),
    mutant("getitem", "cotangent to another place", x=lambda g, x_shape, index: flip(
        scatter_add(g, index=index, shape=x_shape), axis=0)),
    mutant("scatter_add", "repeated entries overwritten, not added",
           forward=overwritten),
    mutant("setitem", "overwritten entries keep their gradient", x=lambda g: copy(g)),
    mutant("setitem", "value gets the whole cotangent, reversed", value=lambda g, index: (
        flip(copy(g[index])))),
    mutant("setitem", "writes into x", forward=written),
]  # fmt: skip
