"""The table of benchmarks: its verdicts, what is missing, and that the README shows the results."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch):
    """The script, imported as it imports its neighbours: from its own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    yield report
    for name in ("report", "_checkout"):
        sys.modules.pop(name, None)


def median(value):
    return {"median": value, "low": value, "high": value}


def row(step, fast, plain, peak, first):
    return {
        "step": median(step),
        "tinygrad_bn [fast] over it": median(fast),
        "tinygrad_bn over it": median(plain),
        "peak MB": peak,
        "first step": first,
    }


@pytest.fixture
def results():
    machine = {
        "date": "2026-01-02 03:04 UTC",
        "cpu": "a CPU",
        "threads": 2,
        "memory": "8 GiB",
        "system": "Linux x86_64",
        "python": "CPython 3.11.7",
        "numpy": "2.0.0",
    }
    rows = {
        "tinygrad_bn [fast]": row(30.0, 1.0, 1.8, 200, 5.0) | {"first step, again": 0.5},
        "torch": row(60.0, 0.5, 0.9, 400, 0.1),
        "compile": row(40.0, 0.75, 1.35, 500, 24.0),
    }
    growth = [
        {"library": "tinygrad_bn", "over proportional": median(value)} for value in (1.0, 0.9, 1.05)
    ]
    return {
        "training_step": {"machine": machine, "batch": 256, "layouts": {"NCHW": rows}},
        "small_ops": {"machine": machine, "geometric mean": 0.7},
        "growth": {
            "machine": machine,
            "step": growth,
            "tape summary": {"tinygrad_bn": {"exponent": 1.2}},
        },
    }


def verdicts(report, results):
    return {(bar.name, bar.unit): (bar.value, bar.verdict) for bar in report.bars(results)}


def test_an_aim_is_met_up_to_its_limit_and_missed_beyond_it_by_so_much(report):
    assert report.Bar("a", 0.5, 0.5, "").verdict == "met"
    assert report.Bar("a", 0.6, 0.5, "").verdict == "**missed** by 20%"
    assert report.Bar("a", None, 0.5, "").verdict == "not measured"


def test_the_best_peer_is_the_one_over_which_our_ratio_is_largest(report, results):
    found = verdicts(report, results)
    name = "tutorial step, NCHW, `[fast]`"
    assert found[name, "× PyTorch eager"] == (0.5, "met")
    assert found[name, "× the best peer"] == (0.75, "**missed** by 7%")
    assert found["peak memory, NCHW, `[fast]`", "× PyTorch eager's"] == (0.5, "met")


def test_growth_is_that_of_the_largest_batch_and_the_tapes_exponent(report, results):
    found = verdicts(report, results)
    assert found["step, from 64 to 4096 images", "× proportional"] == (1.05, "met")
    tape = next(key for key in found if key[0].startswith("tape"))
    assert found[tape] == (1.2, "**missed** by 9%")


def test_what_was_not_measured_is_said_not_hidden(report, results):
    found = verdicts(report, results)
    assert found["import", "× `import numpy`"] == (None, "not measured")
    assert found["tutorial step, NHWC, `[fast]`", "× PyTorch eager"] == (None, "not measured")
    assert verdicts(report, {}).keys() == found.keys()
    assert {verdict for _, verdict in verdicts(report, {}).values()} == {"not measured"}


def test_the_section_names_machine_versions_day_libraries_and_first_steps(report, results):
    text = report.section(results)
    assert text.startswith("Measured on 2026-01-02: a CPU, 2 threads, 8 GiB, Linux x86_64")
    assert "numpy 2.0.0" in text
    assert "| tinygrad_bn, with `[fast]` | 30.0 | 1.00 | 5.0 (0.5 again) | 200 |" in text
    assert "| `torch.compile` | 40.0 | 0.75 | 24.0 | 500 |" in text
    assert "| chain of 1,000 small ops | 0.70 | 0.80 | × PyTorch eager | met |" in text


def test_the_section_goes_between_the_marks_and_nowhere_else(report):
    begin, end = report.MARKS
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    new = report.with_section(text, r"a \1 b")
    assert new == f"before\n{begin}\na \\1 b\n{end}\nafter\n"
    assert report.with_section(new, r"a \1 b") == new
    with pytest.raises(ValueError, match="lacks the marks"):
        report.with_section("no marks", "new")


def test_the_readme_shows_the_results_that_are_there(report):
    readme = report.README.read_text()
    assert report.with_section(readme, report.section(report.load(report.RESULTS))) == readme


def test_the_picture_is_drawn_of_whatever_was_measured(report, results, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(results, tmp_path / "all.png")
    report.draw({}, tmp_path / "none.png")
    assert (tmp_path / "all.png").stat().st_size > 0
    assert (tmp_path / "none.png").stat().st_size > 0
