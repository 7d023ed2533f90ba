"""The pytest plugin: fixture `tg_backend`, marker `gpu`, option `--require-gpu`, profiles.

It is loaded in every project of an environment that has tinygrad_bn, so it does nothing there by
itself: it imports pytest alone (backends when a test asks for one, Hypothesis never), leaves alone
a marker `gpu` that a project declares as its own, and loads no profile.

    pytest -p tinygrad_bn.testing.pytest_plugin     where the package is not installed
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tinygrad_bn.testing.backends import RunsOn

_MARKER = "gpu: needs a CUDA device and CuPy (tinygrad_bn); skipped with the reason without them"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--require-gpu`."""
    with contextlib.suppress(ValueError):  # a project that has such an option keeps its own
        parser.getgroup("tinygrad_bn").addoption(
            "--require-gpu",
            action="store_true",
            default=False,
            help="fail, rather than skip, tests marked gpu where there is none",
        )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; have the profiles registered as soon as Hypothesis is imported."""
    config.addinivalue_line("markers", _MARKER)
    _when_imported("hypothesis", "tinygrad_bn.testing.profiles", "register_profiles")


# --- gpu -----------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked gpu where there is none, or fail it under `--require-gpu`."""
    if item.get_closest_marker("gpu") is not None and not _is_someone_elses(item.config):
        _need_gpu(item.config)


def _need_gpu(config: pytest.Config) -> None:
    reason = importlib.import_module("tinygrad_bn.testing.backends").no_gpu_because()
    if reason is None:
        return
    if config.getoption("require_gpu", False):
        raise _NoGpu(f"--require-gpu: {reason}", pytrace=False)
    pytest.skip(f"needs a GPU: {reason}")


class _NoGpu(pytest.fail.Exception):
    """The failure of a test that needs a GPU, under `--require-gpu`."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Report the want of a GPU as a failure of the test, not as an error of its set-up."""
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, _NoGpu):
        report.when = "call"
    return report


def _is_someone_elses(config: pytest.Config) -> bool:
    """Return whether the project or another plugin declares a marker `gpu` of its own."""
    names = [line.partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")]
    return names.count("gpu") > 1


# --- backends ------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `tg_backend` once for each backend and kernel family."""
    if "tg_backend" not in metafunc.fixturenames:
        return
    if any(
        "tg_backend" in str(m.args[:1]) for m in metafunc.definition.iter_markers("parametrize")
    ):
        return  # the test says itself on which
    backends = importlib.import_module("tinygrad_bn.testing.backends")
    choices: Sequence[RunsOn] = backends.available()
    metafunc.parametrize(
        "tg_backend",
        [
            pytest.param(c, id=c.name, marks=[pytest.mark.gpu] if c.device == "cuda" else [])
            for c in choices
        ],
        indirect=True,
    )


@pytest.fixture
def tg_backend(request: pytest.FixtureRequest) -> Iterator[RunsOn]:
    """Return a backend: its `device`, kernel `family`, `array` and `tensor`.

    During the test, device and family are in force. A test that takes it runs on the CPU with each
    kernel family that can be used, and on a GPU (marked `gpu`, so skipped with the reason where
    there is none).
    """
    if request.param.device == "cuda":
        _need_gpu(request.config)
    with request.param.in_force():
        yield request.param


# --- profiles ------------------------------------------------------------------------------------


def _when_imported(name: str, module: str, function: str) -> None:
    """Call a function of another module once module `name` has been imported, or now if it has.

    Importing Hypothesis takes as long as starting pytest, and most projects do without.
    """
    if sys.modules.get(name) is not None:
        getattr(importlib.import_module(module), function)()
    elif not any(isinstance(f, _Watcher) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(name, module, function))


class _Watcher(importlib.abc.MetaPathFinder):
    """Waits for the import of a module, then steps aside for good."""

    def __init__(self, name: str, module: str, function: str):
        self.name = name
        self.call = module, function

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, *self.call)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads with another loader, puts that one back in its place, and calls the function."""

    def __init__(self, loader: Any, module: str, function: str):
        self.loader = loader
        self.call = module, function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _when_imported(module.__name__, *self.call)
