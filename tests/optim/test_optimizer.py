"""Groups, options, versions and saved state: what all optimizers share."""

import copy

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray
from tinygrad_bn import nn, optim

MAKERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, 0.9, 0.01, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.1, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, 0.1),
}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def parameters(*values, device=None):
    return [nn.Parameter(np.asarray(v, "float64"), device=device) for v in values]


def step(optimizer, params, seed):
    rng = np.random.default_rng(seed)
    for p in params:
        p.grad = tg.tensor(rng.normal(size=p.shape), device=p.device)
    optimizer.step()


@every_kind
def test_a_backward_that_needs_the_old_values_raises(make):
    (p,) = parameters([1.0, 2.0])
    loss = (p * p).sum()
    p.grad = tg.ones_like(p)
    make([p]).step()
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


@every_kind
def test_what_has_no_gradient_is_passed_over_and_stays_valid(make):
    used, unused = parameters([1.0], [2.0])
    loss = (unused * unused).sum()
    optimizer = make([used, unused])
    used.grad = tg.ones_like(used)
    optimizer.step()
    assert unused.tolist() == [2.0]
    loss.backward()  # its version did not move
    assert list(optimizer.state_dict()["state"]) == [0]
    optimizer.zero_grad()
    assert used.grad is unused.grad is None


@every_kind
def test_steps_are_not_recorded(make):
    (p,) = parameters([1.0])
    step(make([p]), [p], 0)
    assert p.is_leaf
    assert p.requires_grad


def test_groups_have_options_of_their_own():
    a, b, c = parameters([1.0], [1.0], [1.0])
    optimizer = optim.SGD([{"params": [a, b]}, {"params": c, "lr": 0.5}], lr=0.1)
    for p in (a, b, c):
        p.grad = tg.ones_like(p)
    optimizer.step()
    np.testing.assert_allclose([a.item(), b.item(), c.item()], [0.9, 0.9, 0.5])
    assert optimizer.lr == 0.1
    optimizer.lr = 0.2
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    optimizer.param_groups[1]["lr"] = np.float64(0.0)
    optimizer.step()
    np.testing.assert_allclose([a.item(), c.item()], [0.7, 0.5])
    optimizer.add_param_group({"params": parameters([1.0]), "momentum": 0.5})
    assert optimizer.param_groups[2]["momentum"] == 0.5
    assert repr(optimizer).startswith("SGD(lr=0.2, momentum=0.0")


@every_kind
def test_a_generator_and_a_single_tensor_will_do(make):
    layer = nn.Linear(2, 2)
    assert len(make(layer.parameters()).param_groups[0]["params"]) == 2
    assert len(make(layer.weight).param_groups[0]["params"]) == 1


@pytest.mark.parametrize("change", [{"lr": -1}, {"momentum": -0.1}, {"weight_decay": float("nan")}])
def test_options_set_between_steps_are_checked(change):
    (p,) = parameters([1.0])
    optimizer = optim.SGD([p], 0.1)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=f"SGD: {next(iter(change))} is"):
        step(optimizer, [p], 0)
    assert p.item() == 1.0


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: optim.SGD(p, -0.1), ValueError, "SGD: lr is -0.1, expected a finite number"),
        (lambda p: optim.SGD(p, float("inf")), ValueError, "lr is inf"),
        (lambda p: optim.SGD(p, 0.1, -1), ValueError, "momentum is -1"),
        (lambda p: optim.SGD(p, 0.1, weight_decay=-1), ValueError, "weight_decay is -1"),
        (lambda p: optim.SGD(p, 0.1, nesterov=True), ValueError, "nesterov=True needs a momentum"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), ValueError, r"Adam: betas is \(0.9, 1.0\)"),
        (lambda p: optim.Adam(p, eps=-1), ValueError, "eps is -1"),
        (lambda p: optim.AdamW(p, lr=-1), ValueError, "AdamW: lr is -1"),
        (lambda p: optim.SGD([], 0.1), ValueError, r"no parameters; pass model\.parameters"),
        (lambda p: optim.SGD([np.ones(2)], 0.1), TypeError, "parameter 0 is a ndarray"),
        (lambda p: optim.SGD([p[0] * 2], 0.1), ValueError, "is the result of an op"),
        (lambda p: optim.SGD([*p, *p], 0.1), ValueError, r"parameter 1 of shape \(1,\) was given"),
        (lambda p: optim.SGD([{"params": p}, {"params": p}], 0.1), ValueError, "was given twice"),
        (lambda p: optim.SGD([{"params": p, "rl": 1}], 0.1), ValueError, r"options \['rl'\]"),
        (lambda p: optim.SGD([{"lr": 1}], 0.1), TypeError, "mappings with 'params'"),
        (lambda p: optim.SGD([{"params": p}, p[0]], 0.1), TypeError, "got Parameter as a group"),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(parameters([1.0]))


def test_a_gradient_of_another_shape_is_refused():
    (p,) = parameters([1.0, 2.0])
    p.grad = tg.ones(1)
    with pytest.raises(
        ValueError, match=r"SGD\.step: a parameter of shape \(2,\) has a gradient of"
    ):
        optim.SGD([p], 0.1).step()


@every_kind
def test_saved_state_continues_to_the_bit(make):
    a = parameters([1.0, 2.0], [[3.0]])
    first = make(a)
    for i in range(3):
        step(first, a, i)
    b = parameters(*[p.numpy() for p in a])
    second = make(b)
    second.lr = 7.0
    second.load_state_dict(first.state_dict())
    assert second.lr == 0.1
    for i in range(3, 6):
        step(first, a, i)
        step(second, b, i)
    for p, q in zip(a, b, strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy())


@every_kind
def test_deepcopy_with_its_model_continues_to_the_bit(make):
    model = nn.Linear(2, 2)
    pair = (model, make(model.parameters()))
    step(pair[1], list(model.parameters()), 0)
    twin = copy.deepcopy(pair)
    for net, optimizer in (pair, twin):
        step(optimizer, list(net.parameters()), 1)
    np.testing.assert_array_equal(twin[0].weight.numpy(), model.weight.numpy())
    step(twin[1], list(twin[0].parameters()), 2)
    assert (twin[0].weight.numpy() != model.weight.numpy()).any()


def test_state_that_does_not_fit_is_listed_and_not_loaded():
    a, b = parameters([1.0], [1.0, 2.0]), parameters([1.0, 2.0])
    first, second = optim.Adam(a, 0.1), optim.Adam(b, 0.2)
    step(first, a, 0)
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        second.load_state_dict(first.state_dict())
    for part in ("groups of [2] parameters, expected [1]", "exp_avg of parameter 0 has shape (1,)"):
        assert part in str(caught.value)
    assert second.lr == 0.2
    assert second.state_dict()["state"] == {}


@every_kind
def test_devices_agree_and_state_follows_a_model_that_moves(strict_gpu, make):  # noqa: F811
    cpu, gpu = parameters([1.0, 2.0], 3.0), parameters([1.0, 2.0], 3.0, device="cuda")
    optimizers = make(cpu), make(gpu)
    for i in range(3):
        step(optimizers[0], cpu, i)
        step(optimizers[1], gpu, i)
    for p, q in zip(cpu, gpu, strict=True):
        assert type(q.data) is StrictArray
        np.testing.assert_array_equal(p.numpy(), q.numpy())
    layer = nn.Linear(2, 2)
    optimizer = make(layer.parameters())
    step(optimizer, list(layer.parameters()), 0)
    layer.to("cuda")
    step(optimizer, list(layer.parameters()), 1)
    assert type(layer.weight.data) is StrictArray
