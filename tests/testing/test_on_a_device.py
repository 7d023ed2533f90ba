"""The checkers on a GPU's arrays: differences are taken there, and only numbers come to the host.

Two stand-ins for a GPU refuse every implicit conversion and count transfers.
"""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import TRAFFIC, StrictArray
from tests.testing.planted import RIGHT, SHAPES, WRONG, WRONG_TWICE, draw
from tinygrad_bn import backend, nn, testing
from tinygrad_bn import functional as F
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing import GradCheckError, Inconclusive, check_double_grad, check_grad

pytestmark = pytest.mark.usefixtures("strict_gpu")

DEVICES = ["cuda:0", "cuda:1"]
CHECKERS = [
    check_grad,
    check_double_grad,
    testing.check_pure,
    testing.check_dtypes,
    testing.check_raw,
    testing.check_accumulation,
    testing.check_layouts,
    testing.check_backends,
]


def on(device, *arrays):
    return [None if a is None else backend.to_device(a, device) for a in arrays]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("check", CHECKERS, ids=lambda check: check.__name__)
def test_every_checker_passes_what_is_right(check, device):
    x, weight, bias = draw((4, 3, 2), (3,), (3,))
    check(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), *on(device, x, weight, bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RIGHT)
def test_right_rules_pass(name, device):
    inputs = on(device, *draw(*SHAPES[name]))
    assert check_grad(RIGHT[name], *inputs).resolution < 1e-6
    assert check_double_grad(RIGHT[name], *inputs).resolution < 1e-6


@pytest.mark.parametrize("name", ["sign", "missing factor"])
def test_wrong_rules_are_caught_and_explained(name):
    op, match = WRONG[name]
    with pytest.raises(GradCheckError, match=match) as caught:
        check_grad(op, *on("cuda:1", *draw(*SHAPES[op.name])))
    assert "device='cuda:1')" in str(caught.value)
    assert all(type(a) is StrictArray for a in caught.value.inputs)


def test_a_rule_that_freezes_is_caught_at_second_order():
    op = next(iter(WRONG_TWICE.values()))
    with pytest.raises(GradCheckError):
        check_double_grad(op, *on("cuda:0", *draw(*SHAPES[op.name])))


def test_a_kink_is_noticed():
    with pytest.raises(Inconclusive, match="kink"):
        check_grad(lambda x: x.relu(), *on("cuda:0", np.array([0.0, 1.0])))


def test_a_derivative_that_is_zero_everywhere_passes():
    assert check_grad(lambda x: x * 0.0, *on("cuda:0", *draw((3, 2)))).resolution == 0


@pytest.mark.parametrize("mode", ["directional", "full"])
def test_no_array_crosses_over_in_an_evaluation(mode, monkeypatch):
    (x,) = on("cuda:0", *draw((5, 7)))
    calls, numbers = [], []

    def fn(t):
        calls.append(1)
        return t.tanh()

    item = StrictArray.item
    monkeypatch.setattr(StrictArray, "item", lambda self: (numbers.append(1), item(self))[1])
    TRAFFIC.clear()
    check_grad(fn, x, mode=mode)
    directions = 35 if mode == "full" else 1
    assert len(calls) > 4 * directions
    assert TRAFFIC["write"] == directions + 1  # the directions, and the cotangent
    assert TRAFFIC["wait"] == 0
    # An evaluation gives one number; what is compared along a direction, a dozen more.
    assert TRAFFIC["read"] == len(numbers) < len(calls) + 12 * (directions + 1)


def test_backends_are_differenced_there():
    seen = []

    def fn(x):
        seen.append((x.device, str(x.dtype)))
        return x.exp()

    (x,) = draw((3,))
    report = testing.check_backends(fn, x.astype("float32"))
    assert ("cuda:0", "float32") in seen and ("cuda:0", "float64") in seen
    assert "kernels 'generic' on cuda differenced there" in report.notes


def test_a_rule_that_is_wrong_there_only_is_caught():
    tanh = REGISTRY["tanh"]

    def fn(x):
        scale = 1.0 if x.device == "cpu" else 1.001
        return tanh(x) * scale + (tanh(x) * (1 - scale)).detach()

    with pytest.raises(GradCheckError, match="cuda"):
        testing.check_backends(fn, *draw((3,)))


@pytest.mark.parametrize("device", DEVICES)
def test_modules(device):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4)).to(device)
    testing.check_module(module, *on(device, *draw((5, 3))))


def test_tensors_are_taken_where_they_are():
    x = tg.tensor(draw((3,))[0], device="cuda:1")
    check_grad(lambda t: t.exp() if t.device == "cuda:1" else t * 0, x)
