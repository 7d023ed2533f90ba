"""How tensors are shared out among teams: never more blocks than are resident at once."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cuda import shim
from tinygrad_bn.kernels.cuda import batch_norm, channel_teams, launch
from tinygrad_bn.kernels.cuda.channel_teams import THREADS, Job, Plan, plan
from tinygrad_bn.kernels.cuda.channel_tiles import Loads, View, view_of

#: An H100: bytes of shared memory that one of four blocks of a multiprocessor has, and blocks.
SHARED, RESIDENT = 233472 // 4 - 1024, 528


def seen(groups, rows, channels, inner, itemsize=4):
    columns = inner * itemsize < 256
    wide = min(16 // itemsize, 4) if columns else 16 // itemsize
    view = View((0, 1, 2), (groups * rows, channels, inner), groups, rows, channels, inner, ())
    return view, Loads(wide, columns, wide // math.gcd(wide, inner))


def job(loads, tensors, itemsize=4):
    return Job(tensors, 2, 4 if tensors == 1 else 7, loads.vector * itemsize, 4)


@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize(
    "sizes", [(256, 64, 3136), (64, 256, 3136), (256, 2048, 49), (256, 20, 576), (8192, 4096, 1)]
)
def test_a_plan_keeps_most_of_each_tile_on_the_chip_of_an_h100(sizes, tensors):
    view, loads = seen(1, *sizes)
    found = plan(view, loads, job(loads, tensors), SHARED, RESIDENT)
    vectors = view.values * found.tile // loads.vector
    width = found.tile * view.inner // loads.vector if loads.columns else 1
    assert found.kept * (THREADS // width * width) * found.members >= 0.85 * vectors
    assert found.teams * found.members >= 0.9 * RESIDENT  # and keeps it busy


@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 3000),
    quarters=st.integers(1, 300),
    inner=st.sampled_from([1, 2, 3, 4, 49, 64, 100]),
    tensors=st.sampled_from([1, 2]),
    resident=st.integers(1, 600),
    shared=st.sampled_from([16384, 30000, SHARED]),
)
def test_a_plan_fits(groups, rows, quarters, inner, tensors, resident, shared):
    view, loads = seen(groups, rows, 4 * quarters, inner)
    work = job(loads, tensors)
    found = plan(view, loads, work, shared, resident)
    assert found.teams * found.members <= resident
    assert found.members >= 1 and found.teams >= 1 and found.kept >= 0
    lanes = loads.vector if loads.columns else 1
    bytes_ = found.kept * tensors * 16 * THREADS + 16 * THREADS * lanes
    assert bytes_ + 4 * work.coefficients * found.tile <= shared
    assert found.tile * inner % loads.vector == 0
    if loads.columns:
        assert found.tile * inner // loads.vector <= THREADS


@pytest.fixture
def tiny():
    if shim.missing() is not None:
        pytest.skip(shim.missing())
    with shim.small_tiles(), launch.use_runtime(shim.ShimRuntime()) as runtime:
        yield runtime


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ((40, 9, 64), Plan(tile=1, members=3, teams=2, kept=2)),
        ((700, 8), Plan(tile=4, members=4, teams=1, kept=1)),
        ((90, 20, 2), Plan(tile=6, members=3, teams=3, kept=0)),
        ((70, 20, 2), Plan(tile=20, members=12, teams=1, kept=99)),
        ((11, 4, 8), Plan(tile=1, members=1, teams=3, kept=0)),
    ],
)
def test_teams_agree_with_two_launches(tiny, shape, chosen, relu, monkeypatch):
    """Every way through: a tile after another, blocks that wait, vectors kept and read again."""
    monkeypatch.setattr(channel_teams, "plan", lambda *arguments: chosen)
    roomy = shim.ShimRuntime(shim.DEVICE._replace(shared=2**19, shared_per_block=2**17))
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, *shape)).astype(np.float32)
    residual = rng.standard_normal(shape).astype(np.float32) if relu else None
    weight, bias = rng.standard_normal((2, shape[1])).astype(np.float32)

    def both():
        options = {"axis": (1,), "eps": 1e-5, "relu": relu}
        done = batch_norm.normalized(x, weight, bias, None, residual, **options)
        saved = done.residuals["mean"], done.residuals["var"]
        call = (g, x, weight, bias, None, *saved, done.out if relu else None)
        return done.out, *batch_norm.gradients(*call, **options, needs=(True, True, True))

    with launch.use_runtime(roomy):
        by_teams = both()
    assert [name for name, *_ in roomy.launched] == ["forward_teams", "backward_teams"]
    monkeypatch.setattr(batch_norm, "teams_for", lambda *arguments: None)
    for a, b in zip(by_teams, both(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def test_blocks_that_cannot_wait_for_each_other_are_left_to_two_launches(tiny):
    x = np.random.default_rng(0).standard_normal((16, 4, 8)).astype(np.float32)
    alone = shim.ShimRuntime(shim.DEVICE._replace(cooperative=False))
    with launch.use_runtime(alone):
        batch_norm.forward(x, axis=(1,), eps=1e-5)
    batch_norm.forward(x, axis=(1,), eps=1e-5)
    assert [name for name, *_ in alone.launched] == ["forward_sums", "forward_apply"]
    assert [name for name, *_ in tiny.launched] == ["forward_teams"]


@pytest.mark.parametrize("blocks", [0, 1, 3, 8])
def test_blocks_share_the_memory_of_a_multiprocessor_as_many_as_it_holds(tiny, blocks, monkeypatch):
    """A kernel of many registers leaves room for few blocks, which then have more memory each."""
    most = lambda function, threads, shared: min(blocks, tiny.device.shared // max(1, shared))  # noqa: E731
    monkeypatch.setattr(tiny, "resident_blocks", most)
    monkeypatch.setattr(tiny, "device", tiny.device._replace(shared=12000, shared_per_block=9000))
    x = np.zeros((40, 8, 64), np.float32)
    teams = channel_teams.teams_for("forward_teams", view_of(x, (1,), 1), (x,), False, 1, 4)
    assert (teams is None) == (blocks == 0)
    if teams is None:
        return
    assert teams.shared == {1: 8992, 3: 4000, 8: 2992}[blocks]
    assert teams.plan.teams * teams.plan.members <= 3 * min(blocks, channel_teams.RESIDENT)
