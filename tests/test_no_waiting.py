"""A training step never makes the host wait for a GPU: nothing is read back between steps.

`TRAFFIC` of the stand-in counts what is read back, what with CuPy would wait to learn a size, and
what is copied from the host.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import TRAFFIC
from tinygrad_bn import functional as F
from tinygrad_bn import nn, optim

pytestmark = pytest.mark.usefixtures("strict_gpu")

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 2, 8, 8)).astype("float32")
LABELS = RNG.integers(0, 3, 8)

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, 0.1),
}
SCHEDULES = {
    "cosine": lambda optimizer: optim.CosineSchedule(optimizer, 10, warmup=2),
    "one cycle": lambda optimizer: optim.OneCycle(optimizer, 10),
}


def network(norm):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(4, 4, 3, groups=2, stride=2),
        nn.AvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def traffic_of_steps(model, step, steps=3):
    """Return what three steps of training transferred, after two that may set things up."""
    for _ in range(2):
        step(model)
    TRAFFIC.clear()
    for _ in range(steps):
        step(model)
    return dict(TRAFFIC)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_with_any_optimizer_and_schedule(make, schedule):
    model = network(nn.BatchNorm2d(4)).to("cuda")
    optimizer = make(model.parameters())
    rates = schedule(optimizer)
    x, labels = tg.tensor(IMAGES, device="cuda"), tg.tensor(LABELS, device="cuda")

    def step(model):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        rates.step()
        model.zero_grad()

    assert traffic_of_steps(model, step) == {}


NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "keras, no scale": lambda: nn.BatchNorm2d(4, convention="keras", axis=1, scale=False),
    "ghost batches": lambda: nn.BatchNorm2d(4, groups=2),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "frozen": lambda: nn.BatchNorm2d(4).freeze(),
    "evaluation": lambda: nn.BatchNorm2d(4).eval(),
    "sizes left open": lambda: nn.BatchNorm2d(None),
    "renorm": lambda: nn.BatchRenorm(4, warmup=None),
    "renorm opening": lambda: nn.BatchRenorm(4, warmup=(1, 3, 3)),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer norm": lambda: nn.LayerNorm((4, 8, 8)),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_step_with_any_norm(make):
    model = network(make()).to("cuda")
    x, labels = tg.tensor(IMAGES, device="cuda"), tg.tensor(LABELS, device="cuda")
    optimizer = optim.SGD(model.parameters(), 0.1)

    def step(model):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    assert traffic_of_steps(model, step) == {}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_with_a_mask(groups, momentum):
    bn = nn.BatchNorm2d(4, groups=groups, momentum=momentum).to("cuda")
    x = tg.tensor(RNG.normal(size=(8, 4, 3, 3)), device="cuda", requires_grad=True)
    mask = tg.tensor(RNG.random((8, 1, 1, 1)) < 0.7, device="cuda")

    def step(bn):
        bn(x, mask).exp().sum().backward()

    assert traffic_of_steps(bn, step) == {}
    assert bn.num_batches_tracked.item() == 5


def test_losses_accuracy_and_gradients_of_gradients():
    def step(model):
        logits = tg.Tensor(values, requires_grad=True)
        hot = F.one_hot(labels, 3)
        loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits, hot)
        (g,) = tg.grad(loss, logits, create_graph=True)
        tg.grad((g * g).sum(), logits)
        F.accuracy(logits, labels)
        logits[labels]  # an index of integers

    values = tg.tensor(RNG.normal(size=(8, 3)), device="cuda")
    labels = tg.tensor(LABELS, device="cuda")
    assert traffic_of_steps(None, step) == {}


def test_dropout_copies_its_mask_to_the_gpu_and_waits_for_nothing():
    x = tg.ones(8, 8, device="cuda", requires_grad=True)
    step = lambda model: F.dropout(x, 0.5).sum().backward()  # noqa: E731
    assert traffic_of_steps(None, step) == {"write": 3}


def test_what_asks_for_a_value_is_counted():
    x = tg.ones(3, device="cuda")
    TRAFFIC.clear()
    x.sum().item(), x.tolist(), x.numpy(), float(x[0]), bool(x[0])
    assert TRAFFIC == {"read": 5}


# --- checks of data ------------------------------------------------------------------------------

WRONG = {
    "cross_entropy": lambda x, i: F.cross_entropy(x, i),
    "one_hot": lambda x, i: F.one_hot(i, 3),
    "getitem": lambda x, i: x[i],
    "getitem of the second axis": lambda x, i: x[..., i],
    "getitem after an integer": lambda x, i: x[:, None][:, 0, i],
    "assignment": lambda x, i: x.__setitem__(i, 0.0),
}


@pytest.mark.parametrize("use", WRONG)
def test_data_is_checked_on_a_gpu_only_where_asked_for(use):
    x = tg.ones(3, 3, device="cuda")
    good, bad = (tg.tensor(i, device="cuda") for i in ([0, 2, 1], [0, 3, 1]))
    TRAFFIC.clear()
    for index in (good, bad):
        try:
            WRONG[use](x, index)
        except IndexError:
            assert index is bad  # NumPy, which computes for the stand-in, does not wrap round
    assert not TRAFFIC
    with tg.check_data():
        WRONG[use](x, good)
        with pytest.raises((ValueError, IndexError), match="range from 0 to 3"):
            WRONG[use](x, bad)
        with tg.check_data(False):
            TRAFFIC.clear()
            WRONG[use](x, good)
            assert not TRAFFIC


@pytest.mark.parametrize(("value", "checked"), [("1", True), ("0", False), ("", False)])
def test_the_environment_asks_for_checks(value, checked):
    code = (
        "from tests.backend.strict_array import *\n"
        "from tests.backend.conftest import *\n"
        "from tinygrad_bn.backend import extremes\n"
        "register_backend(strict_backend)\n"
        "print(extremes(strict(np.array([3, 1]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "TINYGRAD_BN_CHECK_DATA": value,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ("(1, 3)" if checked else "None")


def test_checks_and_capture_exclude_each_other():
    step = tg.capture(lambda x, i: F.cross_entropy(x, i))
    x, labels = tg.ones(3, 3, device="cuda"), tg.tensor([0, 1, 2], device="cuda")
    with tg.check_data(), pytest.raises(tg.CaptureError, match="checks data"):
        step(x, labels)
