"""The Hypothesis profile: TINYGRAD_BN_PROFILE is dev, ci or nightly; ci where CI is set.

And, in a Python that can do without the global lock, a look at whether that stayed off.
"""

import os
import sys
import sysconfig

import pytest
from hypothesis import settings

from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing.profiles import register_profiles

register_profiles()
_DEFAULT = "ci" if os.environ.get("CI") else "dev"
settings.load_profile(f"tinygrad_bn_{os.environ.get('TINYGRAD_BN_PROFILE', _DEFAULT)}")


@pytest.fixture
def own_ops():
    """Take the ops that a test defines out of the registry again."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def _global_lock_is_on():
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def pytest_report_header():
    return f"Python's global lock is {'on' if _global_lock_is_on() else 'off'}"


@pytest.fixture(autouse=True, scope="session")
def the_global_lock_stays_off():
    """Fail at the end if some package has brought the lock back, and PYTHON_GIL=1 has not."""
    yield
    if sysconfig.get_config_var("Py_GIL_DISABLED") and os.environ.get("PYTHON_GIL") != "1":
        assert not _global_lock_is_on()
