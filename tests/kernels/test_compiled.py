"""Functions compiled by Numba: their types, their cache on disk, threads, forks, and no Numba."""

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from tinygrad_bn.backend import kernels
from tinygrad_bn.kernels.cpu import compiled as module
from tinygrad_bn.kernels.cpu import threads
from tinygrad_bn.kernels.cpu.compiled import compiled

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]


@compiled()
def twice(value):
    return value + value


@compiled("T[:], T, out T[:]")
def scale(x, factor, y):
    for i in range(len(x)):
        y[i] = twice(factor * x[i])


@compiled("T[:, :], U[:], int, bool", sums=True)
def total(x, weights, rows, negative):
    result = 0.0
    for i in range(rows):
        for j in range(x.shape[1]):
            result += x[i, j] * weights[j]
    return -result if negative else result


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_function_runs_in_the_dtype_it_was_asked_for(dtype):
    x, y = np.array([1, 2.5, np.nan, -np.inf], dtype), np.empty(4, dtype)
    x.flags.writeable = False
    scale.of(x.dtype)(x, 2.0, y)
    np.testing.assert_array_equal(y, 4 * x)
    assert scale.of(x.dtype) is scale.of(x.dtype)


def test_it_can_be_called_in_python():
    y = np.empty(3)
    scale(np.ones(3), 2, y)
    assert y.tolist() == [4, 4, 4]


def test_letters_stand_for_dtypes_in_the_order_of_their_appearance():
    x, weights = np.arange(6.0).reshape(2, 3), np.array([1, 0, 2], np.uint8)
    assert total.of(np.float64, np.uint8)(x, weights, 2, True) == -(x @ weights).sum()
    with pytest.raises(ValueError):
        total.of(np.float64)


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_regrouped_sums_keep_nan_and_infinities(lost):
    x = np.ones((1, 1000))
    x[0, 700] = lost
    np.testing.assert_equal(total.of("f8", "f8")(x, np.ones(1000), 1, False), lost)


def test_arguments_of_other_types_are_refused():
    y = np.empty(2, np.float32)
    for wrong in (np.ones(2), np.ones(4, np.float32)[::2], np.ones((2, 2), np.float32)):
        with pytest.raises(TypeError, match="No matching definition"):
            scale.of(np.float32)(wrong, 2.0, y)
    y.flags.writeable = False
    with pytest.raises(TypeError, match="No matching definition"):
        scale.of(np.float32)(np.ones(2, np.float32), 2.0, y)


def test_a_signature_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"cannot read 'T\[\]'"):
        compiled("T[]")(lambda x: None).of(np.float32)


def test_it_runs_without_pythons_lock():
    """Two threads meet inside of compiled code, where neither could wait for the other's lock."""

    @compiled("out i8[:], int")
    def meet(here, me):
        for i in range(1, 1_000_000_000):
            here[me] = i
            if here[1 - me] != 0:
                return True
        return False

    function, here, met = meet.of(), np.zeros(2, np.int64), []
    runs = [threading.Thread(target=lambda i=i: met.append(function(here, i))) for i in (0, 1)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert met == [True, True]


def test_many_threads_may_ask_at_once_and_one_makes_it(monkeypatch):
    @compiled("T[:]")
    def first(x):
        return x[0]

    made = []
    make = module.Compiled._make
    monkeypatch.setattr(module.Compiled, "_make", lambda *a: made.append(1) or make(*a))
    found, barrier = [], threading.Barrier(4)

    def ask():
        barrier.wait()
        found.append(first.of(np.float32))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(set(map(id, found))) == len(made) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_waits_until_a_function_is_made_and_the_child_can_make_more():
    making, forked = threading.Event(), threading.Event()

    def hold():
        with module._making:
            making.set()
            assert not forked.wait(0.2), "the fork did not wait"

    holder = threading.Thread(target=hold)
    holder.start()
    making.wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            y = np.empty(1000, np.float32)
            run = total.of(np.float32, np.float32)
            threads.parallel(lambda i: run(y.reshape(1, -1), y, 1, False), 4)
            status = 0
        finally:
            os._exit(status)
    forked.set()
    holder.join()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# --- the cache ---------------------------------------------------------------------------------

PROGRAM = """
import numpy as np, os, signal, sys
from tinygrad_bn.kernels.cpu.compiled import compiled
assert "numba" not in sys.modules
from helper import add

if "LIMIT" in os.environ:
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
if "NUMBA" in os.environ:
    import numba
    numba.__version__ = os.environ["NUMBA"]

@compiled("T[:], out T[:]")
def plus(x, y):
    for i in range(len(x)):
        y[i] = add(x[i])

y = np.empty(3, np.float32)
plus.of(np.float32)(np.ones(3, np.float32), y)
print(y.tolist())
plus.of(np.float64)
"""
HELPER = """
from tinygrad_bn.kernels.cpu.compiled import compiled

@compiled()
def add(x):
    return x + {}
"""


@pytest.fixture
def program(tmp_path):
    """Return a function that runs a program with a cache folder, and what it said on stderr."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(increment=1, wait=True, limit=None, numba=None, **environment):
        (tmp_path / "helper.py").write_text(HELPER.format(increment))
        environment |= {"LIMIT": limit} if limit else {}
        environment |= {"NUMBA": numba} if numba else {}
        kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR",)}
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py")],
            env={**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return finished(process, increment) if wait else process

    return run


def finished(process, increment=1):
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out == f"{[1.0 + increment] * 3}\n"
    return err


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb[ic]")}


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_compiled_code_is_kept_in_the_users_cache_and_announced_once(program, tmp_path, variable):
    cache = {variable: str(tmp_path / "cache")}
    assert program(**cache).count("compiling CPU kernels") == 1
    first = files(tmp_path / "cache" / "tinygrad_bn")
    assert len(first) == 4  # two dtypes, an index and the code of each
    assert program(**cache) == ""
    assert files(tmp_path / "cache") == first
    assert not list(tmp_path.glob("__pycache__/*.nb[ic]"))


def test_a_change_in_another_file_that_a_function_calls_into_is_noticed(program, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    program(**cache)
    assert "compiling" in program(increment=2, **cache)
    assert program(increment=2, **cache) == ""


def test_processes_that_compile_at_once_do_not_disturb_each_other(program, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for process in [program(wait=False, **cache) for _ in range(4)]:
        finished(process)
    assert program(**cache) == ""


def test_a_folder_that_cannot_be_written_costs_one_warning(program, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = program(NUMBA_CACHE_DIR=str(tmp_path / "file"))
    assert said.count("cannot keep compiled code") == 1
    assert said.count("compiling CPU kernels") == 1


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage",
    [lambda text: b"", lambda text: text[: len(text) // 2], lambda text: b"\x80\x04damage."],
    ids=["empty", "cut off", "something else"],
)
def test_what_cannot_be_read_of_the_cache_is_made_again(program, tmp_path, suffix, damage):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    program(**cache)
    for path in files(tmp_path / "cache"):
        if path.name.endswith(suffix):
            path.write_bytes(damage(path.read_bytes()))
    said = program(**cache)
    assert "cannot keep" not in said
    assert said.count("compiling CPU kernels") == 1
    assert program(**cache) == ""


def test_a_full_disk_costs_one_warning_and_nothing_more_is_tried(program, tmp_path):
    """A process that may write no file longer than 64 bytes."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    said = program(limit="64", **cache)
    assert said.count("cannot keep compiled code") == 1
    assert said.count("compiling CPU kernels") == 1
    assert len(list((tmp_path / "cache" / "tinygrad_bn").iterdir())) == 1  # of the first function
    assert "cannot keep" not in program(**cache)
    assert program(**cache) == ""


def test_each_numba_has_code_of_its_own(program, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    program(**cache)
    assert "compiling" in program(numba="99.0", **cache)
    assert program(**cache) == ""
    assert program(numba="99.0", **cache) == ""


def test_a_numba_that_cannot_be_imported_is_reported_and_not_asked_again(monkeypatch):
    broken = types.ModuleType("importlib")
    broken.import_module = lambda name: 1 / 0
    monkeypatch.setattr(module, "importlib", broken)
    module.usable.cache_clear()
    try:
        with pytest.warns(UserWarning, match="works without Numba: division"):
            assert not module.usable()
        assert "cannot be imported: division" in kernels.unusable_because("numba")
        assert not module.usable()
    finally:
        kernels._reasons.clear()
        module.usable.cache_clear()
