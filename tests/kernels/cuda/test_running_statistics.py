"""Running statistics moved by one launch, run on the CPU, against the array operations."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.kernels.cuda import shim
from tests.kernels.cuda.strict_runtime import strict_kernels
from tinygrad_bn import functional as F
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import launch, running_statistics
from tinygrad_bn.normalization import BatchStatistics

pytestmark = pytest.mark.usefixtures("served")

DTYPES = [np.dtype(d) for d in ("float32", "float64", "float16", ml_dtypes.bfloat16)]
#: From one number of a dtype to the next, relative: on a tie a sum in another order may decide.
STEP = {"float32": 2.0**-23, "float64": 2.0**-51, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def moved(family, statistics, running, momentum, correction):
    running = [tg.Tensor(a.copy()) for a in running]
    versions = [t.version[0] for t in running]
    with use_kernels(family):
        assert statistics.move(*running, momentum, correction) is True
    assert all(t.version[0] != v for t, v in zip(running, versions, strict=True))
    return [t.data for t in running]


@given(data=st.data())
def test_the_kernel_moves_as_the_array_operations_do(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=2), label="shape"))
    groups = data.draw(st.integers(1, 4), label="groups")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    kept = (groups, 1, *shape, 1) if groups > 1 else (1, *shape, 1)
    size = 10.0 ** data.draw(st.integers(-50, 300), label="size")  # beyond all dtypes but one
    mean, var = rng.normal(size=kept) * size, rng.random(kept) * size
    mean.flat[0] = data.draw(st.sampled_from([0.0, np.nan, np.inf, -np.inf]), label="first mean")
    running = [rng.normal(size=shape).astype(data.draw(st.sampled_from(DTYPES))) for _ in "mv"]
    momentum = data.draw(st.sampled_from([0, 1, 0.1, 1.0, 1 / 3]), label="momentum")
    if data.draw(st.booleans(), label="as an array"):
        momentum = np.asarray(momentum, data.draw(st.sampled_from(["float32", "float64"])))
    found = BatchStatistics(mean, var, data.draw(st.integers(1, 9), label="count"), groups)
    correction = data.draw(st.sampled_from([0.0, 1.0, 0.5]), label="correction")
    with np.errstate(all="ignore"):
        want = moved("generic", found, running, momentum, correction)
        got = moved("cuda", found, running, momentum, correction)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        wide = a.astype("float64"), b.astype("float64")
        scale = STEP[a.dtype.name]
        np.testing.assert_allclose(*wide, rtol=scale, atol=scale * 1e-3, equal_nan=True)


def test_it_is_one_launch_and_declines_what_it_cannot_read(served):
    mean, var = np.zeros((2, 1, 5))
    running = [np.zeros(5, "float32") for _ in "mv"]
    options = {"factor": 1.0, "groups": 1}
    before = len(served.launched)
    assert running_statistics.move(mean, var, *running, 0.1, **options)
    assert served.launched[before:] == [("move_statistics", 1, running_statistics.THREADS)]
    gaps = np.zeros(10, "float32")[::2]
    for change in (
        (mean.astype("longdouble"), var, *running, 0.1),
        (mean[:, :4], var, *running, 0.1),
        (mean, var, gaps, running[1], 0.1),
        (mean, var, running[0], np.zeros(5, "int64"), 0.1),
        (mean, var, *running, np.zeros(2)),
        (mean, var, *running, np.zeros((), "int64")),
    ):
        assert not running_statistics.move(*change, **options)
    none = np.zeros((2, 1, 0)), np.zeros((2, 0), "float32")
    assert running_statistics.move(*none[0], *none[1], 0.1, **options)
    assert len(served.launched) == before + 1


FAULTS = {
    "the mean alone": ("  move(running_var,", "  if (false) move(running_var,"),
    "the first group alone": ("group < groups", "group < 1"),
    "a sum for a mean": ("mean_sum / (double)groups", "mean_sum"),
    "the biased variance": ("* factor", ""),
    "no limit": ("if (moved > most)", "if (false)"),
    "the old value thrown away": ("(1 - momentum) * old + ", ""),
    "a step from the old value": (
        "(1 - momentum) * old + momentum * value",
        "old + momentum * (value - old)",
    ),
    "the last block left out": ("c >= channels", "c >= channels - 1"),
}


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_fault_is_found_out(name, monkeypatch):
    right, wrong = FAULTS.get(name, ("", ""))
    source = launch.source
    assert right in source("running_statistics.cu")
    monkeypatch.setattr(launch, "source", lambda f, **d: source(f, **d).replace(right, wrong))
    rng = np.random.default_rng(0)
    mean, var = rng.random((2, 3, 1, 5))
    mean[..., 3] = 1e300
    running = rng.random((2, 5)).astype("float32")
    var[..., 4] = 1e-20  # of which a step from the old value to the new one leaves nothing
    with launch.use_runtime(shim.ShimRuntime()):
        pairs = []
        for momentum in (0.1, 1.0):
            call = BatchStatistics(mean, var, 4, 3), running, momentum, 1.0
            pairs += zip(moved("cuda", *call), moved("generic", *call), strict=True)
    agree = all(np.allclose(a, b, rtol=1e-6, atol=0) for a, b in pairs)
    assert agree == (name is None)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_on_a_device_nothing_is_read_back(momentum):
    with strict_kernels() as runtime, tg.default_device("cuda"):
        bn = tg.nn.BatchNorm1d(3, momentum=momentum).to("cuda")
        bn(tg.ones(4, 3))
        runtime.work.clear()
        bn(tg.ones(4, 3) * 3)
        assert runtime.work.count("move_statistics") == 1
        assert "clip" not in runtime.work
        assert bn.running_mean.numpy()[0] == pytest.approx(2.0 if momentum is None else 0.39)


def test_a_mask_is_left_to_the_array_operations(served):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    running = np.zeros(3, "float32"), np.ones(3, "float32")
    before = len(served.launched)
    F.batch_norm(x, *running, training=True, mask=np.ones((6, 1)))
    assert "move_statistics" not in [name for name, *_ in served.launched[before:]]
    assert (running[0] != 0).all()
