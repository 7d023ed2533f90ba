"""Optimizers in one launch, run on the CPU, against the array operations that define them."""

from contextlib import contextmanager
from functools import lru_cache

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


def names(launched):
    return [name for name, *_ in launched]


@makers
@pytest.mark.parametrize("count", [1, 16, 17, 700])
def test_a_step_is_one_launch_however_many_parameters_there_are(served, make, count):
    """Of 150 elements, 64 a chunk; a table is written first, and serves until something moves."""
    some = parameters([(5, 30)] * count, "float32")
    optimizer = make(some)
    set_gradients(some, seed=0)
    optimizer.step()  # which makes the state
    before = len(served.launched)
    optimizer.step()
    first = served.launched[before:]
    assert len(set(first[:-1])) <= 1  # nothing but words written, where state is new to the table
    assert first[-1][0] in ("sgd", "adam")
    assert first[-1][1] == 3 * count
    for k in range(3):
        set_gradients(some, seed=k)
        before = len(served.launched)
        optimizer.step()
        assert names(served.launched[before:]) == [first[-1][0]]


@makers
def test_gradients_may_lie_elsewhere_at_every_step_and_some_be_missing(make):
    def run(family):
        with use_kernels(family):
            some = parameters([(9, 30), (200,), (), (7,)], "float32")
            optimizer, held = make(some), []
            for k in range(6):
                rng = np.random.default_rng(k)
                for i, p in enumerate(some):
                    g = rng.normal(size=p.shape)
                    p.grad = None if (i + k) % 4 == 0 else tg.tensor(g, dtype="float32")
                    held.append(p.grad)  # so that no memory is used again
                some[1].requires_grad = k != 3  # frozen, with the gradient it had
                optimizer.step()
        return [p.numpy() for p in some]

    for got, want in zip(run("cuda"), run("generic"), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)


def test_a_gradient_that_comes_back_to_where_it_was_needs_no_new_table(served):
    (p,) = parameters([(70,)], "float32")
    here, there = (tg.ones(70) for _ in range(2))
    optimizer = optim.SGD([p], 0.1)
    before = len(served.launched)
    for grad in (here, there, here, there, here):
        p.grad = grad
        optimizer.step()
    assert names(served.launched[before:]) == ["set_words", "sgd", "set_words", *["sgd"] * 4]


def test_tables_are_forgotten_in_time_and_made_again(served, monkeypatch):
    monkeypatch.setattr(optimizers, "_kept", lru_cache(2)(optimizers._written))
    (p,) = parameters([(70,)], "float32")
    grads = [tg.ones(70) for _ in range(3)]
    before, start = len(served.launched), p.numpy().copy()
    for grad in grads * 2:
        p.grad = grad
        optim.SGD([p], 0.5).step()
    assert names(served.launched[before:]) == ["set_words", "sgd"] * 6
    np.testing.assert_allclose(p.numpy(), start - 3, rtol=0, atol=1e-6)


def test_streams_and_devices_have_tables_of_their_own(served, monkeypatch):
    (p,) = parameters([(70,)], "float32")
    set_gradients([p], seed=0)
    before = len(served.launched)
    for device, stream in ((0, 0), (0, 5), (1, 5), (0, 0), (0, 5)):
        monkeypatch.setattr(served, "current_device", lambda device=device: device)
        monkeypatch.setattr(served, "current_stream", lambda stream=stream: stream)
        optim.SGD([p], 0.5).step()
    assert names(served.launched[before:]) == [*["set_words", "sgd"] * 3, "sgd", "sgd"]


class Graph(shim.ShimRuntime):
    """Writes down what is launched, except outside; a recorder as well."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.writes = True

    def launch(self, *arguments):
        if self.writes:
            self.calls.append(arguments)
        super().launch(*arguments)

    @contextmanager
    def outside(self):
        self.writes = False
        yield
        self.writes = True


@makers
@pytest.mark.parametrize("count", [1, 20])
def test_a_step_that_is_replayed_gives_the_same_bits_as_steps_that_are_not(make, count):
    shapes = [(4, 40), (7,), ()] * count
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
                watch = StepWatch(graph, recording=True)
                with watched_by(watch):
                    optimizer.step()
                calls = list(graph.calls)
            else:
                # What nobody held would have been overwritten by now.
                junk = [np.full(n, 7, np.int64) for n in range(1, 500)]  # noqa: F841
                for action in watch.actions:
                    action()
                for call in calls:
                    graph.launch(*call)
    assert len(calls) == 1  # no table is written by a replay
    for p, right in zip(some, want, strict=False):
        np.testing.assert_array_equal(p.numpy(), right)


def test_a_graph_holds_its_table_and_a_rehearsal_leaves_none(served):
    """A table from a recorder's memory would keep that from being given back."""
    (p,) = parameters([(70,)], "float32")
    set_gradients([p], seed=0)
    optimizer, found = optim.SGD([p], 0.5), optimizers._kept.cache_info()
    for recording in (False, True):
        watch = StepWatch(Graph(), recording)
        with watched_by(watch):
            optimizer.step()
        tables = [array for array in watch.held if array.dtype == np.int64]
        assert len(tables) == recording
    assert optimizers._kept.cache_info() == found


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
    steps = [name for name in names(served.launched[before:]) if name != "set_words"]
    assert len(steps) == 2 + 3 + 3  # b has taken fewer steps than a
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
    steps = [name for name in names(served.launched[before:]) if name != "set_words"]
    assert len(steps) == 2 * 2  # float32 and float64
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
