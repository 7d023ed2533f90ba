"""Laws of ops other than batch norm: equations that need no reference."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing import assert_law
from tinygrad_bn.testing import strategies as tgst

SHAPE = (3, 4, 5)
INDEX = (np.array([2, 0, 2]), slice(None, None, 2))

#: Linear maps of an array of SHAPE, each with its transpose.
TRANSPOSES = {
    "sum and broadcast": (
        lambda x: x.sum(axis=1, keepdims=True),
        lambda y: REGISTRY["broadcast_to"](y, shape=SHAPE),
    ),
    "pad and slice": (
        lambda x: F.pad(x, ((1, 2), (0, 0), (3, 0))),
        lambda y: y[1:-2, :, 3:],
    ),
    "gather and scatter": (
        lambda x: REGISTRY["getitem"](x, index=INDEX),
        lambda y: REGISTRY["scatter_add"](y, index=INDEX, shape=SHAPE),
    ),
    "transpose and its inverse": (
        lambda x: x.transpose((2, 0, 1)),
        lambda y: y.transpose((1, 2, 0)),
    ),
    "reshape and its inverse": (lambda x: x.reshape((6, 10)), lambda y: y.reshape(SHAPE)),
}


def product(a, b):
    """Return ⟨a, b⟩, and the size of its terms."""
    return float((a * b).sum()), float(abs(a * b).sum())


@pytest.mark.parametrize("name", TRANSPOSES)
@given(data=st.data())
def test_pairs_are_transposes_of_each_other(name, data):
    there, back = TRANSPOSES[name]
    x = data.draw(tgst.float_arrays(SHAPE))
    y = data.draw(tgst.cotangents(there(x).shape))
    (left, size), (right, _) = product(there(x), y), product(x, back(y))
    assert_law(left, right, scale=size, law="⟨A x, y⟩ = ⟨x, Aᵀ y⟩")
    # And the rule is the transpose too.
    leaf = tg.Tensor(x, requires_grad=True)
    (gx,) = tg.grad(there(leaf), leaf, y)
    np.testing.assert_array_equal(gx.numpy(), back(y))


#: Functions with f(t x) = tᵏ f(x) for t > 0, and their k.
HOMOGENEOUS = {
    "relu": (F.relu, 1),
    "max": (lambda x: x.max(axis=1), 1),
    "square": (lambda x: x * x, 2),
    "sum of cubes": (lambda x: (x * x * x).sum(axis=(0, 2)), 3),
    "divide": (lambda x: x[0] / x[1], 0),
    "sqrt": (lambda x: (x * x).sum(axis=-1).sqrt(), 1),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
@given(data=st.data())
def test_euler_relation_of_homogeneous_functions(name, data):
    fn, degree = HOMOGENEOUS[name]
    x = data.draw(tgst.away_from_kinks(SHAPE, kinks=(0.0,)))
    leaf = tg.Tensor(x, requires_grad=True)
    y = fn(leaf)
    g = data.draw(tgst.cotangents(y.shape))
    (gx,) = tg.grad(y, leaf, g)
    (left, terms), (value, size) = product(x, gx.numpy()), product(g, y.numpy())
    assert_law(left, degree * value, scale=terms + size, law="⟨x, ∇f⟩ = k f")


@given(x=tgst.float_arrays(SHAPE), shift=st.sampled_from([0.5, -3.0, 1e3]))
def test_softmax_does_not_see_a_shift_and_its_gradient_sums_to_zero(x, shift):
    leaf = tg.Tensor(x, requires_grad=True)
    y = F.softmax(leaf, axis=1)
    # Adding the shift rounds x by a unit of the shift's size.
    moved = F.softmax(x + shift, axis=1)
    assert_law(y.numpy(), moved, scale=(1 + abs(shift)) * moved, law="softmax(x + c) = softmax(x)")
    g = np.random.default_rng(0).standard_normal(SHAPE)
    (gx,) = tg.grad(y, leaf, g)
    assert_law(gx.numpy().sum(axis=1), 0.0, scale=abs(g * y.numpy()).sum(axis=1), law="Σ dx = 0")


@given(x=tgst.float_arrays(SHAPE), cuts=st.lists(st.integers(0, 4), max_size=3))
def test_what_is_split_and_joined_is_as_it_was_and_so_is_its_gradient(x, cuts):
    leaf = tg.Tensor(x, requires_grad=True)
    ends = [0, *sorted(cuts), 4]
    parts = [leaf[:, a:b] for a, b in pairwise(ends)]
    joined = tg.concatenate(parts, axis=1)
    np.testing.assert_array_equal(joined.numpy(), x)
    g = np.random.default_rng(1).standard_normal(SHAPE)
    (gx,) = tg.grad(joined, leaf, g)
    np.testing.assert_array_equal(gx.numpy(), g)
