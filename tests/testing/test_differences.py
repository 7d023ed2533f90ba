import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn.testing.differences import derivative

EPSILON = float(np.finfo(float).eps)

KNOWN = {
    "exp": (math.exp, 1.0),
    "sin": (lambda t: math.sin(3 * t + 1), 3 * math.cos(1.0)),
    "rational": (lambda t: 1 / (1.5 + t), -1 / 1.5**2),
    "polynomial": (lambda t: (1 + t) ** 7, 7.0),
    "steep": (lambda t: math.tanh(1e3 * t + 0.5), 1e3 / math.cosh(0.5) ** 2),
}


@pytest.mark.parametrize("name", KNOWN)
@given(exponent=st.integers(-6, 2))
def test_error_is_within_truncation_and_noise(name, exponent):
    phi, want = KNOWN[name]
    found = derivative(phi, 2.0**exponent)
    # Each value of φ is right to half a unit or so of numbers about 1 (7 multiplications at most).
    noise = 4 * EPSILON * max(1.0, abs(phi(0.0)))
    assert abs(found.value - want) <= 4 * found.truncation + 16 * noise * found.gain
    assert 4 * found.truncation + 16 * noise * found.gain <= 1e-5 * abs(want)


def test_steps_outside_the_domain_are_passed_over():
    with np.errstate(invalid="ignore"):
        found = derivative(lambda t: float(np.log(np.float64(0.01 + t))), 1.0)
    assert found.value == pytest.approx(100.0, rel=1e-6)


def test_nowhere_finite_is_infinitely_uncertain():
    assert derivative(lambda t: math.nan, 1.0).truncation == math.inf


def test_linear_function_is_exact_after_two_steps():
    calls = []
    found = derivative(lambda t: (calls.append(t), 3 * t)[1], 0.25, 0.0)
    assert found.value == 3.0
    assert found.truncation == 0.0
    assert len(calls) == 4


@pytest.mark.parametrize("distance", [0.0, 1e-3, 1e-2])
def test_kink_is_seen_at_the_point_and_not_beside_it(distance):
    found = derivative(lambda t: abs(t + distance) + math.sin(t), 0.25)
    if distance:
        # Extrapolated from steps that do not reach it.
        assert abs(found.jump) <= 1e-3
        assert found.value == pytest.approx(2.0, rel=1e-6)
    else:
        assert found.jump == pytest.approx(2.0, rel=1e-6)


def test_gain_is_the_deviation_that_noise_causes():
    rng = np.random.default_rng(0)
    found = [derivative(lambda t: 3 * t + 1e-3 * rng.normal(), 0.25) for _ in range(400)]
    scaled = [(d.value - 3) / (1e-3 * d.gain) for d in found]
    # Unit deviation; above it at most 3/2, since noise also decides which entry is taken.
    assert 0.2 < np.std(scaled) < 1.5
