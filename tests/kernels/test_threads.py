"""The threads of the CPU kernels: every index once, errors, nesting, forks, and their number."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from tinygrad_bn.kernels.cpu import blas, threads


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


@pytest.mark.parametrize(
    ("value", "expected"), [("3", "3"), ("0", "ValueError"), ("x", "ValueError")]
)
def test_the_environment_sets_the_number_of_threads(value, expected):
    code = (
        "from tinygrad_bn.kernels.cpu import threads\n"
        "try: print(threads.num_threads())\n"
        "except ValueError as error: print('ValueError', error)"
    )
    environment = {**os.environ, threads.VARIABLE: value}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(expected)
    if expected == "ValueError":
        assert threads.VARIABLE in run.stdout


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
    ],
)
def test_the_quota_of_the_control_group_is_read(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._quota(str(tmp_path)) == expected
    monkeypatch.setattr(threads, "_quota", lambda: 0.5)
    assert threads.available_cpus() == 1


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
