"""Batch norm layers that are frozen, that compute a second time, or that wait for their size."""

import copy

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray
from tinygrad_bn import nn, optim


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(3, 2, shape).astype("float32")


def state(module):
    return {name: t.numpy().copy() for name, t in module.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# --- frozen ----------------------------------------------------------------------------------


def test_a_frozen_layer_evaluates_in_training_too_and_moves_nothing():
    bn = nn.BatchNorm1d(3)
    bn(draw((6, 3)))
    expected = copy.deepcopy(bn).eval()(draw((6, 3), 1)).numpy()
    before = state(bn)
    assert bn.freeze() is bn and bn.training
    for _ in range(2):  # train() does not thaw it
        np.testing.assert_array_equal(bn(draw((6, 3), 1)).numpy(), expected)
        bn.train()
    assert_same(state(bn), before)
    assert bn(draw((1, 3))).shape == (1, 3)
    assert "frozen=True" in repr(bn)
    bn.unfreeze()(draw((6, 3), 1))
    assert bn.num_batches_tracked.item() == 2 and "frozen" not in repr(bn)


def test_frozen_statistics_leave_the_parameters_to_train_unless_asked():
    bn = nn.BatchNorm1d(3).freeze()
    sgd = optim.SGD(bn.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def step():
        bn(tg.Tensor(draw((6, 3)), requires_grad=True)).sum().backward()
        sgd.step()

    step()
    assert (bn.weight.numpy() != 1).all()
    bn.freeze(parameters=True)  # .grad of the last step is still there
    before = state(bn)
    step()
    assert_same(state(bn), before)
    bn.unfreeze()
    step()
    assert (bn.weight.numpy() != before["weight"]).all()


def test_unfreezing_leaves_a_parameter_that_was_fixed_before():
    bn = nn.BatchNorm1d(3)
    bn.bias.requires_grad_(False)
    bn.freeze(parameters=True).freeze(parameters=True).unfreeze()
    assert bn.weight.requires_grad and not bn.bias.requires_grad


def test_without_statistics_there_is_nothing_to_freeze():
    with pytest.raises(ValueError, match="keeps no running statistics"):
        nn.BatchNorm1d(3, track_running_stats=False).freeze()


# --- computing again -------------------------------------------------------------------------

KEEPERS = [
    lambda: nn.BatchNorm1d(3),
    lambda: nn.BatchNorm1d(3, momentum=None),
    lambda: nn.BatchNorm1d(3, groups=2),
    lambda: nn.BatchRenorm(3, warmup=(0, 2, 2), r_max=1.5, d_max=0.5),
    lambda: nn.BatchRenorm(3, warmup=None, momentum=1.0),
]


@pytest.mark.parametrize("make", KEEPERS)
def test_computing_again_gives_the_same_and_moves_nothing(make):
    bn = make()
    bn.running_mean.data[...] = [1, 2, 3]
    for seed in range(3):
        x = draw((6, 3), seed)
        y = bn(x).numpy()
        after = state(bn)
        with bn.recomputing():
            np.testing.assert_array_equal(bn(x).numpy(), y)
            with bn.recomputing():
                bn(x)
            bn(x)
        assert_same(state(bn), after)
        assert bn.num_batches_tracked.item() == seed + 1


def test_an_error_inside_does_not_leave_the_statistics_off():
    bn = nn.BatchNorm1d(3)
    with pytest.raises(ValueError), bn.recomputing():
        bn(draw((1, 3)))
    bn(draw((6, 3)))
    assert bn.num_batches_tracked.item() == 1


def test_recomputing_reaches_every_layer_of_a_model():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchRenorm(3)),
    )
    x = draw((2, 3, 4, 4))
    before = state(model)
    context = nn.recomputing(model)  # nothing happens before it is entered
    model(x)
    assert model[0].num_batches_tracked.item() == 1
    after = state(model)
    assert (after["1.0.running_mean"] != before["1.0.running_mean"]).all()
    with context:
        model(x)
        model.eval()(x)
    assert_same(state(model), after)
    model.train()(x)
    assert model[1][1].num_batches_tracked.item() == 2


# --- lazy ------------------------------------------------------------------------------------

LAZY = [
    (lambda n: nn.BatchNorm1d(n), (6, 3), 3),
    (lambda n: nn.BatchNorm2d(n, axis=-1), (2, 4, 5, 3), 3),
    (lambda n: nn.BatchNorm(n, axis=(1, 3)), (5, 3, 2, 4), (3, 4)),
    (lambda n: nn.BatchNorm2d(n, convention="keras", center=False), (2, 4, 5, 3), 3),
    (lambda n: nn.BatchNorm1d(n, affine=False, track_running_stats=False), (6, 3), 3),
    (lambda n: nn.BatchRenorm(n), (6, 3), 3),
    (lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True), (2, 3, 4, 4), 3),
]


@pytest.mark.parametrize(("make", "shape", "channels"), LAZY)
def test_a_lazy_layer_becomes_what_was_meant_at_its_first_x(make, shape, channels):
    lazy, known = make(None), make(channels)
    assert repr(lazy) == repr(known).replace(f"({channels}, ", "(None, ", 1)
    x = draw(shape)
    y, z = (tg.Tensor(x) if hasattr(x, "data") else x for x in (lazy(x), known(x)))
    np.testing.assert_array_equal(np.asarray(y.data), np.asarray(z.data))
    assert lazy.num_features == channels and repr(lazy) == repr(known)
    assert_same(state(lazy), state(known))
    if isinstance(channels, int):
        with pytest.raises(ValueError, match="expected num_features=3"):
            lazy(np.delete(x, 0, axis=known.axis))


def test_an_optimizer_may_be_given_a_lazy_layer_at_once():
    models = [nn.BatchNorm1d(None), nn.BatchNorm1d(3)]
    for bn in models:
        parameters = list(bn.parameters())
        sgd = optim.SGD(bn.parameters(), lr=0.1, momentum=0.9)
        for seed in range(3):
            (bn(draw((6, 3), seed)) ** 2).sum().backward()
            sgd.step()
            sgd.zero_grad()
        assert all(a is b for a, b in zip(parameters, bn.parameters(), strict=True))
    assert_same(*map(state, models))
    assert (models[0].weight.numpy() != 1).all()


def test_a_lazy_layer_takes_its_size_from_a_state_dict():
    trained = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    trained(draw((6, 3)))
    lazy = nn.Sequential(nn.BatchNorm1d(None), nn.ReLU())
    bias = lazy[0].bias
    assert lazy.load_state_dict(trained.state_dict()) == ([], [])
    assert lazy[0].num_features == 3 and lazy[0].bias is bias
    assert_same(state(lazy), state(trained))


def test_a_state_that_does_not_fit_leaves_a_lazy_layer_lazy():
    lazy = nn.Sequential(nn.BatchNorm1d(None), nn.Linear(3, 2))
    wrong = state(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 2)))
    with pytest.raises(nn.StateDictError, match=r"1\.weight has shape"):
        lazy.load_state_dict(wrong)
    assert lazy[0].num_features is None and lazy[0].weight.shape == (0,)


def test_the_state_of_a_lazy_layer_is_empty_and_round_trips():
    first, second = nn.BatchNorm1d(None), nn.BatchNorm1d(None)
    assert {k: v.shape for k, v in first.state_dict().items()} == {
        "weight": (0,),
        "bias": (0,),
        "running_mean": (0,),
        "running_var": (0,),
        "num_batches_tracked": (),
    }
    second.load_state_dict(first.state_dict())
    assert second.num_features is None
    with pytest.raises(nn.StateDictError, match=r"weight has shape \(0,\), expected \(3,\)"):
        nn.BatchNorm1d(3).load_state_dict(first.state_dict())


def test_a_lazy_layer_is_saved_and_loaded(tmp_path):
    for features in (None, 3):
        nn.save(nn.BatchNorm1d(features), tmp_path / "bn.safetensors")
        bn = nn.BatchNorm1d(None)
        bn.load_state_dict(nn.load(tmp_path / "bn.safetensors"))
        assert bn.num_features == features


def test_a_lazy_layer_keeps_device_and_dtype(strict_gpu):  # noqa: F811
    bn = nn.BatchNorm1d(None).to("cuda").astype("float64")
    bn(tg.Tensor(draw((6, 3))).to("cuda"))
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        assert type(tensor.data) is StrictArray
        assert tensor.shape == (3,) and tensor.dtype == np.float64


@pytest.mark.parametrize("wrong", [np.ones((4, 3), int), np.ones(3), np.ones((2, 3, 4, 4))])
def test_a_wrong_first_x_leaves_a_lazy_layer_lazy(wrong):
    bn = nn.BatchNorm1d(None)
    with pytest.raises((ValueError, TypeError), match="BatchNorm1d"):
        bn(wrong)
    assert bn.num_features is None and bn.weight.shape == (0,)
