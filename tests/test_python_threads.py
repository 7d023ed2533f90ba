"""Several Python threads at once, switching as often as they can: each gets what it would alone.

What threads share is state of the module: compiled code, plans of ops, memory that waits, the
workers, BLAS, the clock of the tape. Threads switch as often as Python lets them, which is at calls
and loops only. In the files that share state by locks (`WATCHED`) some tests make a thread give
way between any two bytecodes as well. In a Python without the global lock all of them run side by
side in truth; what two threads meet there once in a thousand times is staged in some of the tests.
"""

import gc
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import nullcontext
from queue import SimpleQueue

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import data, nn, optim, testing
from tinygrad_bn import functional as F
from tinygrad_bn.backend import generator, random
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import blas, memory, threads
from tinygrad_bn.nn import per_channel
from tinygrad_bn.testing import verification

THREADS = 6
WATCHED = {module.__file__ for module in (blas, memory, threads)}


@pytest.fixture(autouse=True)
def switching_all_the_time(monkeypatch):
    monkeypatch.setattr(threads, "_count", 3)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def giving_way_anywhere(monkeypatch):
    """Have threads that start inside of the test pause now and then at any bytecode of WATCHED."""
    countdown = itertools.count()

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in WATCHED:
            return None
        frame.f_trace_opcodes = True
        if next(countdown) % 7 == 0:
            time.sleep(1e-6)
        return trace

    # Workers of its own, for they have to be watched too.
    monkeypatch.setattr(threads, "_workers", [])
    monkeypatch.setattr(threads, "_jobs", SimpleQueue())
    threading.settrace(trace)
    yield
    threading.settrace(None)


def at_once(function):
    """Return what `function(i)` gives for each i, from as many threads that begin together."""
    found, barrier = [None] * THREADS, threading.Barrier(THREADS, timeout=60)

    def run(i):
        barrier.wait()
        try:
            found[i] = function(i)
        except BaseException as error:
            found[i] = error

    runs = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join(120)
    errors = [error for error in found if isinstance(error, BaseException)]
    if errors:
        raise errors[0]
    return found


def trained(i, steps=3):
    """Return the parameters, averages and losses of a small network after some steps."""
    rng = np.random.default_rng(i)

    def drawn(*shape):
        return rng.standard_normal(shape, np.float32)

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 15 * 15, 10),
    )  # fmt: skip
    with tg.no_grad():
        for parameter in model.parameters():
            parameter.data[...] = 0.05 * drawn(*parameter.shape)
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        images, labels = tg.Tensor(drawn(16, 3, 32, 32)), rng.integers(0, 10, 16)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [losses, *(np.array(value) for value in model.state_dict().values())]


def assert_same(found, expected):
    for mine, alone in zip(found, expected, strict=True):
        for a, b in zip(mine, alone, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("family", ["the best", "numpy"])
def test_models_that_are_trained_side_by_side_come_out_as_alone(monkeypatch, family, count):
    """To the bit: for a fixed number of threads each sum is added up in one order."""
    monkeypatch.setattr(threads, "_count", count)

    def train(i):
        with nullcontext() if family == "the best" else use_kernels(family):
            return trained(i)

    alone = [train(i) for i in range(THREADS)]
    assert_same(at_once(train), alone)
    assert blas._before is None


def test_the_first_use_of_everything_may_be_everybodys():
    """Plans of ops, and the caches of shapes, are made anew by all threads at once."""
    from tinygrad_bn.kernels.cpu import conv_block_plan
    from tinygrad_bn.op import REGISTRY

    alone = [trained(i, steps=1) for i in range(THREADS)]
    for _ in range(5):
        for op in REGISTRY.values():
            op._plans = {}
        conv_block_plan._plan.cache_clear()
        assert_same(at_once(lambda i: trained(i, steps=1)), alone)


def test_one_model_may_answer_many_threads():
    tg.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 50)).eval()
    x = [tg.Tensor(np.random.default_rng(i).random((64, 300), np.float32)) for i in range(THREADS)]
    alone = [[model(one).numpy()] for one in x]

    def answers(i):
        out = []
        for _ in range(10):
            with tg.no_grad():
                out.append(model(x[i]).numpy())
            assert tg.is_grad_enabled()
        (g,) = tg.grad(model(x[i]).sum(), model[0].weight)  # nobody's .grad is touched
        assert g.shape == (200, 300)
        return out

    for found, expected in zip(at_once(answers), alone, strict=True):
        for out in found:
            np.testing.assert_array_equal(out, expected[0])


def test_hooks_may_come_and_go_while_others_call_the_module():
    """Bites where there is no global lock: a dictionary that changes size while it is read."""
    layer, x = nn.ReLU(), tg.ones(3)

    def work(i):
        for _ in range(8000):
            if i % 2:
                layer.register_forward_hook(lambda module, args, out: None)()
            else:
                assert layer(x).shape == (3,)

    at_once(work)
    assert not layer.has_hooks


def test_threads_may_walk_one_graph():
    rng = np.random.default_rng(0)
    w = tg.tensor(rng.standard_normal((30, 30)), requires_grad=True)
    out = ((tg.Tensor(rng.standard_normal((20, 30))) @ w).tanh() @ w).sum()

    def gradients(i):
        (first,) = tg.grad(out, w, create_graph=True)
        (second,) = tg.grad((first * first).sum(), w, retain_graph=True)
        return [first.numpy(), second.numpy()]

    alone = gradients(0)
    assert_same(at_once(lambda i: [g for _ in range(20) for g in gradients(i)]), [alone * 20] * 6)


def test_the_tape_of_each_thread_keeps_its_order():
    """A long chain that branches: a node visited too early would lose a part of the gradient."""

    def gradient(i):
        x = tg.tensor([1.0 + i / 10], dtype="float64", requires_grad=True)
        y = x
        for _ in range(300):
            y = y * 0.5 + x * 0.25 + y * 0.25
        y.backward()
        return x.grad.item()

    expected = 0.75**300 + 0.25 * sum(0.75**k for k in range(300))
    np.testing.assert_allclose(at_once(gradient), expected, rtol=1e-12)


def test_memory_that_waits_is_nobodys_twice(giving_way_anywhere):
    """Blocks that change hands between threads, some brought back by the collector of garbage."""
    shapes = [(40_000 + 9_000 * k,) for k in range(4)]
    shared: list = []

    class Cycle:
        def __init__(self, array):
            self.array, self.me = array, self

    def work(i):
        rng = np.random.default_rng(i)
        held = []
        for step in range(60):
            x = memory.empty(shapes[int(rng.integers(4))], np.float32)
            x.fill(i)
            held.append(x[1:] if step % 2 else x)
            shared.append(held[-1])
            if len(shared) > 10:
                del shared[:5]  # whoever is last lets go of it, wherever that is
            if step % 7 == 0:
                Cycle(memory.empty(shapes[0], np.float32))
            if step % 20 == 0:
                gc.collect()
            for array in held:
                assert (array == i).all()
            del held[: int(rng.integers(0, 3))]

    at_once(work)
    shared.clear()
    gc.collect()
    waiting = [block for blocks in memory._waiting.values() for block in blocks]
    assert len({block.ctypes.data for block in waiting}) == len(waiting)
    assert sum(block.size for block in waiting) == memory._waiting_bytes <= memory.LIMIT


def test_passes_of_many_threads_do_each_index_once(giving_way_anywhere):
    def passes(i):
        for count in range(1, 20):
            seen = []
            threads.parallel(seen.append, count)
            assert sorted(seen) == list(range(count))

    at_once(passes)
    assert blas._before is None
    assert not blas._holders


@pytest.mark.skipif(blas._limit() is None, reason="NumPy's BLAS library is not known here")
def test_products_keep_to_one_thread_until_the_last_pass_ends(giving_way_anywhere):
    get, put = blas._limit()
    meet = threading.Barrier(THREADS, timeout=60)

    def holds(i):
        for n in range(40):
            if n % 2 == 0:
                meet.wait()  # all begin, or many end while others begin
            blas.hold((i, n))
            assert get() == 1
            blas.release((i, n))

    before = get()
    try:
        put(2)
        at_once(holds)
        assert get() == 2
    finally:
        put(before)


def test_the_number_of_threads_may_change_while_others_train():
    expected = sum(range(50))
    done = threading.Event()

    def work(i):
        if i == 0:
            for count in (1, 4, 2, 3) * 20:
                threads.set_num_threads(count)
            done.set()
            return
        while not done.is_set():
            found = []
            threads.parallel(found.append, 50)
            assert sum(found) == expected

    before = blas.num_threads()
    try:
        at_once(work)
        assert blas.num_threads() in (3, None)
    finally:
        threads.set_num_threads(before or 1)


def test_a_shared_switch_of_grad_mode_is_each_threads_own():
    off, on = tg.no_grad(), tg.enable_grad()

    def switch(i):
        with tg.no_grad() if i % 2 else tg.enable_grad():
            for _ in range(300):
                with off:
                    assert not tg.is_grad_enabled()
                    with on:
                        assert tg.is_grad_enabled()
                    assert not tg.is_grad_enabled()
                assert tg.is_grad_enabled() == (i % 2 == 0)

    at_once(switch)


def test_threads_that_iterate_over_one_loader_get_an_epoch_each():
    rows = np.arange(200)

    class Slow(data.DataLoader):
        """Others get in between a look at the epoch and its being counted, if they can."""

        @property
        def epoch(self):
            now = self.now
            time.sleep(1e-3)
            return now

        @epoch.setter
        def epoch(self, number):
            self.now = number

    def orders(loader):
        return {tuple(np.concatenate([b.numpy() for b in loader])) for _ in range(5)}

    def together(loader):
        return set().union(*at_once(lambda i: orders(loader)))

    alone = data.DataLoader(rows, 16, shuffle=True, seed=3)
    expected = {tuple(np.concatenate([b.numpy() for b in alone])) for _ in range(5 * THREADS)}
    loader = Slow(rows, 16, shuffle=True, seed=3)
    assert together(loader) == expected
    assert loader.now == 5 * THREADS


# --- what has to happen at one moment is staged ------------------------------------------------


def in_another_thread(function, timeout=20.0):
    """Return the thread that runs `function`, after waiting for it to end, but not for ever."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(timeout)
    return thread


def test_a_seed_set_while_another_thread_draws_first_counts(monkeypatch):
    monkeypatch.setattr(random, "_seeded", None)
    random._unseeded.cache_clear()
    tg.manual_seed(7)
    expected = tg.randn(3).numpy()
    monkeypatch.setattr(random, "_seeded", None)
    real = np.random.default_rng

    def slow(*seed):
        if not seed:  # the first draw makes a generator; now another thread sets a seed
            in_another_thread(lambda: tg.manual_seed(7))
        return real(*seed)

    monkeypatch.setattr(np.random, "default_rng", slow)
    generator()
    np.testing.assert_array_equal(tg.randn(3).numpy(), expected)


def test_a_number_of_threads_set_while_another_thread_asks_first_counts(monkeypatch):
    monkeypatch.setattr(threads, "_count", None)
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    before, setters = blas.num_threads(), []

    def asked():
        setters.append(in_another_thread(lambda: threads.set_num_threads(5), timeout=0.3))
        return 2

    monkeypatch.setattr(threads, "available_cpus", asked)
    try:
        threads.num_threads()
        setters[0].join(20)
        assert (threads.num_threads(), blas.num_threads()) in ((5, 5), (5, None))
    finally:
        blas.set_num_threads(before or 1)


def test_a_layer_whose_size_is_being_read_off_answers_other_threads(monkeypatch):
    layer, x = nn.BatchNorm2d(None).eval(), tg.Tensor(np.ones((2, 3, 2, 2), np.float32))
    full, answers = per_channel.creation.full, []

    def slow(*args, **options):
        monkeypatch.setattr(per_channel.creation, "full", full)
        in_another_thread(lambda: answers.append(layer(x)))
        return full(*args, **options)

    monkeypatch.setattr(per_channel.creation, "full", slow)
    np.testing.assert_array_equal(layer(x).numpy(), answers[0].numpy())


def test_verifications_that_overlap_leave_the_filters_of_warnings_alone():
    """The one that began first ends first; what it restores must not be what the other had set."""
    begun, leave = threading.Event(), threading.Event()
    before = list(warnings.filters)

    def blind():
        testing.check_grad(lambda x: x.tanh(), np.linspace(0.5, 1.0, 6), cotangents=np.ones(6))

    def first(drawn):
        begun.set()
        leave.wait(20)

    def second(drawn):
        leave.set()
        one.join(20)
        blind()  # by chance, as here: no warning, which would be an error

    one = threading.Thread(target=verification.tested, args=(first, None))
    one.start()
    begun.wait(20)
    verification.tested(second, None)
    assert warnings.filters == before
    with pytest.warns(testing.BlindCheckWarning):
        blind()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_draws_although_another_thread_was_drawing_when_it_was_forked():
    tg.manual_seed(3)
    held, release = threading.Event(), threading.Event()

    def draw():
        with generator().bit_generator.lock:  # as each draw holds it
            held.set()
            release.wait(20)

    drawing = threading.Thread(target=draw)
    drawing.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(5)
        numbers = tg.rand(3).numpy()
        tg.manual_seed(3)
        os._exit(not (numbers == tg.rand(3).numpy()).all())
    release.set()
    drawing.join(20)
    assert os.waitpid(child, 0)[1] == 0
