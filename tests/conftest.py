"""Hypothesis profiles, chosen by TINYGRAD_BN_PROFILE: dev, ci or nightly (ci where CI is set).

deadline=None throughout: the first example pays for imports and caches, and a shared machine is
slow at times; neither is a fault.
"""

import os

import pytest
from hypothesis import Phase, settings

from tinygrad_bn.op import REGISTRY

settings.register_profile("tinygrad_bn_dev", max_examples=20, deadline=None)
# The same examples in every run: a change is then to blame for a new failure, not the dice.
settings.register_profile(
    "tinygrad_bn_ci", max_examples=25, deadline=None, derandomize=True, print_blob=True
)
# `explain` reruns a failing test many times, which a long run cannot afford.
settings.register_profile(
    "tinygrad_bn_nightly",
    max_examples=1000,
    deadline=None,
    print_blob=True,
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
_DEFAULT = "ci" if os.environ.get("CI") else "dev"
settings.load_profile(f"tinygrad_bn_{os.environ.get('TINYGRAD_BN_PROFILE', _DEFAULT)}")


@pytest.fixture
def own_ops():
    """Take the ops that a test defines out of the registry again."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
