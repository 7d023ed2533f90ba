"""Layers that run as one give what they give one by one, and nobody who looks can tell."""

import copy
import re

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.kernels.cpu import conv_block_plan as driver
from tinygrad_bn.ops import fused

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """The outputs' shapes of all blocks that a kernel served."""
    shapes = []
    real = fused.conv_block.served

    def spy(*args, **options):
        found = real(*args, **options)
        if found is not NotImplemented:
            shapes.append(found[0].shape)
        return found

    monkeypatch.setattr(fused.conv_block, "served", spy)
    monkeypatch.setattr(driver, "SMALLEST", 1)
    return shapes


def network(layout="NCHW", norm=nn.BatchNorm2d, relu=nn.ReLU, pool=None, **options):
    tg.manual_seed(0)
    axis = 1 if layout == "NCHW" else -1
    pool = nn.MaxPool2d(2, layout=layout) if pool is None else pool
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, layout=layout), norm(4, axis=axis, **options), relu(), pool,
        nn.Conv2d(4, 3, 2, bias=False, layout=layout), nn.BatchNorm2d(3, axis=axis), nn.ReLU(),
        nn.Flatten(),
    )  # fmt: skip


def batch(layout="NCHW", n=6):
    x = np.random.default_rng(0).normal(size=(n, 1, 9, 9)).astype("f")
    return tg.tensor(x if layout == "NCHW" else x.transpose(0, 2, 3, 1).copy(), requires_grad=True)


def one_by_one(model, x):
    for module in model:
        x = module(x)
    return x


def trained(model, x, run, g_seed=1):
    """Return output, gradients and state after a forward and a backward by `run`."""
    y = run(model, x)
    y.backward(tg.tensor(np.random.default_rng(g_seed).normal(size=y.shape).astype("f")))
    state = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return {"y": y.numpy(), "gx": x.grad.numpy(), **grads}, state


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_sequential_gives_what_its_layers_give_one_by_one(layout, momentum, served):
    model = network(layout, momentum=momentum)
    other = copy.deepcopy(model)
    for _ in range(2):  # the running statistics move twice
        got, state = trained(model, batch(layout), lambda m, x: m(x))
        want, right = trained(other, batch(layout), one_by_one)
        for found, expected in ((got, want), (state, right)):
            assert found.keys() == expected.keys()
            for name in expected:
                np.testing.assert_allclose(
                    found[name], expected[name], rtol=0, atol=2e-5, err_msg=name
                )
        model.zero_grad(), other.zero_grad()
    assert len(served) == 4


def test_running_statistics_and_counter_are_those_of_the_convolutions_output(served):
    model = network()
    model(batch())
    plain = network()
    plain[1](plain[0](batch()))
    assert len(served) == 2
    assert model[1].num_batches_tracked.item() == 1
    np.testing.assert_allclose(
        model[1].running_mean.numpy(), plain[1].running_mean.numpy(), atol=1e-7
    )
    np.testing.assert_allclose(
        model[1].running_var.numpy(), plain[1].running_var.numpy(), rtol=1e-6
    )


def test_a_hook_sees_what_it_would_see_and_may_change_it(served):
    model, seen = network(), []
    remove = model[1].register_forward_hook(lambda module, args, out: seen.append(out.numpy()))
    model(batch())
    assert len(served) == 1  # the second block alone
    np.testing.assert_allclose(seen[0], network()[1](network()[0](batch())).numpy(), atol=1e-6)
    remove()
    model(batch())
    assert len(served) == 3
    model[0].register_forward_hook(lambda module, args, out: out * 0)
    assert not model[:4](batch()).numpy().any()


def test_a_subclass_and_a_forward_set_on_a_layer_are_called(served):
    class Loud(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    assert network(relu=Loud)[:4](batch()).numpy().min() >= 1
    model = network()
    model[3].forward = lambda x: x * 0
    assert not model[:4](batch()).numpy().any()
    assert [shape[2:] for shape in served] == [(7, 7)]  # without the pool


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d])
@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_a_method_replaced_on_a_layers_class_is_called(cls, method, monkeypatch):
    model, seen = network(), []
    right = getattr(cls, method)

    def watched(self, x):
        seen.append(self)
        return right(self, x)

    monkeypatch.setattr(cls, method, watched)
    model(batch())
    assert seen == [module for module in model if type(module) is cls]


def test_layers_that_do_not_fit_together_run_by_themselves(served):
    x = batch()
    for model in (
        network().eval(),
        network(groups=2),
        network(norm=lambda n, **k: nn.BatchNorm2d(n, **k).freeze()),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(None), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh()),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
    ):
        part = model[:3]
        np.testing.assert_array_equal(part(x).numpy(), one_by_one(copy.deepcopy(part), x).numpy())
    assert not served


def test_a_pool_that_overlaps_follows_the_block(served):
    model = network(pool=nn.MaxPool2d(3, stride=2))
    got, _ = trained(model, batch(), lambda m, x: m(x))
    want, _ = trained(network(pool=nn.MaxPool2d(3, stride=2)), batch(), one_by_one)
    assert served[0] == (6, 4, 7, 7)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=2e-5, err_msg=name)


def test_wrong_sizes_are_reported_by_the_layer_that_meets_them():
    with pytest.raises(ValueError, match="BatchNorm2d: x has shape"):
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(5), nn.ReLU())(batch())
    with pytest.raises(ValueError, match="one value per channel"):
        nn.Sequential(nn.Conv2d(1, 4, 9), nn.BatchNorm2d(4), nn.ReLU())(batch(n=1))
    for norm, dimensions in ((nn.BatchNorm1d, "2 or 3"), (nn.BatchNorm3d, "5")):
        with pytest.raises(ValueError, match=f"{norm.__name__}: .*expected {dimensions} dim"):
            nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU())(batch())


@pytest.mark.parametrize("size", [1, 5, (4, 1)])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_of_another_size_is_refused_and_moves_nothing(name, size):
    model = network()
    setattr(model[1], name, nn.Parameter(np.ones(size, "f")))
    with pytest.raises(ValueError, match=f"batch_norm: {name} has shape"):
        model(batch())
    assert model[1].num_batches_tracked.item() == 0


def test_a_kernel_of_more_channels_than_the_norms_is_refused():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU()
    )
    model[0].weight = nn.Parameter(np.ones((8, 1, 3, 3), "f"))
    with pytest.raises(ValueError, match="so 8 channels on axis 1; expected num_features=4"):
        model(batch())


def test_a_pool_that_does_not_fit_is_reported_as_by_itself():
    fused, plain = network(pool=nn.MaxPool2d(8)), network(pool=nn.MaxPool2d(8))
    messages = []
    for model, run in ((fused, lambda m, x: m(x)), (plain, one_by_one)):
        with pytest.raises(ValueError, match="max_pool2d") as caught:
            run(model, batch())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert fused[1].num_batches_tracked.item() == plain[1].num_batches_tracked.item() == 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_not_finite_in_a_parameter_shows_as_layer_by_layer(layer, name, value):
    results = []
    for run in (lambda m, x: m(x), one_by_one):
        model = network()
        getattr(model[layer], name).data[0] = value
        results.append(run(model[:4], batch()).numpy())
    np.testing.assert_allclose(*results, rtol=0, atol=2e-6)
    assert np.isfinite(results[0][:, 1:]).all()


def test_a_bias_of_a_wider_dtype_widens_the_result():
    model = network()
    model[0].bias = nn.Parameter(np.ones(4))
    assert model[:4](batch()).dtype == np.float64


def test_recomputing_leaves_the_statistics_alone(served):
    model = network()
    with nn.recomputing(model):
        model(batch())
    assert len(served) == 2
    assert model[1].num_batches_tracked.item() == 0


def test_the_function_is_the_four_functions(served):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(6, 2, 9, 9)), rng.normal(size=(4, 2, 3, 3))
    offset, weight, bias = rng.normal(size=(3, 4))
    for training in (True, False):
        state, right = ((np.zeros(4), np.ones(4)) for _ in range(2))
        got = F.conv_block(x, kernel, offset, *state, weight, bias, training, 0.3, pool=2)
        y = F.batch_norm(F.conv2d(x, kernel, offset), *right, weight, bias, training, 0.3)
        np.testing.assert_allclose(got, F.max_pool2d(F.relu(y), 2), atol=1e-12)
        np.testing.assert_allclose(state, right, rtol=1e-12)
    assert len(served) == 1


def test_the_pool_of_the_function_may_be_what_a_pools_may_be(served):
    x, kernel = batch().numpy(), np.ones((4, 1, 3, 3), "f")
    for pool in (2, np.int64(2), (2, 2), [2, 2]):
        assert F.conv_block(x, kernel, training=True, pool=pool).shape == (6, 4, 3, 3)
    assert len(served) == 4
    with pytest.raises(ValueError, match=r"the kernel size is 2\.0"):  # which is equal to 2
        F.conv_block(x, kernel, training=True, pool=2.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -1.0}, "eps is -1"),
        ({"momentum": 2.0}, "momentum is 2"),
        ({"weight": np.ones(5)}, "weight has shape"),
        ({"running_mean": np.ones(4)}, "both running_mean and running_var"),
        ({"layout": "HWCN"}, "unknown layout"),
        ({"pool": 99}, "kernel of"),
    ],
    ids=str,
)
def test_the_function_raises_what_the_four_raise(wrong, message):
    x, kernel = np.ones((6, 2, 9, 9)), np.ones((4, 2, 3, 3))
    with pytest.raises(ValueError, match=message):
        F.conv_block(x, kernel, training=True, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"momentum": None}, {"eps": "1e-5"}, {"correction": [1]}], ids=str
)
def test_the_function_names_itself_and_what_is_no_number(wrong):
    x, kernel = np.ones((6, 2, 9, 9)), np.ones((4, 2, 3, 3))
    ((name, value),) = wrong.items()
    message = re.escape(f"conv_block: {name} is {value!r}, expected a number")
    with pytest.raises(TypeError, match=message):
        F.conv_block(x, kernel, training=True, **wrong)


def test_running_statistics_that_cannot_be_moved_are_refused_before_anything_is_computed(served):
    x, kernel = np.ones((6, 2, 9, 9)), np.ones((4, 2, 3, 3))
    fixed, whole = np.zeros(4), np.zeros(4, int)
    fixed.flags.writeable = False
    for mean, error in ((fixed, ValueError), (whole, TypeError)):
        with pytest.raises(error, match="conv_block: running_mean is"):
            F.conv_block(x, kernel, None, mean, np.ones(4), training=True)
    assert not served


def test_what_may_be_written_to_before_the_backward_does_not_depend_on_the_fusion(served):
    """The convolution's bias, which no gradient needs; and a weight, which one does."""
    for run in (lambda m, x: m(x), one_by_one):
        model = network()
        x = tg.tensor(batch().numpy(), requires_grad=True)
        out = run(model, x)
        with tg.no_grad():
            model[0].bias += 1
        out.sum().backward()
        np.testing.assert_allclose(model[0].bias.grad.numpy(), 0, atol=1e-4)
        out = run(model, x)
        with tg.no_grad():
            model[0].weight += 1
        with pytest.raises(RuntimeError, match="changed in place"):
            out.sum().backward()
    assert len(served) == 4  # both blocks, twice


@pytest.mark.parametrize("axis", [1, -1])
def test_batch_norm_and_relu_run_as_one(axis, monkeypatch):
    calls = []
    real = fused.batch_norm_relu.served

    def spy(*args, **options):
        calls.append(real(*args, **options))
        return calls[-1]

    monkeypatch.setattr(fused.batch_norm_relu, "served", spy)
    x = np.random.default_rng(0).normal(size=(64, 8, 16, 8)).astype("f")
    model = nn.Sequential(nn.BatchNorm2d(8, axis=axis), nn.ReLU())
    other = copy.deepcopy(model)
    runs = []
    for run, m in ((lambda m, x: m(x), model), (one_by_one, other)):
        runs.append(trained(m, tg.tensor(x, requires_grad=True), run))
    (got, state), (want, right) = runs
    assert len(calls) == 1
    assert calls[0] is not NotImplemented
    for found, expected in ((got, want), (state, right)):
        for name in expected:
            scale = max(1, np.abs(expected[name]).max())
            assert np.abs(found[name] - expected[name]).max() < 2e-6 * scale, name


def test_batch_norm_relu_in_evaluation_and_with_a_mask_takes_the_ops():
    x = np.random.default_rng(0).normal(size=(64, 8, 16)).astype("f")
    state = np.full(8, 0.5, "f"), np.full(8, 2.0, "f")
    np.testing.assert_array_equal(F.batch_norm_relu(x, *state), F.relu(F.batch_norm(x, *state)))
    mask = np.random.default_rng(1).random((64, 1, 1)) < 0.5
    np.testing.assert_array_equal(
        F.batch_norm_relu(x, training=True, mask=mask),
        F.relu(F.batch_norm(x, training=True, mask=mask)),
    )
