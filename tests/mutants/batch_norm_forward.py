"""Batch norms that compute something else forward: statistics, axes, precision, layout, aliasing.

Unless said otherwise the backward belongs to the right batch norm, as when someone "improves" the
forward alone; "consistent" ones differentiate what they compute, so that no difference quotient
objects to them.
"""

import math

import numpy as np

from tests.mutants.mutant import batch_norm_mutant as mutant
from tests.mutants.mutant import wrapped
from tests.mutants.textbook import BATCH, textbook
from tinygrad_bn.ops.elementwise import sqrt
from tinygrad_bn.tape import TensorBase

RIGHT = textbook()


def in_dtype(dtype):
    """Return the formulas of a forward that does all its sums in `dtype`, without a shift."""
    return {
        "wide": lambda p: p.x.astype(dtype),
        "mean": lambda p: p.average(p.wide),
    }


def folded(p):
    """Return y = x · scale + offset in x's dtype, as a layer folded for speed computes it."""
    scale = (p.gamma * p.s).astype(p.x.dtype)
    return p.x * scale + (p.beta - p.mean * p.gamma * p.s).astype(p.x.dtype)


def expected_squares(p):
    mean = p.average(p.wide)
    return p.average(p.wide * p.wide) - mean * mean


def one_by_one(p):
    """Return the mean in x's dtype, added up entry by entry as a loop would."""
    rows = np.moveaxis(p.x, p.axis, range(len(p.axis))).reshape(*(p.x.shape[a] for a in p.axis), -1)
    return p.along(np.cumsum(rows, axis=-1, dtype=p.x.dtype)[..., -1] / p.x.dtype.type(p.m))


def by_matrix_product(p):
    """Return the mean as a product with a channel indicator: 0 · NaN is NaN."""
    kept = [p.x.shape[a] for a in p.axis]
    rows = np.moveaxis(p.wide, p.axis, range(-len(kept), 0)).reshape(-1, math.prod(kept))
    indicator = np.eye(rows.shape[1])
    shift = np.nan_to_num(rows[:1])
    return p.along((shift + ((rows - shift) @ indicator).sum(axis=0) / p.m).reshape(kept))


def in_memory_order(a):
    """Return what `a` would be if its memory were in C order."""
    return np.ravel(a, order="K").reshape(a.shape) if isinstance(a, np.ndarray) else a


def needing_contiguous(p):
    if not p.x.flags.c_contiguous:
        raise ValueError("x must be contiguous")
    return p.x.astype("float64")


def over_the_batch_alone(p):
    return tuple(i for i in range(p.x.ndim) if i not in p.axis)[:1]


def into_x(p):
    y = BATCH["y"](p)
    if p.x.flags.writeable:
        p.x[...] = y
        return p.x
    return y


_BUFFERS = {}


def into_a_kept_buffer(p):
    y = BATCH["y"](p)
    buffer = _BUFFERS.setdefault((y.shape, y.dtype), np.empty_like(y))
    buffer[...] = y
    return buffer


def consistent(name, **formulas):
    return mutant(f"{name} (consistent)", both=formulas)


# --- wrappers around the right one ---------------------------------------------------------------


@wrapped(RIGHT)
def channels_on_axis_one_whatever_is_asked(batch_norm, x, *args, axis=1, **options):
    ndim = x.ndim
    if axis == 1 or ndim < 3 or x.shape[1] != x.shape[axis]:
        return batch_norm(x, *args, axis=axis, **options)
    return batch_norm(x, *args, axis=1, **options)


@wrapped(RIGHT)
def off_the_graph(batch_norm, x, *args, **options):
    y = batch_norm(x, *args, **options)
    return y.detach() if isinstance(y, TensorBase) else y


@wrapped(RIGHT)
def widening(batch_norm, x, *args, **options):
    return batch_norm(x, *args, **options) * np.float64(1.0)


@wrapped(RIGHT)
def without_bias_where_there_is_no_weight(batch_norm, x, mean=None, var=None, weight=None,
                                          bias=None, *args, **options):  # fmt: skip
    return batch_norm(x, mean, var, weight, bias if weight is not None else None, *args, **options)


FORWARD = [
    mutant("variance of m - 1 values", forward={
        "var": lambda p: BATCH["var"](p) * (p.m / (p.m - 1))}),
    consistent("variance of m - 1 values", s=lambda p: 1 / sqrt(
        p.var * (p.m / (p.m - 1)) + p.eps)),
    mutant("ε forgotten", forward={"s": lambda p: 1 / sqrt(p.var)}),
    mutant("ε doubled", forward={"s": lambda p: 1 / sqrt(p.var + 2 * p.eps)}),
    mutant("ε outside the root", forward={"s": lambda p: 1 / (sqrt(p.var) + p.eps)}),
    mutant("ε squared", forward={"s": lambda p: 1 / sqrt(p.var + p.eps * p.eps)}),
    mutant("ε as a floor under the variance", forward={
        "s": lambda p: 1 / sqrt(np.maximum(p.var, p.eps))}),
    consistent("ε always 1e-5", s=lambda p: 1 / sqrt(p.var + 1e-5)),
    mutant("divided by the variance", forward={"s": lambda p: 1 / (p.var + p.eps)}),
    mutant("not centred", forward={"x_hat": lambda p: p.wide * p.s}),
    mutant("β before γ: γ (x̂ + β)", both={
        "y": lambda p: ((p.x_hat + p.beta) * p.gamma).astype(p.x.dtype)}),
    mutant("1 + γ for γ", forward={
        "y": lambda p: (p.x_hat * (p.gamma + 1) + p.beta).astype(p.x.dtype)}),
    mutant("reduces the batch axis alone (consistent)", both={"reduced": over_the_batch_alone,
        "m": lambda p: p.x.shape[p.reduced[0]],
        "per_channel": lambda p: lambda a: a.sum(axis=tuple(
            i for i in range(p.x.ndim) if i not in p.axis))}),
    mutant("statistics over channels too (consistent)", both={
        "mean": lambda p: p.wide.mean(), "var": lambda p: ((p.wide - p.mean) ** 2).mean()}),
    mutant("channels on axis 1 whatever is asked, where sizes allow",
           candidate=channels_on_axis_one_whatever_is_asked),
    mutant("E[x²] - E[x]² in float64", forward={"var": expected_squares}),
    mutant("E[x²] - E[x]² in float32", forward={**in_dtype("float32"), "var": expected_squares}),
    mutant("two passes in x's own dtype", forward={
        "wide": lambda p: p.x, "mean": lambda p: p.average(p.x)}),
    mutant("two passes in float32", forward=in_dtype("float32")),
    mutant("two passes in float16", forward=in_dtype("float16")),
    mutant("mean added up one by one in x's dtype: a constant channel gives ±1", forward={
        "mean": one_by_one}),
    mutant("statistics rounded to x's dtype", forward={
        name: lambda p, name=name: BATCH[name](p).astype(p.x.dtype) for name in ("mean", "var")}),
    mutant("NaN of one channel spreads to the others", forward={"mean": by_matrix_product}),
    mutant("NaN is taken for 0", forward={"wide": lambda p: np.nan_to_num(
        p.x.astype("float64"), posinf=np.inf, neginf=-np.inf)}),
    mutant("an infinity is taken for 0", forward={"wide": lambda p: np.nan_to_num(
        p.x.astype("float64"), nan=np.nan, posinf=0.0, neginf=0.0)}),
    mutant("takes memory order for C order", forward={
        "wide": lambda p: in_memory_order(p.x).astype("float64")}),
    mutant("takes the cotangent's memory order for C order", both={
        "g": lambda p: in_memory_order(p.cotangent).astype("float64")}),
    mutant("works for contiguous x only", forward={"wide": needing_contiguous}),
    mutant("y is float64 whatever x is", forward={"y": lambda p: p.x_hat * p.gamma + p.beta},
           given={"y": lambda p: p.x_hat * p.gamma + p.beta}),
    mutant("y has the dtype of the weight", forward={
        "y": lambda p: (p.x_hat * p.gamma + p.beta).astype((p.x if p.weight is None
                                                            else p.weight).dtype)}),
    mutant("y times a NumPy scalar", candidate=widening),
    mutant("y is written into x", forward={"y": into_x}),
    mutant("y is handed out in a buffer that is kept", forward={"y": into_a_kept_buffer}),
    mutant("y is taken off the graph", candidate=off_the_graph),
    mutant("β is left out where there is no γ", candidate=without_bias_where_there_is_no_weight),
    mutant("evaluation: ε forgotten", given={"s": lambda p: 1 / sqrt(p.var)}),
    mutant("evaluation: running variance taken for a deviation", given={
        "s": lambda p: 1 / (p.var + p.eps)}),
    mutant("evaluation: γ and β forgotten", given={"y": lambda p: p.x_hat.astype(p.x.dtype)}),
    mutant("y is x · scale + offset in x's dtype", forward={"y": folded}),
    mutant("evaluation: y is x · scale + offset in x's dtype", given={"y": folded}),
]  # fmt: skip
