"""The NumPy kernel of cross-entropy: the bits of the generic form, and what it leaves to that."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import numpy_cross_entropy as kernel
from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.ops.loss import cross_entropy

(rule,) = (r.function for r in cross_entropy.rules)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(kernel, "SMALLEST", 1)
    monkeypatch.setattr(kernel, "PIECE", 8)
    monkeypatch.setattr(threads, "_count", 3)


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([np.float32, np.float64]),
    kind=st.sampled_from(["labels", "few labels", "probabilities"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    impossible=st.booleans(),
)
def test_loss_and_gradients_are_those_of_the_generic_form(
    seed, shape, dtype, kind, reduction, impossible
):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=shape) * rng.choice([1, 30])).astype(dtype)
    target = rng.integers(0, shape[1], shape[0]).astype(np.uint8 if kind == "few labels" else int)
    if impossible:
        logits[np.arange(shape[0]), (target + 1) % shape[1]] = -np.inf
    if kind == "probabilities":
        target = rng.dirichlet(np.ones(shape[1]), shape[0]).astype(dtype)
        target[~np.isfinite(logits)] = 0
    g = rng.normal(size=shape[:1] if reduction == "none" else ()).astype(dtype)
    g = np.asarray(g)
    needs = (True, kind == "probabilities")
    with use_kernels("generic"), np.errstate(all="ignore"):
        want, saved = cross_entropy.call_with_residuals(logits, target, reduction=reduction)
        arguments = (logits, target, saved["logs"], reduction, needs)
        right = rule(g, *arguments)
    with np.errstate(all="ignore"):
        found = kernel.forward(logits, target, reduction=reduction)
        grads = kernel.vjp(g, *arguments)
    pairs = [
        (found.out, want),
        (found.residuals["logs"], saved["logs"]),
        *zip(grads, right, strict=True),
    ]
    for got, expected in pairs:
        if expected is None:
            assert got is None
            continue
        assert type(got) is np.ndarray and got.dtype == dtype
        np.testing.assert_array_equal(got, expected)


def test_what_it_is_not_made_for_is_declined(monkeypatch):
    x, labels = np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0])
    assert kernel.forward(x, labels) is not NotImplemented
    for logits, target in (
        (x.astype(np.float16), labels),
        (x.astype(">f4"), labels),
        (x.astype(int), labels),
        (x, labels + 1),
        (x, labels - 1),
        (x, labels.astype(np.float32)),
        (x, labels[:3]),
        (x, x.astype(np.float64)),
        (x[:0], labels[:0]),
        (x.reshape(2, 3, 2), labels.reshape(2, 2)),
    ):
        assert kernel.forward(logits, target) is NotImplemented
    assert kernel.forward(x, labels, reduction="average") is NotImplemented
    g = np.ones((), np.float32)
    assert kernel.vjp(g, x, labels, None, "mean", (True, False)) is NotImplemented
    assert kernel.vjp(g.astype(float), x, labels, x, "mean", (True, False)) is NotImplemented
    monkeypatch.setattr(kernel, "SMALLEST", 1 << 15)
    assert kernel.forward(x, labels) is NotImplemented
