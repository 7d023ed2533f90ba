"""Group and instance norm with a fault in the axes, the vectors or the running statistics.

Group norm stands against the formula in NumPy. Instance norm is batch norm with a ghost batch for
each sample, so the verifier of batch norms finds out what is wrong with it.
"""

import math

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.textbook import made, raw
from tests.mutants.verifiers import against
from tinygrad_bn import functional as F
from tinygrad_bn import layer_normalization
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.normalization import BatchStatistics
from tinygrad_bn.ops import normalization as ops

# --- group norm ----------------------------------------------------------------------------------


def group_norm_of_arrays(x, weight=None, bias=None, *, num_groups, axis, eps):
    """Return the formula's group norm of an array, in its dtype."""
    laid = np.moveaxis(x, axis, 1)
    samples, channels = laid.shape[:2]
    rows = laid.reshape(samples, num_groups, -1)
    apart = rows - rows.mean(axis=2, keepdims=True)
    rows = apart / np.sqrt((apart * apart).mean(axis=2, keepdims=True) + eps)
    vector = (channels,) + (1,) * (x.ndim - 2)
    y = rows.reshape(laid.shape)
    y = y if weight is None else y * weight.reshape(vector)
    y = y if bias is None else y + bias.reshape(vector)
    return np.moveaxis(y, 1, axis)


#: What is drawn for it.
_GROUP_NORM = made(
    group_norm_of_arrays,
    lambda g: (g,),
    domain=Domain(
        inputs=(Real(), Real(), Real()),
        cases=(
            case((2, 6, 3), (6,), (6,), num_groups=3, axis=1, eps=1e-3),
            case((2, 3, 4), (4,), None, num_groups=2, axis=2, eps=1e-2),
            case((3, 4, 2, 2), None, (4,), num_groups=2, axis=1, eps=1e-3),
            case((2, 2, 2, 6), (6,), (6,), num_groups=2, axis=3, eps=1e-5),
        ),
    ),
)
as_group_norm = against(group_norm_of_arrays, _GROUP_NORM)


def right_group_norm(x, weight=None, bias=None, *, num_groups, axis, eps):
    return F.group_norm(x, num_groups, weight, bias, eps, axis=axis)


def group_norm(fault, change):
    """Return a mutant: `change(x, weight, bias, num_groups, axis, eps)` is group norm instead."""

    def group_norm(x, weight=None, bias=None, *, num_groups, axis, eps):
        return change(x, weight, bias, num_groups, axis, eps)

    return Mutant(f"group norm: {fault}", group_norm, as_group_norm)


def dealt_out(x, weight, bias, num_groups, axis, eps):
    """Give each group every G-th channel."""
    order = np.arange(x.shape[axis]).reshape(-1, num_groups).T.ravel()
    taken = (slice(None),) * axis
    vectors = [None if v is None else v[order] for v in (weight, bias)]
    y = F.group_norm(x[(*taken, order)], num_groups, *vectors, eps, axis=axis)
    return y[(*taken, np.argsort(order))]


def each_position(x, weight, bias, num_groups, axis, eps):
    """Normalize the channels of each place by themselves, not over the places."""
    laid = x.transpose((0, *(i for i in range(1, x.ndim) if i != axis), axis))
    rows = laid.reshape((-1, x.shape[axis]))
    y = F.group_norm(rows, num_groups, weight, bias, eps).reshape(laid.shape)
    return y.transpose(tuple(int(i) for i in np.argsort((
        0, *(i for i in range(1, x.ndim) if i != axis), axis))))  # fmt: skip


def weight_of_the_first(x, weight, bias, num_groups, axis, eps):
    """Take the first γ of a group for all of it."""
    if weight is not None:
        weight = weight[np.repeat(np.arange(num_groups), x.shape[axis] // num_groups)]
    return F.group_norm(x, num_groups, weight, bias, eps, axis=axis)


def with_the_batch(x, weight, bias, num_groups, axis, eps):
    """Take the statistics over all samples."""
    laid = x.transpose((axis, *(i for i in range(x.ndim) if i != axis)))
    y = F.layer_norm(laid.reshape((num_groups, -1)), laid.size // num_groups, eps=eps)
    y = y.reshape(laid.shape)
    vector = (x.shape[axis],) + (1,) * (x.ndim - 1)
    y = y if weight is None else y * weight.reshape(vector)
    y = y if bias is None else y + bias.reshape(vector)
    return y.transpose((*range(1, axis + 1), 0, *range(axis + 1, x.ndim)))


def backwards(vector):
    return None if vector is None else vector[::-1]


GROUP_NORM = [
    group_norm("groups of every G-th channel", dealt_out),
    group_norm("channels per group for the number of groups", lambda x, w, b, groups, axis, eps: (
        F.group_norm(x, x.shape[axis] // groups, w, b, eps, axis=axis))),
    group_norm("one group for all channels", lambda x, w, b, groups, axis, eps: (
        F.group_norm(x, 1, w, b, eps, axis=axis))),
    group_norm("a group for each channel", lambda x, w, b, groups, axis, eps: (
        F.instance_norm(x, weight=w, bias=b, eps=eps, axis=axis))),
    group_norm("each place by itself", each_position),
    group_norm("statistics of the whole batch", with_the_batch),
    group_norm("γ of a group's first channel", weight_of_the_first),
    group_norm("channels of β in reverse", lambda x, w, b, groups, axis, eps: (
        F.group_norm(x, groups, w, backwards(b), eps, axis=axis))),
    group_norm("ε always 1e-5", lambda x, w, b, groups, axis, eps: (
        F.group_norm(x, groups, w, b, 1e-5, axis=axis))),
]  # fmt: skip


# --- instance norm -------------------------------------------------------------------------------


def as_ghost_batches(instance_norm):
    """Return a batch norm that is made of an instance norm: each group is a sample of it."""

    def batch_norm(
        x,
        running_mean=None,
        running_var=None,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
        *,
        axis=1,
        groups=1,
    ):
        axis %= x.ndim
        groups = groups if training or running_mean is None else 1
        order = (axis, *(i for i in range(x.ndim) if i != axis))
        laid = x.transpose(order)
        channels = x.shape[axis]
        sizes = (channels, groups, math.prod(laid.shape[1:]) // groups)
        y = instance_norm(
            laid.reshape(sizes).transpose((1, 0, 2)),
            running_mean,
            running_var,
            weight,
            bias,
            training or running_mean is None,
            momentum,
            eps,
        )
        back = tuple(int(i) for i in np.argsort(order))
        return y.transpose((1, 0, 2)).reshape(laid.shape).transpose(back)

    return batch_norm


def moving(change):
    """Return a mutant's planting: `change(found)` moves the running statistics instead."""
    right = layer_normalization.instance_norm_and_statistics

    def found(*args, **options):
        y, statistics = right(*args, **options)
        return y, change(statistics)

    return lambda: replaced((layer_normalization, "instance_norm_and_statistics", found))


def instance_norm(fault, candidate=None, planted=None):
    wrong = as_ghost_batches(F.instance_norm if candidate is None else candidate)
    return Mutant(f"instance norm: {fault}", wrong, **({"planted": planted} if planted else {}))


def one_by_one(found):
    """Make one running step for each sample."""

    class Steps(BatchStatistics):
        def move(self, *args):
            for i in range(self.groups):
                BatchStatistics(self.mean[i], self.var[i], self.count).move(*args)

    return Steps(*found)


def of_a_sample(i):
    return lambda found: BatchStatistics(found.mean[i], found.var[i], found.count)


def of_the_whole_batch(found):
    mean = found.mean.mean(axis=0)
    var = (found.var + (found.mean - mean) ** 2).mean(axis=0)
    return BatchStatistics(mean, var, found.count)


def with_other_options(change):
    """Return `F.instance_norm` of other arguments."""

    def candidate(x, mean, var, weight, bias, by_the_input, momentum, eps):
        given = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
        given |= {"use_input_stats": by_the_input, "momentum": momentum, "eps": eps}
        return F.instance_norm(x, **given | change(x, given))

    return candidate


def over_all_channels(x, mean, var, weight, bias, by_the_input, momentum, eps):
    y = F.instance_norm(x, mean, var, weight, bias, by_the_input, momentum, eps)
    if not by_the_input or x.size == 0:
        return y
    z = ops.layer_norm(x, None, None, axis=(0,), channels=(1,), eps=eps)
    z = z if weight is None else z * weight.reshape((-1, 1))
    return z if bias is None else z + bias.reshape((-1, 1))


def over_the_batch(x, mean, var, weight, bias, by_the_input, momentum, eps):
    return F.batch_norm(x, mean, var, weight, bias, by_the_input, momentum, eps)


def evaluating_by_the_input(x, given):
    return {} if raw(x).shape[2] == 1 else {"use_input_stats": True, "momentum": (
        given["momentum"] if given["use_input_stats"] else 0.0)}  # fmt: skip


INSTANCE_NORM = [
    instance_norm("over the batch, as batch norm", over_the_batch),
    instance_norm("over all channels, as layer norm", over_all_channels),
    instance_norm("evaluation by the input", with_other_options(evaluating_by_the_input)),
    instance_norm("momentum weights the old value", with_other_options(lambda x, given: {
        "momentum": 1 - given["momentum"]})),
    instance_norm("running statistics never moved", with_other_options(lambda x, given: {
        "momentum": 0.0})),
    instance_norm("running step for each sample", planted=moving(one_by_one)),
    instance_norm("running statistics of the first sample", planted=moving(of_a_sample(0))),
    instance_norm("running statistics of the last sample", planted=moving(of_a_sample(-1))),
    instance_norm("running variance of the whole batch", planted=moving(of_the_whole_batch)),
    instance_norm("running variance biased", planted=moving(lambda found: found._replace(
        var=found.var * ((found.count - 1) / max(found.count, 1))))),
    instance_norm("deviations averaged, not variances", planted=moving(
        lambda found: BatchStatistics(
            found.mean.mean(axis=0), np.sqrt(found.var).mean(axis=0) ** 2, found.count))),
]  # fmt: skip

PER_SAMPLE = [*GROUP_NORM, *INSTANCE_NORM]

RIGHT = (
    Mutant("F.group_norm", right_group_norm, as_group_norm),
    Mutant("F.instance_norm", as_ghost_batches(F.instance_norm)),
)
