"""The backend on a GPU: moving, making, sharing memory, streams, files, several GPUs."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.test_several_devices import OPTIMIZERS, trained
from tinygrad_bn import nn, optim
from tinygrad_bn.data import DataLoader


@pytest.fixture(params=["cuda:0", "cuda:1"])
def gpu(request):
    if request.param == "cuda:1":
        request.getfixturevalue("second_gpu")
    return request.param


def test_arrays_come_there_and_back_in_every_dtype(gpu):
    for dtype in ("float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"):
        x = tg.tensor([[0, 1], [2, 3]], dtype=dtype, device="cpu")
        there = x.to(gpu)
        assert (there.device, there.dtype) == (gpu, x.dtype)
        np.testing.assert_array_equal(there.cpu().numpy(), x.numpy())
        assert there.to(gpu) is there


def test_what_is_made_is_made_there(gpu):
    with tg.default_device(gpu):
        made = [tg.zeros(2), tg.ones(2, dtype="float16"), tg.arange(3), tg.randn(2), tg.eye(2)]
        made += list(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).parameters())
    made += [tg.full((2,), 1.5, device=gpu), tg.ones_like(tg.ones(2, device=gpu))]
    assert {t.device for t in made} == {gpu}


def test_lists_are_operands_and_can_be_written(gpu):
    t = tg.tensor([1.0, 2.0], device=gpu) * [3, 4]
    t[1:] = [5.0]
    t += (1, 1)
    assert tg.where(t > 4, [0.0, 1.0], t).tolist() == [4.0, 1.0]


def test_one_seed_gives_the_same_parameters_as_on_the_cpu(gpu):
    drawn = []
    for device in ("cpu", gpu):
        tg.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv2d(1, 2, 3)).to(device)
        drawn.append([p.numpy() for p in model.parameters()] + [tg.randn(3, device=device).numpy()])
    for ours, theirs in zip(*drawn, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_training_gives_what_the_cpu_gives(gpu):
    results = (trained(device, OPTIMIZERS["sgd"]) for device in ("cpu", gpu))
    for here, there in zip(*results, strict=True):
        assert there.device == gpu
        # Three steps in float32, whose sums are added up in another order.
        np.testing.assert_allclose(there.numpy(), here.numpy(), rtol=5e-3, atol=5e-4)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_do_what_they_do_on_the_cpu(gpu, make):
    # With gradients that are given: Adam makes a whole step of a gradient that is only rounding.
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(7, 5)), rng.normal(size=(4, 7, 5))
    ends = []
    for device in ("cpu", gpu):
        p = nn.Parameter(start.astype("float32"), device=device)
        optimizer = make([p])
        for g in gradients:
            p.grad = tg.tensor(g, dtype="float32", device=device)
            optimizer.step()
        ends.append(p.numpy())
    np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-6)  # a few float32 roundings


def test_files_and_states_go_from_device_to_device(gpu, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(gpu)
    optimizer = optim.Adam(model.parameters())
    model(tg.randn(8, 3, device=gpu)).exp().sum().backward()
    optimizer.step()
    nn.save(model, tmp_path / "model")
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(nn.load(tmp_path / "model", device=gpu))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert (a.device, b.device) == (gpu, "cpu")
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    on_host = optim.Adam(other.parameters())
    on_host.load_state_dict(optimizer.state_dict())
    kept = on_host.state_dict()["state"][0]["exp_avg"]
    np.testing.assert_array_equal(
        kept.numpy(), optimizer.state_dict()["state"][0]["exp_avg"].numpy()
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_gives_the_batches_of_the_cpu(gpu, shuffle):
    images = np.arange(1000 * 300, dtype="int32").reshape(1000, 300)
    labels = np.arange(1000)
    ours, theirs = (
        DataLoader((images, labels), 96, shuffle=shuffle, seed=1, device=device)
        for device in ("cpu", gpu)
    )
    for here, there in zip(ours.steps(40), theirs.steps(40), strict=True):
        for a, b in zip(here, there, strict=True):
            assert b.device == gpu
            np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_loader_runs_ahead_of_a_busy_gpu(cupy, emulated):
    # The GPU lags behind by all of these products; what it then reads must still be there. (An
    # emulated one lags behind as far as it may, whatever there is to do.)
    side = 64 if emulated else 4096
    rows = np.arange(64 * side, dtype="float32").reshape(64, side)
    busy = cupy.ones((side, side), "float32")
    sums = []
    for batch in DataLoader(rows, 1, device="cuda"):
        busy = busy @ busy * 0 + 1
        sums.append((batch * tg.Tensor(busy[:1])).sum())
    np.testing.assert_allclose([s.item() for s in sums], rows.sum(axis=1), rtol=1e-5)


def test_memory_is_shared_with_cupy_by_dlpack_and_by_its_interface(cupy):
    array = cupy.arange(4, dtype="float32")
    for t in (tg.from_dlpack(array), tg.Tensor(array)):
        assert t.data.data.ptr == array.data.ptr
    t = tg.ones(3, device="cuda")
    assert cupy.asarray(t).data.ptr == cupy.from_dlpack(t).data.ptr == t.data.data.ptr
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = torch.from_dlpack(t)
    theirs += 1
    assert tg.from_dlpack(theirs).tolist() == [2.0, 2.0, 2.0]


def test_work_is_done_on_the_current_stream(cupy):
    values = np.random.default_rng(0).normal(scale=0.1, size=(512, 512)).astype("float32")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = tg.tensor(values, device="cuda", requires_grad=True)
        (x @ x).exp().mean().backward()
        done = stream.record()
    stream.synchronize()
    assert done.done
    host = tg.tensor(values, requires_grad=True)
    (host @ host).exp().mean().backward()
    scale = np.abs(host.grad.numpy()).max()
    # Sums of 512 products in float32, in another order.
    np.testing.assert_allclose(x.grad.numpy(), host.grad.numpy(), rtol=0, atol=1e-5 * scale)


def test_products_of_float32_are_true_float32_unless_asked_for_otherwise(cupy):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 512, 512)).astype("float32")
    exact = a.astype("float64") @ b.astype("float64")
    errors = {}
    for tf32 in (False, True):
        with tg.allow_tf32(tf32):
            got = (tg.tensor(a, device="cuda") @ tg.tensor(b, device="cuda")).numpy()
        errors[tf32] = np.abs(got - exact).max()
    assert errors[False] < 1e-3  # 512 products of about 1, rounded to 2⁻²⁴
    assert errors[True] < 1.0


def test_gradients_flow_between_two_gpus(second_gpu):
    x = tg.tensor([1.0, 2.0], device="cuda:0", requires_grad=True)
    y = (x * 3).to(second_gpu)
    (y * y).sum().backward()
    assert (y.device, x.grad.device) == (second_gpu, "cuda:0")
    assert x.grad.tolist() == [18.0, 36.0]


def test_what_is_written_after_a_move_is_not_moved(second_gpu):
    x = tg.zeros(1000, device="cuda:0")
    y = x.to(second_gpu)
    x[...] = 7.0
    assert x.sum().item() == 7000.0
    assert y.sum().item() == 0.0
