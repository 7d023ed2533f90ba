"""Ops with right rules, and with mistakes planted in them that people really make.

They are made without registering them: the registry is walked by other tests.
"""

import numpy as np

from tinygrad_bn.backend import array_module, saving
from tinygrad_bn.op import Op
from tinygrad_bn.ops.elementwise import exp
from tinygrad_bn.ops.linalg import matmul as library_matmul
from tinygrad_bn.ops.shape import broadcast_to


def made(forward, rule=None, **rules):
    op = Op(forward, forward.__name__)
    op.def_vjp(rule, **rules)
    return op


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


# --- forwards --------------------------------------------------------------------------------


def tanh(x):
    return array_module(x).tanh(x)


def multiply(x, y):
    return x * y


def matmul(x, y):
    return x @ y


def mean(x):
    return x.mean(axis=0)


def softmax(x):
    e = array_module(x).exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def two(x):
    return x * x, x * 3.0


def sigmoid_saving(x):
    out = 1 / (1 + array_module(x).exp(-x))
    return saving(out, slope=out * (1 - out))


def normalize(x):
    """Batch norm over axes 0, 2, 3 without weight and bias."""
    centred = x - x.mean(axis=(0, 2, 3), keepdims=True)
    return centred / (centred * centred).mean(axis=(0, 2, 3), keepdims=True) ** 0.5


# --- right rules -----------------------------------------------------------------------------


def _transposed(x):
    return x.transpose((1, 0))


def _mean(x):
    return x.mean(axis=(0, 2, 3), keepdims=True)


def _normalize_rule(mean_term=1.0, x_hat_term=1.0, sign=1.0):
    def rule(g, x):
        centred = x - _mean(x)
        s = _mean(centred * centred) ** -0.5
        x_hat = centred * s
        return (sign * s * (g - mean_term * _mean(g) - x_hat_term * x_hat * _mean(g * x_hat)),)

    return rule


def _sigmoid_rule(g, x, slope):
    if slope is None:  # under create_graph: computed again, with ops
        out = 1 / (exp(-x) + 1)
        slope = out * (1 - out)
    return (g * slope,)


SHAPES = {
    "tanh": [(3, 4)],
    "multiply": [(3, 4), (4,)],
    "matmul": [(3, 3), (3, 3)],
    "mean": [(5, 2)],
    "softmax": [(3, 4)],
    "two": [(3,)],
    "sigmoid_saving": [(3, 2)],
    "normalize": [(8, 4, 6, 6)],
}

RIGHT = {
    "tanh": made(tanh, x=lambda g, out: g * (1 - out * out)),
    "multiply": made(multiply, x=lambda g, y: g * y, y=lambda g, x: g * x),
    "matmul": made(
        matmul,
        x=lambda g, y: library_matmul(g, _transposed(y)),
        y=lambda g, x: library_matmul(_transposed(x), g),
    ),
    "mean": made(mean, x=lambda g, x_shape: broadcast_to(g / x_shape[0], shape=x_shape)),
    "softmax": made(softmax, x=lambda g, out: out * (g - (g * out).sum(axis=1, keepdims=True))),
    "two": made(two, lambda g, x: (g[0] * x * 2.0 + g[1] * 3.0,)),
    "sigmoid_saving": made(sigmoid_saving, _sigmoid_rule),
    "normalize": made(normalize, _normalize_rule()),
}

# --- wrong at first order --------------------------------------------------------------------

WRONG = {
    "sign": (made(tanh, x=lambda g, out: -g * (1 - out * out)), "sign"),
    "missing factor": (made(mean, x=lambda g, x_shape: broadcast_to(g, shape=x_shape)), "factor"),
    "factor m/(m-1)": (
        made(mean, x=lambda g, x_shape: broadcast_to(g / (x_shape[0] - 1), shape=x_shape)),
        "factor 0.8 (4/5",
    ),
    "missing term": (made(softmax, x=lambda g, out: out * g), ""),
    "transposed": (
        made(
            matmul,
            x=lambda g, y: library_matmul(y, _transposed(g)),
            y=lambda g, x: library_matmul(_transposed(x), g),
        ),
        "transposed",
    ),
    "operand not transposed": (
        made(matmul, x=lambda g, y: library_matmul(g, y), y=lambda g, x: g),
        "",
    ),
    "zero": (made(tanh, x=lambda g: g * 0.0), "zero"),
    "cotangent ignored": (made(tanh, x=lambda g, out: 1 - out * out), ""),
    "nan": (made(tanh, x=lambda g, out: g * (1 - out * out) + float("nan")), "nan"),
    "swapped outputs": (made(two, lambda g, x: (g[1] * x * 2.0 + g[0] * 3.0,)), ""),
    "second output forgotten": (made(two, lambda g, x: (g[0] * x * 2.0,)), ""),
    "batch norm without its mean term": (made(normalize, _normalize_rule(mean_term=0.0)), ""),
    "batch norm without its x̂ term": (made(normalize, _normalize_rule(x_hat_term=0.0)), ""),
    "batch norm, x̂ term added": (made(normalize, _normalize_rule(x_hat_term=-1.0)), ""),
    "batch norm, count off by one": (
        made(normalize, _normalize_rule(mean_term=288 / 287, x_hat_term=288 / 287)),
        "",
    ),
}


def frozen(g, out):
    """The rule of tanh with the output taken off the graph: right once, wrong twice."""
    return g * (1 - (out.detach() if hasattr(out, "detach") else out) ** 2)


def half_frozen(g, x):
    """Batch norm's rule with the deviation as a constant."""
    centred = x - _mean(x)
    s = _mean(centred * centred) ** -0.5
    s = s.detach() if hasattr(s, "detach") else s
    x_hat = centred * s
    return (s * (g - _mean(g) - x_hat * _mean(g * x_hat)),)


WRONG_TWICE = {
    "frozen output": made(tanh, x=frozen),
    "frozen statistics": made(normalize, half_frozen),
}
