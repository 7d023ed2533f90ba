"""No two threads reach for the same memory without an order, whichever is the first to run."""

import re

import pytest

from tests.kernels.cuda import shim, test_batch_norm_faults, test_network_faults
from tinygrad_bn.kernels.cuda import launch

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))


def batch_norm(form, teams):
    return lambda: test_batch_norm_faults.difference(form, teams, 0)


def network(run):
    return lambda: test_network_faults.difference(run)


RUNS = {
    "runs, two launches": batch_norm("runs", False),
    "runs, teams": batch_norm("runs", True),
    "columns, two launches": batch_norm("columns", False),
    "columns, teams": batch_norm("columns", True),
    **{run.__name__: network(run) for run in test_network_faults.RUNS},
}


@pytest.fixture(autouse=True)
def ordered(monkeypatch):
    monkeypatch.setattr(shim, "ShimRuntime", shim.Ordered)


@pytest.mark.parametrize("name", RUNS)
def test_every_access_has_its_order(name):
    assert RUNS[name]() < 1e-4


#: What is planted, in which file and which of its places, and where it shows.
FAULTS = {
    "no barrier between the steps of a sum": (
        "common.cuh",
        "__syncthreads();",
        1,
        "runs, two launches",
    ),
    "no barrier before a sum is read": ("common.cuh", "__syncthreads();", 2, "columns, teams"),
    "no barrier before coefficients": (
        "batch_norm.cu",
        "__syncthreads();",
        0,
        "runs, two launches",
    ),
    "no barrier before gradients": ("batch_norm.cu", "__syncthreads();", 1, "runs, two launches"),
    "a block that arrives before it is done": (
        "batch_norm_teams.cu",
        "__syncthreads();",
        0,
        "runs, teams",
    ),
    "a block of which one thread waits": (
        "batch_norm_teams.cu",
        "__syncthreads();",
        1,
        "runs, teams",
    ),
    "sums that were not released": ("batch_norm_teams.cu", "__threadfence();", 0, "runs, teams"),
    "sums read from a cache of its own": ("batch_norm.cuh", "__ldcg", 0, "runs, teams"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_order_is_found_out(name, monkeypatch):
    file, what, place, run = FAULTS[name]
    text = (launch.FOLDER / file).read_text(encoding="utf-8").rpartition('.cuh"\n')[2]
    at = [found.start() for found in re.finditer(re.escape(what), text)][place]
    wrong = text[:at] + ("*" if what == "__ldcg" else "") + text[at + len(what) :]
    source = launch.source
    planted = []

    def faulty(file, **defines):
        right = source(file, **defines)
        planted.append(text in right)
        return right.replace(text, wrong)

    monkeypatch.setattr(launch, "source", faulty)
    with pytest.raises(shim.RaceError, match=r"unordered|not read by __ldcg"):
        RUNS[run]()
    assert any(planted)
