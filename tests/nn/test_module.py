"""Modules find their parts among their attributes, and keep them through copies and moves."""

import copy
import pickle

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray
from tinygrad_bn import functional as F
from tinygrad_bn import nn, optim


class Block(nn.Module):
    def __init__(self, width):
        # super().__init__() left out on purpose: nothing depends on it.
        self.first = nn.Linear(width, width)
        self.scale = nn.Parameter(np.ones(width, "float32"))
        self.second = nn.Linear(width, width, bias=False)
        self.register_buffer("calls", tg.zeros((), dtype="int64"))
        self.register_buffer("scratch", tg.zeros(2), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x):
        self.calls += 1
        return self.second(F.relu(self.first(x))) * self.scale


def network():
    return nn.Sequential(Block(3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_names_are_dotted_and_own_parts_come_first():
    names = [name for name, _ in network().named_parameters()]
    assert names == [
        "0.scale",
        "0.first.weight",
        "0.first.bias",
        "0.second.weight",
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
    ]
    assert [name for name, _ in network().named_buffers()] == [
        "0.calls",
        "0.scratch",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    model = network()
    assert [name for name, _ in model.named_modules("net")] == [
        "net",
        "net.0",
        "net.0.first",
        "net.0.second",
        "net.1",
        "net.2",
    ]
    assert list(model.children()) == [model[0], model[1], model[2]]
    assert len(list(model.modules())) == 6
    assert len(list(model.buffers())) == 5


def test_what_is_shared_is_reported_once_but_saved_under_each_name():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert [name for name, _ in tied.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    assert set(tied.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    twice = nn.Sequential(tied[0], tied[0])
    assert len(list(twice.parameters())) == 2
    assert len(list(twice.modules())) == 2
    assert twice(tg.ones(1, 3)).shape == (1, 3)


def test_a_parameter_owns_its_memory_and_stays_a_leaf():
    array = np.ones(3)
    parameter = nn.Parameter(array)
    array[:] = 5
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.dtype == np.float64
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert type(parameter * 2) is tg.Tensor
    assert nn.Parameter([1.0]).dtype == np.float32
    assert not nn.Parameter(np.arange(3), requires_grad=False).requires_grad
    with pytest.raises(TypeError, match="only floating"):
        nn.Parameter(np.arange(3))


def test_train_and_eval_reach_every_module():
    model = network()
    assert all(module.training for module in model.modules())
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    model[0].train()
    assert [m.training for m in model.modules()] == [False, True, True, True, False, False]
    assert model.train(False).train().training


def test_zero_grad_forgets_gradients():
    model = network()
    model(tg.randn(4, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_requires_grad_freezes():
    model = network().requires_grad_(False)
    assert not model(tg.randn(4, 3)).requires_grad


def test_deepcopy_is_independent_and_keeps_what_was_shared():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    x = tg.randn(5, 2)
    model(x).sum().backward()
    before = {name: t.numpy().copy() for name, t in model.state_dict().items()}
    twin = copy.deepcopy(model)
    assert twin[2].weight is twin[0].weight
    assert twin[0].weight is not model[0].weight
    assert type(twin[0].weight) is nn.Parameter
    np.testing.assert_array_equal(twin[0].weight.grad.numpy(), model[0].weight.grad.numpy())
    for value in (*twin.parameters(), *twin.buffers()):
        value.data[...] = 7
    twin[0].weight.grad.data[...] = 7
    twin(x)
    for name, t in model.state_dict().items():
        np.testing.assert_array_equal(t.numpy(), before[name])
    assert (model[0].weight.grad.numpy() != 7).all()
    assert model[1].num_batches_tracked.item() == 1


def test_pickling_keeps_the_state():
    model = network()
    twin = pickle.loads(pickle.dumps(model))
    x = tg.randn(4, 3)
    np.testing.assert_array_equal(twin.eval()(x).numpy(), model.eval()(x).numpy())


def test_apply_visits_inside_out():
    model = network()
    seen = []
    assert model.apply(lambda module: seen.append(type(module).__name__)) is model
    assert seen[-1] == "Sequential"
    assert seen.index("Linear") < seen.index("Block")


def test_repr_is_a_tree():
    assert repr(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Flatten())) == (
        "Sequential(\n  (0): Sequential(\n    (0): ReLU()\n  )\n  (1): Flatten(start_axis=1)\n)"
    )
    block = network()[0]
    block.extra_repr = lambda: "width=3"
    assert repr(block).splitlines()[:2] == ["Block(", "  width=3"]
    assert repr(network()[0]).splitlines()[1] == (
        "  (first): Linear(in_features=3, out_features=3, bias=True)"
    )


def test_moving_keeps_identities_and_moves_gradients(strict_gpu):  # noqa: F811
    model = network()
    parameters = list(model.parameters())
    model(tg.randn(4, 3)).sum().backward()
    assert model.to("cuda") is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for t in (*model.parameters(), *model.buffers(), *(p.grad for p in parameters)):
        assert type(t.data) is StrictArray
    model(tg.randn(4, 3, device="cuda"))
    assert model.cpu()[2].weight.device == "cpu"
    assert model.cuda()[2].weight.device == "cuda:0"


def test_moving_between_forward_and_backward_is_noticed(strict_gpu):  # noqa: F811
    model = nn.Linear(2, 2)
    loss = model(tg.randn(3, 2, requires_grad=True)).sum()
    model.to("cuda")
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


def test_astype_converts_what_is_floating():
    model = network().astype("float64")
    assert {p.dtype for p in model.parameters()} == {np.dtype("float64")}
    assert model[1].running_mean.dtype == np.float64
    assert model[1].num_batches_tracked.dtype == model[0].calls.dtype == np.int64
    assert model(tg.randn(4, 3, dtype="float64")).dtype == np.float64
    with pytest.raises(TypeError, match="astype: int32 is not floating"):
        model.astype("int32")


def test_astype_keeps_batch_norm_in_float32_at_least():
    model = network().astype("float16")
    assert model[2].weight.dtype == np.float16
    assert {t.dtype for t in model[1].parameters()} == {np.dtype("float32")}
    assert model[1].running_var.dtype == np.float32
    assert model(tg.randn(4, 3, dtype="float16")).dtype == np.float16


def test_replacing_a_parameter_by_a_plain_tensor_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"Linear\.weight is a Parameter.*nn\.Parameter\(value\)"):
        layer.weight = layer.weight * 2
    layer.bias = None
    assert len(list(layer.parameters())) == 1
    layer.weight = nn.Parameter(np.zeros((2, 2)))
    assert layer.weight.dtype == np.float64


def test_what_cannot_be_registered_is_named():
    module = nn.Module()
    with pytest.raises(TypeError, match="register_buffer: 'b' is a ndarray"):
        module.register_buffer("b", np.ones(2))
    with pytest.raises(ValueError, match="cannot name a part"):
        module.register_buffer("a.b", tg.ones(2))
    with pytest.raises(NotImplementedError, match=r"Module defines no forward\(\)"):
        module(1)


def test_training_loop_lowers_the_loss_and_repeats_to_the_bit():
    def losses():
        tg.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x = tg.randn(64, 4)
        target = (x.numpy() @ np.arange(12.0).reshape(4, 3)).argmax(axis=1)
        found = []
        for _ in range(30):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    first = losses()
    assert first[-1] < 0.3 * first[0]
    assert losses() == first
