"""The GPU benchmark where there is no GPU: its floors, its table, its picture, and what it says."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend import strict_array
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.kernels.cuda import shim
from tests.kernels.cuda.strict_runtime import strict_kernels
from tinygrad_bn import functional as F

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """The script and its neighbours, imported from their own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import _gpu
    import _gpu_steps  # noqa: F401
    import gpu

    yield gpu, _gpu
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_floor_is_passes_over_bandwidth(scripts):
    _, pure = scripts
    norm = pure.Norm((256, 64, 56, 56))
    # docs of the case: 3 and 5 passes over 205.5 MB at 2990 GB/s
    assert norm.floor("forward", 2.99e12) == pytest.approx(0.206, abs=5e-4)
    assert norm.floor("backward", 2.99e12) == pytest.approx(0.344, abs=5e-4)
    half = pure.Norm((256, 64, 56, 56), dtype="bfloat16")
    assert half.floor("forward", 2.99e12) == pytest.approx(0.103, abs=5e-4)
    assert len({norm.name for norm in pure.NORMS}) == len(pure.NORMS)


def test_the_table_and_the_roofline_leave_out_what_was_not_measured(scripts, tmp_path):
    _, pure = scripts
    norm = pure.NORMS[0]
    results = {norm.name: {"forward": {"tinygrad_bn": 0.2, "torch": 0.5}}}
    ((name, phase, floor, ours, share, torch, ratio, *rest),) = pure.norm_rows(results, 2.99e12)
    assert (name, phase, floor, ours) == (norm.name, "forward", "0.206", "0.200")
    assert (share, torch, ratio, rest) == ("1.03", "0.500", "0.40", ["", ""])
    assert len(pure.NORM_HEADERS) == 9
    ours, theirs = pure.roofline(results)
    assert ours[:2] == ("tinygrad_bn", "forward")
    assert ours[3] / theirs[3] == pytest.approx(2.5)
    pure.draw_roofline(results, 2.99e12, "a GPU", tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 4, 5), 1), ((6, 4, 5, 3), -1)])
def test_the_formula_it_checks_against_is_batch_norm(scripts, shape, axis, relu):
    script, pure = scripts
    rng = np.random.default_rng(0)
    x, g, weight, bias = (rng.normal(size=s) for s in (shape, shape, (3,), (3,)))
    norm = pure.Norm(shape, axis, relu=relu)
    t = tg.Tensor(x, requires_grad=True)
    apply = F.batch_norm_relu if relu else F.batch_norm
    y = apply(t, None, None, tg.Tensor(weight), tg.Tensor(bias), True, eps=1e-5, axis=axis)
    (gx,) = tg.grad(y, t, tg.Tensor(g))
    for channel in range(3):
        expected = script.formula(norm, x, g, weight, bias, channel)
        found = [np.take(a.numpy(), channel, axis=axis) for a in (y, gx)]
        assert pure.disagreement(found, expected) < 1e-12


def test_a_replayed_step_is_the_step(scripts, strict_gpu):  # noqa: F811
    import _gpu_steps
    import _steps

    results = []
    for step in (_gpu_steps.TinygradGpu, _gpu_steps.TinygradGraph):
        made = step(_steps.start_values(), "NCHW", tg.get_num_threads())
        made.load(*_steps.draw_noise(4))
        results.append(made.results())
    assert made.captured.graphs == 1
    plain, replayed = results
    assert plain.keys() == replayed.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(replayed[name], array, err_msg=name)


class Event:
    """An event of CUDA: all that was recorded before has been done by then."""

    record = synchronize = lambda self: None


def stand_in_for_cupy():
    """Return what the script takes from CuPy, on the stand-in's arrays."""

    class Generator:
        def __init__(self, seed):
            self.rng = np.random.default_rng(seed)

        def standard_normal(self, size, dtype):
            return strict_array.StrictArray(self.rng.standard_normal(size, dtype))

    device = SimpleNamespace(attributes={"L2CacheSize": 1000})
    cuda = SimpleNamespace(
        Device=lambda: device,
        Event=Event,
        get_elapsed_time=lambda start, end: 0.25,
        runtime=SimpleNamespace(getDeviceProperties=lambda index: {"name": b"a stand-in"}),
    )
    module = ModuleType("cupy")
    module.__getattr__ = lambda name: getattr(strict_array.xp, name)
    module.cuda, module.__version__ = cuda, "0"
    module.random = SimpleNamespace(default_rng=Generator)
    return module


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))
def test_the_whole_script_runs_and_writes_what_it_found(
    scripts, quick, monkeypatch, capsys, tmp_path
):
    script, pure = scripts
    norms = (
        pure.Norm((6, 4, 5, 5)),
        pure.Norm((6, 5, 4, 4), -1, relu=True),
        pure.Norm((8, 4), dtype="float16"),
        pure.Norm((8, 8), dtype="bfloat16"),
    )
    for module in (script, pure):
        monkeypatch.setattr(module, "NORMS", norms)
    monkeypatch.setattr(script, "COPIED", 4096)
    monkeypatch.setattr(script, "FLUSHED", 4096)
    monkeypatch.setattr(script, "usable", lambda: {"tinygrad_bn"})
    monkeypatch.setitem(sys.modules, "cupy", stand_in_for_cupy())
    monkeypatch.setattr(strict_array.StrictArray, "get", strict_array.plain, raising=False)
    output = tmp_path / "deep" / "gpu.json"
    arguments = ["--rounds", "1", "--batches", "4", "--output", str(output)]
    with strict_kernels() as runtime:
        assert script.main([*arguments, *["--quick"] * quick]) == 0
    assert {"forward_teams", "backward_teams", "convolve", "sgd"} <= set(runtime.work)
    printed = capsys.readouterr().out
    assert "a stand-in: copies" in printed and "products in float32" in printed
    assert all(norm.name in printed for norm in norms)
    assert output.exists() == (not quick)
    if not quick:
        found = json.loads(output.read_text())
        assert found["norms"][norms[0].name]["forward"] == {"tinygrad_bn": 0.25}
        assert found["steps"]["4"] == {"tinygrad_bn": 0.25, "tinygrad_bn graph": 0.25}
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_not_timed(scripts):
    script, pure = scripts
    norm = pure.Norm((6, 4, 5))
    x, g = np.random.default_rng(0).normal(size=(2, *norm.shape))
    host = [SimpleNamespace(get=lambda a=a: a) for a in (x, g, np.ones(4), np.zeros(4))]
    runs = {"forward": lambda: tg.Tensor(x), "backward": lambda: (tg.Tensor(g),)}
    with pytest.raises(AssertionError, match="off by"):
        script.check_norm(norm, runs, host)


def test_disagreement_is_relative_and_sees_nan(scripts):
    _, pure = scripts
    assert pure.disagreement([np.array([1.0, 98.0])], [np.array([0.0, 100.0])]) == 0.02
    assert pure.disagreement([np.array([np.nan])], [np.array([1.0])]) == np.inf


@pytest.mark.skipif(tg.cuda_is_available(), reason="needs a machine without a usable GPU")
def test_without_a_gpu_it_says_what_is_missing(scripts, capsys):
    script, _ = scripts
    assert script.main(["--quick"]) == 0
    assert "Nothing measured, there is no GPU to measure: CuPy is" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    assert "--norms" in capsys.readouterr().out
