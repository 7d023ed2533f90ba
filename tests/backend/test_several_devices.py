"""Work follows its arrays to their GPU, whichever is the current one; mixing devices names both.

The stand-in has two GPUs and refuses an array that is not on the current one.
"""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.strict_array import StrictArray, WrongDeviceError, current, plain, strict, use
from tinygrad_bn import functional as F
from tinygrad_bn import nn, optim
from tinygrad_bn.backend.kernels import use_kernels

pytestmark = pytest.mark.usefixtures("strict_gpu")

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, 0.1),
    "adamw": lambda p: optim.AdamW(p, 0.1),
}


def test_the_stand_in_refuses_an_array_of_another_device_than_the_current_one():
    with use(1):
        array = strict(np.ones(2))
    with pytest.raises(WrongDeviceError):
        array + 1


def trained(device, make_optimizer):
    """Return the parameters, buffers and gradients after three steps of a small network."""
    tg.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(12, 4),
    ).to(device)
    optimizer = make_optimizer(model.parameters())
    schedule = optim.CosineSchedule(optimizer, 3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = tg.tensor(rng.normal(size=(8, 1, 6, 6)), dtype="float32", device=device)
        labels = tg.tensor(rng.integers(0, 4, 8), device=device)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        schedule.step()
        gradients = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
    return [*model.parameters(), *model.buffers(), *gradients]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_on_the_second_gpu_leaves_the_current_device_alone_and_equals_the_cpu(make):
    with use_kernels("generic"):  # the CPU's kernels add in another order
        results = trained("cpu", make), trained("cuda:1", make)
    for here, there in zip(*results, strict=True):
        assert there.device == "cuda:1"
        np.testing.assert_array_equal(there.numpy(), here.numpy())
    assert current() == 0


def test_gradients_flow_through_a_model_on_two_gpus():
    results = []
    for first, second in (("cpu", "cpu"), ("cuda:0", "cuda:1")):
        x = tg.tensor([1.0, -2.0, 3.0], device=first, requires_grad=True)
        w = tg.tensor([0.5, 0.25, 2.0], device=second, requires_grad=True)
        a, b = x * 2, x.exp()
        y = (a.to(second) * w + b.to(second)).sum() + (w * w).sum()
        y.backward()
        assert (x.grad.device, w.grad.device) == (first, second)
        results.append((x.grad.numpy(), w.grad.numpy()))
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_copy_between_gpus_does_not_pass_through_the_host(strict_gpu):
    from tests.backend.strict_array import TRAFFIC

    x = tg.tensor([1.0, 2.0], device="cuda:0")
    before = TRAFFIC.copy()
    y = x.to("cuda:1")
    assert before == TRAFFIC
    assert (y.device, y.tolist()) == ("cuda:1", [1.0, 2.0])
    assert x.to("cuda:0") is x


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_made_is_made_on_the_device_that_is_asked_for(index):
    device = f"cuda:{index}"
    made = [
        tg.zeros(2, device=device),
        tg.full((2,), 3, device=device),
        tg.empty(2, device=device),
        tg.arange(3, device=device),
        tg.eye(2, device=device),
        tg.randn(2, device=device),
        tg.tensor(np.ones(2), device=device),
        tg.ones_like(tg.ones(2, device=device)),
        tg.tensor(tg.ones(2, device=device)),
        tg.Tensor(tg.ones(2, device=device), dtype="float16"),
        nn.Parameter(tg.ones(2, device=device)),
        *nn.BatchNorm1d(2, device=device).buffers(),
        *nn.Linear(2, 2).to(device).astype("float64").parameters(),
    ]
    with tg.default_device(device):
        made += [tg.ones(2), nn.Parameter([1.0]), tg.randint(3, shape=(2,))]
    with use(index), tg.default_device("cuda"):
        made.append(tg.ones(2))
    assert [t.device for t in made] == [device] * len(made)


def test_one_seed_gives_the_same_parameters_on_every_device():
    drawn = []
    for device in ("cpu", "cuda:0", "cuda:1"):
        tg.manual_seed(3)
        with tg.default_device(device):
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv2d(1, 2, 3))
            drawn.append([p.numpy() for p in model.parameters()] + [tg.randn(3).numpy()])
    for arrays in drawn[1:]:
        for ours, theirs in zip(drawn[0], arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def _on(device):
    return tg.ones(4, 3, device=device)


MIXED = {
    "an op": lambda a, b: _on(a) + _on(b),
    "an op with a raw array": lambda a, b: _on(a) * _on(b).data,
    "a product": lambda a, b: _on(a) @ _on(b).T,
    "assignment": lambda a, b: _on(a).__setitem__(0, _on(b)[0]),
    "in place": lambda a, b: _on(a).__iadd__(_on(b)),
    "a layer": lambda a, b: nn.Linear(3, 2).to(a)(_on(b)),
    "running statistics": lambda a, b: F.batch_norm(
        _on(a), tg.zeros(3, device=b), tg.ones(3, device=b), training=True
    ),
    "a gradient": lambda a, b: (_on(a).requires_grad_() * 2).backward(_on(b)),
    "an optimizer": lambda a, b: _stepped(a, b),
    "an index": lambda a, b: _on(a)[_rows(b)],
    "an index of a raw array": lambda a, b: _on(a)[1:, _rows(b).data],
    "a mask": lambda a, b: _on(a)[_on(b) > 0],
    "assignment at an index": lambda a, b: _on(a).__setitem__(_rows(b), 0.0),
    "labels": lambda a, b: F.cross_entropy(_on(a), tg.zeros(4, dtype="int64", device=b)),
}


def _rows(device):
    return tg.tensor([0, 2], device=device)


def _stepped(a, b):
    parameter = nn.Parameter(_on(a))
    parameter.grad = _on(b)
    optim.SGD([parameter], 0.1).step()


@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:1", "cpu")])
@pytest.mark.parametrize("attempt", MIXED.values(), ids=MIXED)
def test_mixing_devices_is_an_error_that_names_both(attempt, devices):
    with pytest.raises(ValueError, match="expected one device") as caught:
        attempt(*devices)
    assert all(repr(device) in str(caught.value) for device in devices)


def test_an_index_says_where_to_and_lists_and_numbers_go_along():
    x = tg.arange(6.0, device="cuda:1").reshape(3, 2)
    with pytest.raises(ValueError, match=r"getitem.*'cuda:1' and on 'cpu'.*\.to\('cuda:1'\)"):
        x[np.array([0, 2])]
    rows = tg.tensor([0, 2]).to(x.device)
    for index in (rows, [0, 2], slice(0, None, 2), (Ellipsis, [0, 2], slice(None))):
        assert x[index].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert x[1, 1].item() == 3.0


def test_dlpack_goes_both_ways_and_shares_memory():
    for device, kind in (("cpu", (1, 0)), ("cuda:1", (2, 1))):
        array = tg.ones(3, device=device).data
        there = tg.from_dlpack(array)
        assert there.device == device
        assert tuple(there.__dlpack_device__()) == kind
        there[0] = 5.0
        assert tg.Tensor(array).tolist() == [5.0, 1.0, 1.0]
    x = tg.tensor([1.0, 2.0])
    np.testing.assert_array_equal(np.from_dlpack(x), [1.0, 2.0])


def test_from_dlpack_says_what_it_cannot_take():
    with pytest.raises(TypeError, match="got a list, expected an array with __dlpack__"):
        tg.from_dlpack([1.0])

    class OnAnotherDevice:
        def __dlpack_device__(self):
            return (10, 0)  # ROCm

    with pytest.raises(ValueError, match="type 10, expected the host or a CUDA GPU"):
        tg.from_dlpack(OnAnotherDevice())


def test_only_a_tensor_on_a_gpu_has_the_cuda_array_interface():
    assert not hasattr(tg.ones(2), "__cuda_array_interface__")
    assert tg.ones(2, device="cuda").__cuda_array_interface__["shape"] == (2,)


def test_arrays_come_to_a_gpu_and_back_unchanged():
    x = np.arange(12, dtype="int16").reshape(3, 4)[:, ::2]
    there = tg.Tensor(x).to("cuda:1")
    assert type(there.data) is StrictArray
    np.testing.assert_array_equal(plain(there.data), x)
    assert there.to("cuda:0").cpu().dtype == x.dtype
