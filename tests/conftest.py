"""The Hypothesis profile: TINYGRAD_BN_PROFILE is dev, ci or nightly; ci where CI is set."""

import os

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
