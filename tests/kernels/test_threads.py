"""The threads of the CPU kernels: every index once, errors, nesting, forks, and their number."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import unusable_because, use_kernels
from tinygrad_bn.kernels.cpu import blas, memory, threads

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.setattr(threads, "_count", 4)


def meeting(parties):
    """Return a task that waits until `parties` threads run it at the same time."""
    barrier = threading.Barrier(parties, timeout=20)
    return lambda index: barrier.wait()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 1000])
def test_every_index_is_run_once(count):
    seen = []
    threads.parallel(seen.append, count)
    assert sorted(seen) == list(range(count))


def test_tasks_run_side_by_side():
    threads.parallel(meeting(4), 4)


def test_one_thread_runs_all_in_order_and_starts_none(monkeypatch):
    monkeypatch.setattr(threads, "_count", 1)
    seen = []
    threads.parallel(lambda index: seen.append((index, threading.current_thread())), 3)
    assert seen == [(i, threading.current_thread()) for i in range(3)]


def test_an_exception_is_raised_in_the_caller_and_stops_the_rest():
    seen = []

    def task(index):
        seen.append(index)
        if index == 2:
            raise ZeroDivisionError("in a task")
        time.sleep(0.001)

    with pytest.raises(ZeroDivisionError, match="in a task"):
        threads.parallel(task, 10_000)
    assert len(seen) < 10_000
    threads.parallel(meeting(4), 4)  # and all threads still serve


def test_a_call_from_within_a_task_runs_in_that_task():
    ran_in = {}

    def task(outer):
        def inner(index):
            time.sleep(0.001)  # time for an idle thread to take the next one, if it could
            ran_in[outer, index] = threading.current_thread()

        threads.parallel(inner, 5)
        assert {ran_in[outer, index] for index in range(5)} == {threading.current_thread()}

    threads.parallel(task, 2)
    assert len(ran_in) == 10


def test_several_callers_share_the_workers():
    sums = [0] * 6

    def caller(which):
        found = []
        threads.parallel(found.append, 200)
        sums[which] = sum(found)

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(20)
    assert sums == [199 * 100] * 6


def test_the_callers_error_state_goes_along():
    zero = np.zeros(4)
    meet = meeting(4)

    def divide(index):
        meet(index)
        return zero / zero

    with np.errstate(invalid="ignore"):
        threads.parallel(divide, 4)  # pytest makes warnings errors
    with np.errstate(invalid="raise"), pytest.raises(FloatingPointError):
        threads.parallel(divide, 4)


def test_scratch_belongs_to_a_thread_and_is_reused():
    def address(name, shape):
        return threads.scratch(name, shape, np.float32).__array_interface__["data"][0]

    first = address("a", (10, 10))
    assert address("a", (5, 4)) == first
    assert address("b", (10, 10)) != first
    found, meet = [], meeting(4)

    def task(index):
        meet(index)
        found.append(address("a", (10, 10)))

    threads.parallel(task, 4)
    assert len(set(found)) == 4
    assert threads.scratch("a", (2, 3), np.float64).shape == (2, 3)


def test_no_memory_of_a_job_is_kept_once_it_is_done():
    busy, free = meeting(5), threading.Event()

    def occupy(index):
        busy(index)
        free.wait(20)

    occupier = threading.Thread(target=threads.parallel, args=(occupy, 4))
    occupier.start()
    busy(0)  # all three workers and the other caller are in a task now
    array = np.ones(10)
    gone = weakref.ref(array)
    threads.parallel(lambda index, array=array: array.sum(), 8)  # so this caller does it alone
    del array
    gc.collect()
    still_there = gone()
    free.set()
    occupier.join(20)
    assert still_there is None


def test_large_scratch_is_given_back():
    large = threads.scratch("large", (threads.KEPT_BYTES + 1,), np.uint8)
    gone = weakref.ref(large)
    del large
    assert gone() is None


@pytest.mark.skipif(blas._limit() is None, reason="NumPy's BLAS library is not known here")
def test_products_get_their_threads_back_when_the_last_pass_is_done():
    get, put = blas._limit()
    before = get()
    try:
        put(2)
        blas.hold("one")
        blas.hold("another")
        blas.release("one")
        assert get() == 1
        threads.set_num_threads(3)  # for later: the other pass goes on
        assert (get(), blas.num_threads()) == (1, 3)
        blas.release("another")
        assert get() == 3
    finally:
        put(before)


def test_where_no_thread_can_be_started_the_caller_does_it_all(monkeypatch):
    monkeypatch.setattr(threads, "_workers", [])

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    seen = []
    threads.parallel(lambda index: seen.append(threading.current_thread()), 5)
    assert seen == [threading.current_thread()] * 5


def test_an_interrupt_waits_until_no_thread_writes_any_more():
    """A thread that writes for half a second more, while the caller is told to stop, twice."""
    wrote, begun = [], threading.Event()
    main = threading.get_ident()

    def task(index):
        if threading.get_ident() == main:
            begun.wait(20)
            raise KeyboardInterrupt
        begun.set()
        for _ in range(2):
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)  # reaches the main thread, where it waits
        time.sleep(0.3)
        wrote.append(index)

    with pytest.raises(KeyboardInterrupt):
        threads.parallel(task, 2)
    assert wrote
    assert blas._before is None
    threads.parallel(meeting(4), 4)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
def test_interrupts_at_any_moment_leave_nothing_behind():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    interrupted = 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for microseconds in range(1, 400):
            seen = []
            try:
                signal.setitimer(signal.ITIMER_REAL, microseconds * 1e-6)
                threads.parallel(seen.append, 50)
                time.sleep(0.01)  # where the pass was done before
            except KeyboardInterrupt:
                interrupted += len(seen) < 50
            assert blas._before is None
            assert not getattr(threads._local, "busy", False)
            threads.parallel(seen.append, 5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20
    threads.parallel(meeting(4), 4)


def test_an_error_keeps_nothing_alive_once_it_is_handled():
    array = np.ones(10)
    gone = weakref.ref(array)
    gc.disable()
    try:
        with contextlib.suppress(ZeroDivisionError):
            threads.parallel(lambda index, array=array: len(array) / 0, 8)
        del array
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(blas._limit() is None, reason="NumPy's BLAS library is not known here")
def test_products_have_one_thread_inside_and_their_own_number_again_after():
    get, put = blas._limit()
    before = get()
    try:
        put(2)
        inside = []
        threads.parallel(lambda index: inside.append(get()), 8)
        assert set(inside) == {1}
        assert get() == 2
        with contextlib.suppress(ZeroDivisionError):
            threads.parallel(lambda index: 1 / 0, 8)
        assert get() == 2
    finally:
        put(before)


def test_the_number_of_threads_can_be_set():
    limit = blas._limit()
    before = limit[0]() if limit else 1
    try:
        threads.set_num_threads(3)
        assert threads.num_threads() == 3
        for wrong in (0, -1, 1.5, "many", None):
            with pytest.raises(ValueError, match=r"set_num_threads: .* at least 1"):
                threads.set_num_threads(wrong)
        assert threads.num_threads() == 3
    finally:
        blas.set_num_threads(before)


def python(code, strict=True, **environment):
    """Return what a new interpreter says when it runs `code`, or the file of that name.

    strict: warnings are errors.
    """
    options = ["-X", "dev", *(["-W", "error"] if strict else [])]
    run = subprocess.run(
        [sys.executable, *options, *([code] if code.endswith(".py") else ["-c", code])],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return run.stdout.strip(), run.stderr


@pytest.mark.skipif(blas._limit() is None, reason="NumPy's BLAS library is not known here")
@pytest.mark.parametrize("count", ["1", "3"])
def test_the_environment_sets_the_number_of_threads_of_kernels_and_products(count):
    code = """
import tinygrad_bn as tg
from tinygrad_bn.kernels.cpu import blas
print(blas.num_threads(), tg.get_num_threads())
"""
    assert python(code, **{threads.VARIABLE: count}) == (f"{count} {count}", "")


@pytest.mark.parametrize("value", ["0", "-1", "abc", "1.5", " "])
def test_a_number_of_threads_that_is_none_is_refused_at_the_import(value):
    _, said = python("import tinygrad_bn", **{threads.VARIABLE: value})
    assert f"ValueError: {threads.VARIABLE}: {value!r} threads; expected an integer" in said


def test_an_empty_variable_is_none():
    code = "import tinygrad_bn as tg; print(tg.get_num_threads())"
    assert python(code, **{threads.VARIABLE: ""}) == (str(threads.available_cpus()), "")


@pytest.mark.skipif(blas._limit() is None, reason="NumPy's BLAS library is not known here")
def test_products_use_no_more_threads_than_the_processors_given(monkeypatch):
    get, put = blas._limit()
    before = get()
    monkeypatch.setattr(threads, "_count", None)
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(threads, "available_cpus", lambda: 3)
    try:
        put(2)
        assert (threads.num_threads(), get()) == (3, 2)  # who wants fewer has them
        monkeypatch.setattr(threads, "_count", None)
        put(5)
        assert (threads.num_threads(), get()) == (3, 3)
    finally:
        put(before)


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 4), (0.5, 1), (1.0, 1), (1.5, 2), (3.01, 4), (64.0, 4)]
)
def test_processors_are_those_of_affinity_and_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: {0, 1, 5, 9}, raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert threads.available_cpus() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own():
    threads.parallel(meeting(4), 4)
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            threads.parallel(meeting(4), 4)
            status = 0
        os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_no_lock_that_another_thread_holds_is_locked_in_a_forked_child():
    held, release = threading.Event(), threading.Event()

    def hold():
        with blas._lock, threads._lock, memory._lock:
            held.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        locks = blas._lock, threads._lock, memory._lock
        os._exit(sum(not lock.acquire(timeout=1) for lock in locks))
    release.set()
    holder.join(20)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


FORK_WHILE_OTHERS_WORK = """
import os, sys, threading, time
import numpy as np
import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import unusable_because, use_kernels
from tinygrad_bn.kernels.cpu import blas, memory, threads

threads.set_num_threads(2)
stop = threading.Event()
x = np.ones((300, 300), np.float32)

def train():
    while not stop.is_set():
        threads.parallel(lambda index: (x @ x).sum(), 6)

trainers = [threading.Thread(target=train) for _ in range(3)]
for trainer in trainers:
    trainer.start()
failed = 0
for i in range(20):
    while blas._limit() and blas._before is None:
        time.sleep(0)  # until a pass is under way
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert blas._before is None
            ready = threading.Barrier(2, timeout=10)
            threads.parallel(lambda index: ready.wait(), 2)
            assert blas.num_threads() in (2, None)
            status = 0
        finally:
            os._exit(status)
    failed += os.waitpid(child, 0)[1] != 0
stop.set()
for trainer in trainers:
    trainer.join()
print(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_one_thread_is_free_of_what_the_others_were_doing():
    environment = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}
    out, err = python(FORK_WHILE_OTHERS_WORK, strict=False, **environment)
    assert (out, err) == ("0", "")


WORKERS = """
import multiprocessing
import numpy as np
import tinygrad_bn as tg

def work(seed):
    x = tg.Tensor(np.random.default_rng(seed).standard_normal((300, 300)), requires_grad=True)
    (x @ x).sum().backward()
    return float(x.grad.data.sum())

if __name__ == "__main__":
    here = [work(i) for i in range(4)]
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        assert pool.map(work, range(4)) == here
        print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_worker_processes_of_any_kind_compute_the_same(tmp_path, method):
    (tmp_path / "workers.py").write_text(WORKERS.format(method=method))
    code = str(tmp_path / "workers.py")
    environment = {"PYTHONWARNINGS": "ignore::DeprecationWarning", threads.VARIABLE: "2"}
    assert python(code, strict=False, **environment) == ("same", "")


ENDINGS = {
    "idle threads": "threads.parallel(lambda i: None, 3)",
    "a first pass in a finalizer at the end": """
import os, sys

class Late:
    def __del__(self, threads=threads, write=os.write, ending=sys.is_finalizing):
        seen = []
        threads.parallel(seen.append, 3)
        write(1, str((ending(), sorted(seen))).encode())

late = Late()  # lives until the modules go
""",
    "a pass in an exit handler": """
import atexit
atexit.register(threads.parallel, lambda i: None, 3)
""",
    "a thread in the middle of a pass": """
def train():
    while True:
        threads.parallel(lambda i: np.ones(1000).sum(), 3)

threading.Thread(target=train, daemon=True).start()
time.sleep(0.2)
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_at_once_and_without_a_word(ending):
    code = "import threading, time\nimport numpy as np\n"
    code += "from tinygrad_bn.kernels.cpu import threads\nthreads.set_num_threads(3)\n"
    out, err = python(code + ENDINGS[ending])
    assert err == ""
    assert out == ("(True, [0, 1, 2])" if "finalizer" in ending else "")


def results_of_kernels():
    """Return outputs and gradients of ops whose kernels add up what several threads have summed."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return tg.Tensor(rng.standard_normal(shape), requires_grad=True)

    x, scale, shift = drawn(64, 6, 48, 48), drawn(6), drawn(6)
    rows, weight, filters = drawn(600, 64), drawn(64), drawn(4, 6, 3, 3)
    found = []
    for out, inputs in (
        (F.batch_norm(x, weight=scale, bias=shift, training=True), (x, scale, shift)),
        (F.layer_norm(rows, (64,), weight), (rows, weight)),
        (F.conv2d(x, filters), (x, filters)),
        (rows.T @ rows, (rows,)),
    ):
        g = tg.Tensor(rng.standard_normal(out.shape))
        found += [out.numpy(), *(h.numpy() for h in tg.grad(out, inputs, g))]
    return found


@pytest.mark.parametrize("family", ["numba", "numpy"])
def test_results_do_not_depend_on_which_thread_comes_first(monkeypatch, family):
    """To the bit, in float64: the order of a sum is that of its parts, not of their ends."""
    if reason := unusable_because(family):
        pytest.skip(reason)
    order = np.random.default_rng(1)
    asked = []

    def shuffled(task, count):
        asked.append(count)
        for index in order.permutation(count):
            task(int(index))

    with use_kernels(family):
        expected = results_of_kernels()
        for name, module in list(sys.modules.items()):
            if name.startswith("tinygrad_bn.kernels.cpu") and hasattr(module, "parallel"):
                monkeypatch.setattr(module, "parallel", shuffled)
        for _ in range(4):
            for result, same in zip(results_of_kernels(), expected, strict=True):
                np.testing.assert_array_equal(result, same)
    assert max(asked) > 1
