"""The pytest plugin in projects of other people: in their own process, with their own settings."""

import os
import sys
import tomllib
from pathlib import Path

import pytest

import tinygrad_bn as tg
from tinygrad_bn.testing.backends import available

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
PLUGIN = "tinygrad_bn.testing.pytest_plugin"
WITHOUT_GPU = pytest.mark.skipif(tg.cuda_is_available(), reason="there is a GPU")


@pytest.fixture
def project(pytester, monkeypatch):
    """Return a function that runs pytest on the files of a project; no plugin but those named."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("PYTEST_ADDOPTS", "TINYGRAD_BN_PROFILE", "CI"):
        monkeypatch.delenv(name, raising=False)

    def run(test, *args, plugins=(PLUGIN,), **files):
        pytester.makepyfile(test_it=test, **files)
        named = [part for plugin in plugins for part in ("-p", plugin)]
        return pytester.runpytest_subprocess("-rs", "-W", "error", *named, *args)

    return run


@pytest.fixture
def installed(tmp_path, monkeypatch, project):
    """Make tinygrad_bn look installed, with the entry points of pyproject.toml."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    points = declared["project"]["entry-points"]["pytest11"]
    info = tmp_path / "site" / "tinygrad_bn-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tinygrad_bn\nVersion: 0.1.0\n")
    lines = [f"{name} = {module}\n" for name, module in points.items()]
    (info / "entry_points.txt").write_text("".join(["[pytest11]\n", *lines]))
    (info / "RECORD").write_text("tinygrad_bn/__init__.py,,\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(info.parent), str(ROOT)]))
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")


GPU_TEST = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    raise AssertionError("it ran")

def test_elsewhere():
    pass
"""


# --- gpu -----------------------------------------------------------------------------------------


@WITHOUT_GPU
def test_gpu_tests_are_skipped_with_the_reason(project):
    result = project(GPU_TEST, "--strict-markers")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.re_match_lines([r"SKIPPED .*: needs a GPU: .*(CuPy|cupy)"])


@WITHOUT_GPU
def test_require_gpu_turns_the_skip_into_a_failure(project):
    result = project(GPU_TEST, "--require-gpu")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.re_match_lines([r".*--require-gpu: .*(CuPy|cupy)"])


def test_a_gpu_marker_that_the_project_declares_is_its_own(project, pytester):
    pytester.makeini("[pytest]\nmarkers = gpu: our own, for another library\n")
    result = project(GPU_TEST)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*it ran*"])


# --- backends ------------------------------------------------------------------------------------


def test_tg_backend_runs_a_test_on_every_backend(project):
    result = project(
        """
        import numpy as np
        import tinygrad_bn as tg
        from tinygrad_bn.backend import kernels

        def test_it(tg_backend):
            x = tg_backend.tensor(np.ones(3), requires_grad=True)
            assert x.device.startswith(tg_backend.device)
            assert kernels.chosen() == tg_backend.family
            assert tg.zeros(2).device.startswith(tg_backend.device)
            (x * 2).sum().backward()
            assert x.grad.device == x.device

        def test_after_it():
            assert kernels.chosen() is None
        """,
        "-v",
    )
    on_cpu = [on for on in available() if on.device == "cpu"]
    on_gpu = len(available()) - len(on_cpu)
    there = tg.cuda_is_available()
    result.assert_outcomes(
        passed=len(on_cpu) + 1 + (on_gpu if there else 0), skipped=0 if there else on_gpu
    )
    result.stdout.fnmatch_lines(["*test_it?cpu-generic? PASSED*", "*test_it?cpu-numpy? PASSED*"])


def test_a_test_may_choose_its_backends(project):
    result = project(
        """
        import pytest
        from tinygrad_bn.testing.backends import RunsOn

        @pytest.mark.parametrize("tg_backend", [RunsOn("cpu", "numpy")], indirect=True)
        def test_it(tg_backend):
            assert tg_backend.family == "numpy"
        """
    )
    result.assert_outcomes(passed=1)


# --- profiles ------------------------------------------------------------------------------------

PROFILES = """
import sys
assert "hypothesis" not in sys.modules
import hypothesis
from hypothesis import settings

BEFORE = settings().max_examples

def test_profiles_are_registered():
    for name, examples in (("dev", 20), ("ci", 25), ("nightly", 1000)):
        assert settings.get_profile(f"tinygrad_bn_{name}").max_examples == examples

def test_none_is_loaded():
    assert BEFORE == settings().max_examples == 100
    assert not settings.get_current_profile_name().startswith("tinygrad_bn")

def test_hypothesis_was_imported_as_always():
    assert hypothesis.__loader__ is hypothesis.__spec__.loader
    assert "tinygrad_bn" not in type(hypothesis.__loader__).__module__
    assert not any("tinygrad_bn" in type(f).__module__ for f in sys.meta_path)
"""


def test_profiles_are_registered_when_hypothesis_is_imported_and_none_is_loaded(
    project, monkeypatch
):
    for name in ("CI", "GITHUB_ACTIONS", "TF_BUILD", "BUILDKITE"):
        monkeypatch.delenv(name, raising=False)  # there Hypothesis loads a profile of its own
    project(PROFILES).assert_outcomes(passed=3)


def test_a_conftest_may_load_a_profile(project):
    result = project(
        """
        from hypothesis import settings

        def test_it():
            assert settings().max_examples == 1000
        """,
        conftest="""
        from hypothesis import settings
        from tinygrad_bn.testing.profiles import register_profiles

        register_profiles()
        settings.load_profile("tinygrad_bn_nightly")
        """,
    )
    result.assert_outcomes(passed=1)


def test_hypothesis_profile_may_name_one(project):
    result = project(
        """
        from hypothesis import settings

        def test_it():
            assert settings().max_examples == 1000
        """,
        "--hypothesis-profile=tinygrad_bn_nightly",
        plugins=("_hypothesis_pytestplugin", PLUGIN),
    )
    result.assert_outcomes(passed=1)


def test_projects_without_hypothesis_do_not_notice(project):
    result = project(
        """
        import pytest

        def test_it():
            with pytest.raises(ModuleNotFoundError):
                import hypothesis
        """,
        sitecustomize="import sys; sys.modules['hypothesis'] = None",
    )
    result.assert_outcomes(passed=1)


# --- harmless ------------------------------------------------------------------------------------


def test_the_plugin_itself_imports_nothing_but_pytest(project):
    result = project(
        """
        import sys

        def test_it():
            assert "hypothesis" not in sys.modules
            assert "tinygrad_bn.testing.backends" not in sys.modules
            assert "tinygrad_bn.functional" not in sys.modules
            assert "cupy" not in sys.modules and "numba" not in sys.modules
        """
    )
    result.assert_outcomes(passed=1)


def test_a_project_may_have_a_require_gpu_of_its_own(project):
    result = project(
        "def test_it(pytestconfig): assert pytestconfig.getoption('require_gpu') == 'theirs'",
        "--require-gpu=theirs",
        plugins=("theirs", PLUGIN),
        theirs="def pytest_addoption(parser): parser.addoption('--require-gpu')",
    )
    result.assert_outcomes(passed=1)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("plugins", [(), (PLUGIN,)], ids=["by itself", "and named by -p"])
def test_an_installed_entry_point_registers_the_plugin_once(project, plugins):
    result = project(
        """
        def test_it(pytestconfig):
            manager = pytestconfig.pluginmanager
            mine = [n for n, _ in manager.list_name_plugin() if n and "tinygrad_bn" in n]
            assert mine == ["tinygrad_bn.testing.pytest_plugin"]
        """,
        plugins=plugins,
    )
    result.assert_outcomes(passed=1)


@pytest.mark.usefixtures("installed")
def test_an_installed_entry_point_bears_a_conftest_that_names_the_plugin(project):
    result = project(
        "def test_it(tg_backend): pass",
        "-k",
        "cpu-generic",
        plugins=(),
        conftest=f"pytest_plugins = ['{PLUGIN}']",
    )
    result.assert_outcomes(passed=1, deselected=len(available()) - 1)


def test_this_project_loads_the_plugin(pytestconfig):
    assert pytestconfig.pluginmanager.hasplugin(PLUGIN)
    assert PLUGIN in sys.modules
