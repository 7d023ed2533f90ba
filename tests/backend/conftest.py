"""The stand-in for a GPU, plugged into the seam for the length of a test."""

import pytest

from tests.backend.strict_array import StrictArray, strict_backend
from tinygrad_bn.backend import ARRAY_TYPES, cuda, register_backend


@pytest.fixture
def strict_gpu(monkeypatch):
    """Register StrictArray, and have device "cuda" mean it."""
    register_backend(strict_backend)
    monkeypatch.setattr(cuda, "unavailable_because", lambda: None)
    monkeypatch.setattr(cuda, "_registered", lambda: strict_backend)
    yield strict_backend
    del ARRAY_TYPES[StrictArray]
