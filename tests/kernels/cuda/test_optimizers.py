"""Optimizers in one launch, run on the CPU, against the array operations that define them."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_bn as tg
from tests.kernels.cuda import shim
from tinygrad_bn import nn, optim
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.backend.recording import watched_by
from tinygrad_bn.kernels.cuda import optimizers
from tinygrad_bn.step_watch import StepWatch

pytestmark = pytest.mark.usefixtures("served")

MAKERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "decay": lambda p: optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, 0.9),
    "nesterov": lambda p: optim.SGD(p, 0.1, 0.9, 0.01, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.1, weight_decay=0.01),
    "adam without averages": lambda p: optim.Adam(p, 0.1, betas=(0.0, 0.0)),
    "adamw": lambda p: optim.AdamW(p, 0.1),
}
#: Some roundings a step of numbers of size 1, which fma makes fewer of.
TOLERANCE = {"float32": 3e-6, "float64": 1e-14}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "CHUNK", 64)
        patch.setattr(optimizers, "THREADS", 32)
        yield


def parameters(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [nn.Parameter(np.asarray(rng.normal(size=shape)), dtype=dtype) for shape in shapes]


def set_gradients(some, seed):
    rng = np.random.default_rng(seed)
    for p in some:
        g = np.asarray(rng.normal(size=p.shape)).astype(p.dtype)
        if p.grad is None:
            p.grad = tg.tensor(g)
        else:
            p.grad.data[...] = g


def trained(family, make, shapes, dtype, steps=4):
    """Return parameters and state after some steps at changing rates."""
    with use_kernels(family):
        some = parameters(shapes, dtype)
        optimizer = make(some)
        for k in range(steps):
            set_gradients(some, seed=k)
            optimizer.lr = 0.1 / (k + 1)
            optimizer.step()
    kept = optimizer.state_dict()["state"].values()
    state = [v.numpy() for s in kept for v in s.values() if isinstance(v, tg.Tensor)]
    return [p.numpy() for p in some] + state


SHAPES = st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), max_size=40)


@makers
def test_updates_are_those_of_the_array_operations(make):
    @given(shapes=SHAPES, dtype=st.sampled_from(list(TOLERANCE)))
    def check(shapes, dtype):
        shapes = [*shapes, (3,)]
        ours, right = (trained(family, make, shapes, dtype) for family in ("cuda", "generic"))
        for got, want in zip(ours, right, strict=True):
            assert got.dtype == want.dtype
            bar = TOLERANCE[dtype]
            np.testing.assert_allclose(got, want, rtol=bar, atol=bar)

    check()


@makers
@pytest.mark.parametrize(("count", "launches"), [(1, 1), (16, 1), (17, 2)])
def test_many_parameters_are_one_launch(served, make, count, launches):
    before = len(served.launched)
    trained("cuda", make, [(5, 30)] * count, "float32", steps=1)
    found = served.launched[before:]
    assert len(found) == launches
    assert sum(blocks for _, blocks, _ in found) == 3 * count  # 150 elements, 64 a block


@makers
def test_a_step_that_is_replayed_gives_the_same_bits_as_steps_that_are_not(make):
    shapes = [(4, 40), (7,), ()]

    class Recorder:
        outside = staticmethod(nullcontext)

    class Graph(shim.ShimRuntime):
        """Writes down what is launched."""

        def __init__(self):
            super().__init__()
            self.calls = []

        def launch(self, *arguments):
            self.calls.append(arguments)
            super().launch(*arguments)

    want = trained("cuda", make, shapes, "float32", steps=6)
    graph = Graph()
    with shim.on_cuda_kernels(graph):
        some = parameters(shapes, "float32")
        optimizer = make(some)
        for k in range(6):
            set_gradients(some, seed=k)
            optimizer.lr = 0.1 / (k + 1)
            if k < 2:
                optimizer.step()
            elif k == 2:
                graph.calls.clear()
                watch = StepWatch(Recorder(), recording=True)
                with watched_by(watch):
                    optimizer.step()
                calls = list(graph.calls)
            else:
                for action in watch.actions:
                    action()
                for call in calls:
                    graph.launch(*call)
    assert len(calls) == 1
    for p, right in zip(some, want, strict=False):
        np.testing.assert_array_equal(p.numpy(), right)


def test_groups_with_options_of_their_own_and_parameters_that_join_later(served):
    def run(family):
        with use_kernels(family):
            a, b, c = parameters([(9,), (8,), (7,)], "float32")
            groups = [{"params": [a, b]}, {"params": [c], "lr": 0.5, "betas": (0.5, 0.9)}]
            optimizer = optim.Adam(groups, 0.1)
            for k in range(3):
                set_gradients([a, c] if k == 0 else [a, b, c], seed=k)
                optimizer.step()
        return [p.numpy() for p in (a, b, c)]

    before = len(served.launched)
    ours, right = run("cuda"), run("generic")
    assert len(served.launched) - before == 2 + 3 + 3  # b has taken fewer steps than a
    for got, want in zip(ours, right, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)


@makers
def test_what_the_kernel_does_not_serve_is_updated_beside_what_it_does(served, make):
    def run(family):
        with use_kernels(family):
            rng = np.random.default_rng(0)
            some = [
                nn.Parameter(rng.normal(size=(3, 4)), dtype=dtype)
                for dtype in ("float32", "float16", "float64", "float32")
            ]
            some[3].data = np.asfortranarray(some[3].data)
            optimizer = make(some)
            for k in range(2):
                set_gradients(some, seed=k)
                optimizer.step()
        return [p.numpy() for p in some]

    before = len(served.launched)
    ours, right = run("cuda"), run("generic")
    assert len(served.launched) - before == 2 * 2  # float32 and float64
    for got, want in zip(ours, right, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)


def test_a_subclass_with_an_update_of_its_own_is_not_bypassed(served):
    class Still(optim.SGD):
        def _update(self, p, g, state, options):
            p *= 2

    (p,) = parameters([(3,)], "float32")
    start = p.numpy().copy()
    set_gradients([p], seed=0)
    before = len(served.launched)
    Still([p], 0.1).step()
    np.testing.assert_array_equal(p.numpy(), 2 * start)
    assert len(served.launched) == before


def test_a_backward_that_needs_the_old_values_raises():
    (p,) = parameters([(3,)], "float32")
    y = (p * p).sum()
    set_gradients([p], seed=0)
    optim.SGD([p], 0.1).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_nan_in_one_parameter_stays_there():
    some = parameters([(70,), (70,)], "float32")
    set_gradients(some, seed=0)
    some[0].grad.data[3] = np.nan
    optim.Adam(some, 0.1).step()
    assert np.isnan(some[0].numpy()).sum() == 1
    assert np.isfinite(some[1].numpy()).all()
