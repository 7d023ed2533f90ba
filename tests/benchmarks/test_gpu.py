"""The GPU benchmark where there is no GPU: its floors, its table, its picture, and what it says."""

import sys
from pathlib import Path

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
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
