"""Faults in the NumPy kernels of layer norm and RMS norm, served in blocks of a few rows."""

import numpy as np

from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.verifiers import as_op
from tinygrad_bn.kernels.cpu import numpy_layer_norm, rows, threads
from tinygrad_bn.kernels.cpu.rows import Rows
from tinygrad_bn.op import REGISTRY

_SMALL = (
    (rows, "SMALLEST", 1),
    (rows, "BLOCK", 8),
    (rows, "PIECE", 4),
    (threads, "num_threads", lambda: 2),
)


def small_blocks():
    """Return the context in which the kernels, right as they are, serve arrays of any size."""
    return replaced(*_SMALL)


def mutant(fault, owner, attribute, change, op="layer_norm"):
    """Return a mutant: `change` takes the right function and returns the wrong one."""
    wrong = change(getattr(owner, attribute))
    planted = (*_SMALL, (owner, attribute, wrong))
    return Mutant(f"{op}, kernel: {fault}", REGISTRY[op], as_op(op), lambda: replaced(*planted))


def without_last(blocks):
    return lambda self: blocks(self)[:-1] or blocks(self)


def first_thread_alone(share_out):
    return lambda self, work: share_out(self, work)[:1]


def tiled_for_repeated(spread):
    def call(self, vector):
        if vector is None:
            return None
        values = vector.reshape(self.places, self.entries).astype(self.dtype)
        return np.repeat(np.tile(values, (1, self.repeats)), self.tiles, axis=1)

    return call


def folded_in_the_wrong_order(fold):
    def call(self, total):
        split = total.reshape(self.places, self.repeats, self.entries, self.tiles)
        return split.sum(axis=(1, 3)).ravel()

    return call


def overwriting(add_columns):
    def call(self, total, matrix, block):
        total[block.first : block.last] = 0
        add_columns(self, total, matrix, block)

    return call


def first_places(along):
    """Give a block the γ of the first places of a sample, whichever its own are."""
    return lambda matrix, block: matrix[: block.last - block.first]


def first_piece_alone(dots):
    def call(a, b=None):
        piece = slice(rows.PIECE)
        return dots(a[:, piece], None if b is None else b[:, piece])

    return call


def whole_pieces_alone(dots):
    def call(a, b=None):
        kept = slice(max(rows.PIECE, a.shape[1] // rows.PIECE * rows.PIECE))
        return dots(a[:, kept], None if b is None else b[:, kept])

    return call


def in_half_precision(dots):
    return lambda *args: dots(*args).astype(np.float16).astype(np.float64)


def forgetting(at, value=None):
    """Return a change that passes `value` for one of the arguments."""
    return lambda function: lambda *args: function(*args[:at], value, *args[at + 1 :])


def not_centred(centre):
    def call(x, mean, out):
        centre(x, mean, out)
        out[...] = x
        return out

    return call


def slope_forgotten(project):
    def call(h, x_hat, centred, out):
        x_hat[...] = 0
        project(h, x_hat, centred, out)

    return call


def one_place_for_all(scratch):
    return lambda name, like: scratch("d", like)


_K = numpy_layer_norm

KERNELS = [
    mutant("last block forgotten", Rows, "blocks", without_last),
    mutant("sums of the first thread alone", Rows, "share_out", first_thread_alone),
    mutant("γ repeated in the wrong order", Rows, "spread", tiled_for_repeated),
    mutant("sums folded in the wrong order", Rows, "fold", folded_in_the_wrong_order),
    mutant("sums of the last block alone", Rows, "add_columns", overwriting),
    mutant("γ of a sample's first places for every block", _K, "along", first_places),
    mutant("first piece of a row alone summed", _K, "dots", first_piece_alone),
    mutant("whole pieces of a row alone summed", _K, "dots", whole_pieces_alone),
    mutant("sums rounded to float16", _K, "dots", in_half_precision),
    mutant("mean not subtracted", _K, "_centre", not_centred),
    mutant("mean not subtracted in the backward", _K, "_x_hat", forgetting(1)),
    mutant("ε forgotten", _K, "_scale", forgetting(2, 0.0)),
    mutant("γ forgotten", _K, "_times", forgetting(1)),
    mutant("γ forgotten in the backward", _K, "_scaled", forgetting(1)),
    mutant("mean term forgotten in dx", _K, "_project", forgetting(2, False)),
    mutant("x̂ term forgotten in dx", _K, "_project", slope_forgotten),
    mutant("one place in scratch memory for two things", _K, "_scratch", one_place_for_all),
    mutant("ε forgotten", _K, "_scale", forgetting(2, 0.0), "rms_norm"),
    mutant("mean taken off dx, as in layer norm", _K, "_project", forgetting(2, True), "rms_norm"),
    mutant("x̂ term forgotten in dx", _K, "_project", slope_forgotten, "rms_norm"),
    mutant("sums of the last block alone", Rows, "add_columns", overwriting, "rms_norm"),
    mutant("first piece of a row alone summed", _K, "dots", first_piece_alone, "rms_norm"),
]

RIGHT = tuple(
    Mutant(f"the kernel of {name} in small blocks", REGISTRY[name], as_op(name), small_blocks)
    for name in ("layer_norm", "rms_norm")
)
