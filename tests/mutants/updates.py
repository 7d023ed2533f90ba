"""Faults in the compiled updates of optimizers, which have the bits of the array operations.

A fault is planted around the compiled loop, or in how parameters are cut into pieces.
"""

import importlib.util

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.mutants.mutant import Mutant
from tests.mutants.planting import replaced
from tests.mutants.verifiers import as_lawful
from tests.optim.updates import MAKERS, draw, trained
from tinygrad_bn import testing
from tinygrad_bn.kernels.cpu import numba_adam, numba_sgd, threads, updates

_SMALL = ((updates, "SMALLEST", 1), (updates, "PIECE", 8), (threads, "num_threads", lambda: 2))


def small_pieces():
    """Return the context in which the updates, right as they are, serve parameters of any size."""
    return replaced(*_SMALL)


def updates_are_those_of_arrays(makers, drawn):
    shapes, dtype, seed = drawn
    starts, gradients = draw([*shapes, (40,)], dtype, seed=seed)
    for make in makers:
        sides = [trained(family, make, starts, gradients) for family in ("numba", "generic")]
        for ours, right in zip(*sides, strict=True):
            testing.assert_law(ours, right, law="an update is that of the arrays", roundings=0)


def drawn_updates():
    shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=2, max_side=9), max_size=3)
    return st.tuples(shapes, st.sampled_from(["float32", "float64"]), st.integers(0, 2**32))


_verify = as_lawful([updates_are_those_of_arrays], drawn_updates)
_SGD = [MAKERS[name] for name in ("sgd", "decay", "momentum", "nesterov")]
_ADAM = [MAKERS[name] for name in ("adam", "adam without averages", "adamw")]


class Loop:
    """A compiled loop with a fault: `change` takes the right function and gives the wrong one."""

    def __init__(self, right, change):
        self.right, self.change = right, change

    def of(self, *dtypes):
        return self.change(self.right.of(*dtypes))

    def made(self, *dtypes):
        return True


def mutant(fault, makers, owner, attribute, change):
    right = getattr(owner, attribute)
    wrong = Loop(right, change) if hasattr(right, "of") else change(right)
    planted = (*_SMALL, (owner, attribute, wrong))
    kind = "SGD" if makers is _SGD else "Adam"
    return Mutant(f"{kind}, compiled: {fault}", makers, _verify, lambda: replaced(*planted))


def sgd(fault, change):
    return mutant(fault, _SGD, numba_sgd, "descend", change)


def adam(fault, change):
    return mutant(fault, _ADAM, numba_adam, "adapt", change)


def passing(at, value):
    """Return a change that passes `value(right one)` for one of the arguments."""
    return lambda loop: lambda *a: loop(*a[:at], value(a[at]), *a[at + 1 :])


def kept(at):
    """Return a change that leaves one of the arrays as it was."""

    def change(loop):
        def call(*args):
            before = args[at].copy()
            loop(*args)
            args[at][...] = before

        return call

    return change


def fused(loop):
    """Round a product and a sum once."""

    def call(p, g, velocity, rate, *options):
        before = p.astype(np.longdouble)
        loop(p, g, velocity, rate, *options)
        if not len(velocity) and not options[1]:
            p[...] = before + g.astype(np.longdouble) * p.dtype.type(rate)

    return call


def without_last_entry(loop):
    def call(p, *args):
        before = p[-1:].copy()
        loop(p, *args)
        p[-1:] = before

    return call


def without_rest(in_pieces):
    """Update whole pieces alone."""

    def call(update, arrays):
        size = arrays[0].size
        whole = size if size < 2 * updates.PIECE else size // updates.PIECE * updates.PIECE
        in_pieces(update, [array.reshape(-1)[:whole] for array in arrays])

    return call


def on_copies(in_pieces):
    """Update a copy where the parameter has axes."""

    def call(update, arrays):
        many = arrays[0].ndim > 1
        in_pieces(update, [array.copy() if many else array for array in arrays])

    return call


def twice_between(in_pieces):
    """Let pieces overlap by an entry."""

    def call(update, arrays):
        flat = [array.reshape(-1) for array in arrays]
        for start in range(0, max(1, len(flat[0])), updates.PIECE):
            update(*(array[max(0, start - 1) : start + updates.PIECE] for array in flat))

    return call


def nothing(value):
    return type(value)(0)


UPDATES = [
    sgd("decay forgotten", passing(5, nothing)),
    sgd("momentum forgotten", passing(4, nothing)),
    sgd("no look ahead", passing(6, nothing)),
    sgd("look ahead always", passing(6, lambda nesterov: True)),
    sgd("velocity of the first step from what memory held", passing(7, nothing)),
    sgd("velocity begun anew at each step", passing(7, lambda fresh: True)),
    sgd("velocity not kept", kept(2)),
    sgd("sign of the rate", passing(3, lambda rate: -rate)),
    sgd("a product and a sum rounded once", fused),
    sgd("last entry forgotten", without_last_entry),
    mutant("rest of a parameter forgotten", _SGD, numba_sgd, "in_pieces", without_rest),
    mutant("a copy updated", _SGD, numba_sgd, "in_pieces", on_copies),
    mutant("pieces overlap", _SGD, numba_sgd, "in_pieces", twice_between),
    adam("average of g not kept", kept(2)),
    adam("average of g² not kept", kept(3)),
    adam("rates of the first step", passing(5, lambda root: 1.0)),
    adam("decay of AdamW forgotten", passing(6, lambda shrink: 1.0)),
    adam("β₁ for 1 - β₁", passing(7, lambda rest: 1 - rest)),
    adam("β₂ forgotten", passing(8, nothing)),
    adam("1 - β₂ forgotten", passing(9, lambda rest: 1.0)),
    adam("ε forgotten", passing(10, nothing)),
    adam("decay forgotten", passing(11, nothing)),
    adam("last entry forgotten", without_last_entry),
    mutant("rest of a parameter forgotten", _ADAM, numba_adam, "in_pieces", without_rest),
    mutant("a copy updated", _ADAM, numba_adam, "in_pieces", on_copies),
    mutant("pieces overlap", _ADAM, numba_adam, "in_pieces", twice_between),
]

RIGHT = (
    Mutant("the compiled updates of SGD in small pieces", _SGD, _verify, small_pieces),
    Mutant("the compiled updates of Adam in small pieces", _ADAM, _verify, small_pieces),
)

if importlib.util.find_spec("numba") is None:
    UPDATES, RIGHT = [], ()
