"""Fixtures for all tests."""

import pytest

from tinygrad_bn.op import REGISTRY


@pytest.fixture
def own_ops():
    """Take the ops that a test defines out of the registry again."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
