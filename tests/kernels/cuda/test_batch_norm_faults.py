"""Faults planted in the text of the CUDA kernels: a few fixed inputs find each of them out.

The inputs are those of `difference`: a fault that they did not see could live in the kernels. None
of the faults writes out of bounds, which would take the tests down with it.
"""

import numpy as np
import pytest

from tests.kernels.cuda import shim
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import batch_norm as kernel
from tinygrad_bn.kernels.cuda import channel_teams, launch
from tinygrad_bn.kernels.cuda.channel_teams import Plan
from tinygrad_bn.ops.batch_norm import batch_norm

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))

(rule,) = (r.function for r in batch_norm.rules)

#: Runs, and columns; each in teams of three blocks that keep a part, and in two launches.
SHAPES = {"runs": ((370, 3, 20), 1), "columns": ((53, 12), 4)}


def unwritten(shape, dtype=float):
    """Return what `empty` does, but NaN: never what another run left there."""
    made = np.zeros(shape, dtype)
    made.view(np.uint8).fill(0xFF)
    return made


def difference(form, teams, offset, backwards=False):
    """Return how far the kernels are from the generic form, relative to the largest entry."""
    shape, tile = SHAPES[form]
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, *shape)).astype(np.float32)
    x += np.float32(offset)
    weight, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    options = {"axis": (1,), "eps": 1e-3}
    plan = Plan(tile, members=3, teams=2, kept=1)
    runtime = shim.ShimRuntime(
        shim.DEVICE._replace(shared=2**19, shared_per_block=2**17), backwards
    )
    with (
        shim.small_tiles(teams),
        launch.use_runtime(runtime),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(channel_teams, "plan", lambda *arguments: plan)
        patch.setattr(np, "empty", unwritten)
        with use_kernels("generic"):
            out, saved = batch_norm.call_with_residuals(x, weight, bias, **options)
        statistics = saved["mean"], saved["var"]
        call = (g, x, weight, bias, None, *statistics)
        needs = {"groups": 1, "needs": (True, True, True)}
        want = [out, *statistics, *rule(*call, **options, **needs)]
        done = kernel.forward(x, weight, bias, **options)
        found = done.residuals["mean"], done.residuals["var"]
        got = [done.out, *found, *kernel.vjp(*call, **options, **needs)[:3]]
    worst = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, want, strict=False)]
    return float(np.nan_to_num(np.max(worst), nan=np.inf))


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("teams", [True, False])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_the_kernels_as_they_are_agree(form, teams, offset):
    assert difference(form, teams, offset) < 1e-5


#: What is replaced by what, and where it shows: runs or columns, teams or two launches, an offset.
FAULTS = {
    "the last vectors of a share left out": (
        "(int)((end - place - 1) / THREADS) + 1",
        "(int)((end - place) / THREADS)",
        "runs",
        False,
        0,
    ),
    "the last rows of a share left out": (
        "(int)((end - row - 1) / lanes) + 1",
        "(int)((end - row) / lanes)",
        "columns",
        False,
        0,
    ),
    "the step from run to run without its carry": ("at += carry;", "", "runs", False, 0),
    "no barrier before the sums are read": (
        "    lanes = half;\n  }\n  __syncthreads();",
        "    lanes = half;\n  }",
        "columns",
        False,
        0,
    ),
    "no barrier between the steps of a sum": (
        "int half = (lanes + 1) / 2;\n    __syncthreads();",
        "int half = (lanes + 1) / 2;",
        "columns",
        False,
        0,
    ),
    "the odd lane left out of a sum": ("(lanes + 1) / 2", "lanes / 2", "columns", False, 0),
    "a warp summed to half": ("int by = 16; by > 0", "int by = 16; by > 1", "runs", False, 0),
    "sums of the first block alone": (
        "member < shape.members; member += lanes",
        "member < 1; member += lanes",
        "runs",
        False,
        0,
    ),
    "sums in float32": (
        "double d = (double)real(x.at[j]) - shifts[lane];",
        "float d = (float)real(x.at[j]);",
        "runs",
        False,
        1e4,
    ),
    "no shift": (
        "double d = (double)real(x.at[j]) - shifts[lane];",
        "double d = (double)real(x.at[j]);",
        "runs",
        False,
        0,
    ),
    "the mean's low part dropped": (
        "(Real)(beta - (mean * unit - made.high) * scale)",
        "(Real)beta",
        "runs",
        False,
        1e4,
    ),
    "a column given its neighbour's channel": (
        "return COLUMNS ? (x * VECTOR + j)",
        "return COLUMNS ? (x * VECTOR)",
        "columns",
        False,
        0,
    ),
    "the x̂ term missing from gx": ("tilt = -slope * sum_gx", "tilt = 0 * sum_gx", "runs", False, 0),
    "the mean of g left in gx": ("level = -slope * sum_g", "level = 0 * sum_g", "runs", False, 0),
    "teams that do not wait": (
        "while (((before ^ *(volatile unsigned*)arrived) & 0x80000000u) == 0) __nanosleep(32);",
        "",
        "runs",
        True,
        0,
    ),
    "a barrier that expects one block too many": (
        "0x80000000u - (unsigned)(members - 1)",
        "0x80000000u - (unsigned)members",
        "runs",
        True,
        0,
    ),
    "a thread's vectors kept in its neighbour's place": (
        "stash[k * THREADS] = pack;",
        "stash[k * THREADS + 1] = pack;",
        "runs",
        True,
        0,
    ),
    "coefficients read before the team has them": (
        "tile[slot] = finish(slot, sums); });\n  team_barrier(arrived, team, shape.members);",
        "tile[slot] = finish(slot, sums); });",
        "columns",
        True,
        0,
    ),
    "every team's tiles from the first": ("int t = mine;", "int t = 0;", "runs", True, 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_out(name, monkeypatch):
    right, wrong, form, teams, offset = FAULTS[name]
    source = launch.source
    planted = []

    def faulty(file, **defines):
        text = source(file, **defines)
        planted.append(right in text)
        return text.replace(right, wrong)

    monkeypatch.setattr(launch, "source", faulty)
    try:
        found = max(difference(form, teams, offset, backwards) for backwards in (False, True))
    except shim.DeadlockError:
        found = np.inf
    assert any(planted), "the text has changed: plant the fault anew"
    assert found > 1e-5
