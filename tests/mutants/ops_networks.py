"""Matrix products, convolution, pooling and losses with a fault in forward or rule."""

import numpy as np

from tests.mutants.mutant import op_mutant as mutant
from tests.mutants.textbook import detached
from tinygrad_bn.backend import saving
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.ops.convolution import conv2d_input_grad, conv2d_weight_grad
from tinygrad_bn.ops.elementwise import exp
from tinygrad_bn.ops.linalg import matmul
from tinygrad_bn.ops.loss import log_softmax
from tinygrad_bn.ops.pooling import avg_pool2d_input_grad, scatter_windows
from tinygrad_bn.ops.reduction import kept_shape
from tinygrad_bn.ops.reduction import sum as sum_

_RIGHT_CONV = REGISTRY["conv2d"].forward
_RIGHT_MAX_POOL = REGISTRY["max_pool2d"].forward
_RIGHT_AVG_POOL = REGISTRY["avg_pool2d"].forward


def swapped(x):
    """Return a stack of matrices, each transposed."""
    return x.transpose((*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def as_square(gx, x_shape):
    """Return a product of the wrong shape reshaped until it fits, as one does in a hurry."""
    return gx.reshape(x_shape) if gx.size == np.prod(x_shape, dtype=int) else None


def matmul_without_transpose(g, x_shape, y):
    if y.ndim < 2 or g.ndim < 2:
        return None
    return as_square(matmul(g, y.reshape((*y.shape[:-2], y.shape[-1], y.shape[-2]))), x_shape)


def conv_rules(**changes):
    """Return the rules of `conv2d` with the options of their windows changed."""

    def seen(view):
        return view._replace(**{name: new(view) for name, new in changes.items()})

    return {
        "x": lambda g, weight, view: conv2d_input_grad(g, weight, view=seen(view)),
        "weight": lambda g, x, view: conv2d_weight_grad(x, g, view=seen(view)),
    }


def conv_of(change):
    """Return `conv2d` of other images or weights: `change(x, weight, options)` gives both."""

    def conv2d(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1, layout="NCHW"):
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        options |= {"groups": groups, "layout": layout}
        return _RIGHT_CONV(*change(x, weight, options), bias, **options)

    return conv2d


def channels_not_grouped(x, weight, options):
    """Give each group every G-th channel instead of neighbours."""
    channels = 3 if options["layout"] == "NHWC" else 1
    order = np.arange(x.shape[channels]).reshape(-1, options["groups"]).T.ravel()
    return np.take(x, order, axis=channels), weight


def flipped(x, weight, options):
    return x, weight[:, :, ::-1, ::-1]


def max_pool_of(change):
    def max_pool2d(x, *, kernel_size, stride=None, padding=0, layout="NCHW"):
        return _RIGHT_MAX_POOL(
            change(x), kernel_size=kernel_size, stride=stride, padding=padding, layout=layout
        )

    return max_pool2d


def places_from_the_end(x, *, kernel_size, stride=None, padding=0, layout="NCHW"):
    """Count the place from the other end of the window."""
    result = _RIGHT_MAX_POOL(
        x, kernel_size=kernel_size, stride=stride, padding=padding, layout=layout
    )
    view = result.residuals["view"]
    last = view.kernel[0] * view.kernel[1] - 1
    return saving(result.out, places=(last - result.residuals["places"]), view=view)


def avg_pool_times(factor):
    def avg_pool2d(
        x, *, kernel_size, stride=None, padding=0, layout="NCHW", count_include_pad=True
    ):
        result = _RIGHT_AVG_POOL(
            x, kernel_size=kernel_size, stride=stride, padding=padding, layout=layout,
            count_include_pad=count_include_pad,
        )  # fmt: skip
        view = result.residuals["view"]
        return saving((result.out * factor(view)).astype(x.dtype), view=view)

    return avg_pool2d


def cross_entropy_rule(logits_term, target_term=lambda logs: -logs):
    """Return a rule for probabilities: `logits_term(p, target, Σ target)`, and the mean over n."""

    def rule(g, logits, target, reduction):
        logs = log_softmax(logits, axis=1)
        shape = logits.shape
        if reduction == "mean":
            g = g / (logits.size // shape[1])
        g = g.reshape((shape[0], 1, *shape[2:]) if reduction == "none" else (1,) * len(shape))
        total = target.sum(axis=1, keepdims=True)
        return logits_term(exp(logs), target, total) * g, target_term(logs) * g

    return rule


def unaveraged(g, logits, target, reduction):
    right = cross_entropy_rule(lambda p, t, total: p * total - t)
    gs = right(g, logits, target, reduction)
    return tuple(a * (logits.shape[0] if reduction == "mean" else 1) for a in gs)


NETWORKS = [
    mutant("matmul", "y not transposed in the gradient of x", x=matmul_without_transpose),
    mutant("matmul", "gradient of x missing", x=lambda g: None),
    mutant("matmul", "gradient of y halved", y=lambda g, x, y: REGISTRY["matmul"].rules[1].function(
        g, x, y) * 0.5),
    mutant("matmul", "x frozen (second order)", y=lambda g, x, y: (
        REGISTRY["matmul"].rules[1].function(g, detached(x), y))),
    mutant("matmul", "computed in float32", forward=lambda x, y: np.asarray(
        x.astype("float32") @ y.astype("float32")).astype(np.result_type(x, y))),
    mutant("conv2d", "kernel flipped forward", forward=conv_of(flipped)),
    mutant("conv2d", "kernel flipped in the gradient of x", x=lambda g, weight, view: (
        conv2d_input_grad(g, weight[:, :, ::-1, ::-1], view=view))),
    mutant("conv2d", "kernel flipped in the gradient of the weight", weight=lambda g, x, view: (
        conv2d_weight_grad(x, g, view=view)[:, :, ::-1, ::-1])),
    mutant("conv2d", "stride ignored in the rules", **conv_rules(stride=lambda view: (1, 1))),
    mutant("conv2d", "the smaller stride for both in the rules", **conv_rules(
        stride=lambda view: (min(view.stride),) * 2)),
    mutant("conv2d", "dilation ignored in the rules", **conv_rules(dilation=lambda view: (1, 1))),
    mutant("conv2d", "padding not cropped off the gradient", x=lambda g, weight, view: (
        conv2d_input_grad(g, weight, view=view._replace(padding=(0, 0))))),
    mutant("conv2d", "groups dealt out in turn", forward=conv_of(channels_not_grouped)),
    mutant("conv2d", "bias gradient averaged", bias=lambda g, layout: sum_(
        g, axis=(0, 1, 2) if layout == "NHWC" else (0, 2, 3)) / g.shape[0]),
    mutant("conv2d", "bias gradient summed for NCHW always", bias=lambda g: sum_(
        g, axis=(0, 2, 3))),
    mutant("conv2d", "weight frozen (second order)", x=lambda g, weight, view: conv2d_input_grad(
        g, detached(weight), view=view)),
    mutant("conv2d_input_grad", "y frozen (second order)", weight=lambda g, y, view: (
        conv2d_weight_grad(g, detached(y) * 0.5, view=view))),
    mutant("max_pool2d", "cotangent to the last place", forward=places_from_the_end),
    mutant("max_pool2d", "cotangent spread evenly", rule=lambda g, view: (
        avg_pool2d_input_grad(g, view=view),)),
    mutant("max_pool2d", "smallest for largest", forward=max_pool_of(lambda x: -x)),
    mutant("max_pool2d", "overlapping windows averaged", rule=lambda g, places, view: (
        scatter_windows(g, places, view=view) / max(1, view.kernel[0] // view.stride[0]),)),
    mutant("avg_pool2d", "sum for mean", forward=avg_pool_times(
        lambda view: view.kernel[0] * view.kernel[1])),
    mutant("avg_pool2d", "rule counts the padding always", rule=lambda g, view: (
        avg_pool2d_input_grad(g, view=view, count_include_pad=True),)),
    mutant("avg_pool2d", "rule never counts the padding", rule=lambda g, view: (
        avg_pool2d_input_grad(g, view=view, count_include_pad=False),)),
    mutant("softmax", "sum term missing", rule=lambda g, out: (out * g,)),
    mutant("softmax", "sum term over all axes", rule=lambda g, out: (
        out * (g - (g * out).sum()),)),
    mutant("softmax", "derivative of a sigmoid", rule=lambda g, out: (g * out * (1 - out),)),
    mutant("softmax", "output frozen (second order)", rule=lambda g, out, axis: (
        detached(out) * (g - (g * detached(out)).sum(axis=axis, keepdims=True)),)),
    mutant("softmax", "over the last axis whatever is asked", forward=lambda x, *, axis=-1: (
        REGISTRY["softmax"].forward(x, axis=-1))),
    mutant("softmax", "overflows: largest not subtracted", forward=lambda x, *, axis=-1: (
        np.exp(x.astype("float16")) / np.exp(x.astype("float16")).sum(
            axis=axis, keepdims=True)).astype(x.dtype)),
    mutant("log_softmax", "softmax missing in the rule", rule=lambda g, out, axis: (
        g - g.sum(axis=axis, keepdims=True),)),
    mutant("log_softmax", "sum term missing", rule=lambda g, out: (g - exp(out),)),
    mutant("log_softmax", "output for its exponential", rule=lambda g, out, axis: (
        g - out * g.sum(axis=axis, keepdims=True),)),
    mutant("log_softmax", "softmax frozen (second order)", rule=lambda g, out, axis: (
        g - exp(detached(out)) * g.sum(axis=axis, keepdims=True),)),
    mutant("logsumexp", "cotangent to every entry alike", rule=lambda g, x_shape, axis: (
        g.reshape(kept_shape(x_shape, axis)) + np.zeros(x_shape),)),
    mutant("logsumexp", "output frozen (second order)", rule=lambda g, out, x, axis: (
        g.reshape(kept_shape(x.shape, axis))
        * exp(x - detached(out).reshape(kept_shape(x.shape, axis))),)),
    mutant("cross_entropy", "gradient not averaged", rule=unaveraged),
    mutant("cross_entropy", "target taken to sum to 1", rule=cross_entropy_rule(
        lambda p, t, total: p - t)),
    mutant("cross_entropy", "wrong sign", rule=cross_entropy_rule(
        lambda p, t, total: t - p * total)),
    mutant("cross_entropy", "probabilities for log-probabilities to the target",
           rule=cross_entropy_rule(lambda p, t, total: p * total - t, lambda logs: -exp(logs))),
    mutant("cross_entropy", "probabilities frozen (second order)", rule=cross_entropy_rule(
        lambda p, t, total: detached(p) * total - t)),
]  # fmt: skip
