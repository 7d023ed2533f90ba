"""`capture` with real CUDA graphs (or the stand-in's): bit-equal to the step it was made of."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.gpu.conftest import STAND_IN
from tests.test_capture import OPTIMIZERS, Training, assert_equal, batches
from tests.test_no_waiting import NORMS, network
from tinygrad_bn import functional as F
from tinygrad_bn import nn, optim
from tinygrad_bn.kernels.cuda import matmul as matmul_kernel
from tinygrad_bn.ops.linalg import matmul as matmul_op

GPU = "cuda:0"


@pytest.fixture
def capturing(on_gpu, monkeypatch):
    """Have the generic forms multiply by our cuBLAS handles: CuPy refuses its own meanwhile."""
    if on_gpu.family == "generic" and not STAND_IN:
        monkeypatch.setattr(matmul_op, "forward", matmul_kernel.forward)


@pytest.mark.parametrize("inside", [True, False], ids=["schedule inside", "schedule outside"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_replays_train_bit_for_bit_as_the_step_does(capturing, make, inside):
    plain = Training(make, lambda step: step, inside)
    captured = Training(make, tg.capture, inside)
    for batch in batches(10, sizes=(8, 8, 6)):
        results = [training.step(*batch) for training in (plain, captured)]
        for training in (plain, captured):
            if not inside:
                training.schedule.step()
        for name in ("loss", "logits"):
            np.testing.assert_array_equal(*(result[name].numpy() for result in results))
        assert_equal(plain.state(), captured.state())
    assert captured.step.graphs == 2


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_any_norm_can_be_captured_so_that_nothing_in_its_step_waits(capturing, make):
    rng = np.random.default_rng(0)
    x = tg.tensor(rng.normal(size=(8, 2, 8, 8)).astype("float32"), device=GPU)
    labels = tg.tensor(rng.integers(0, 3, 8), device=GPU)
    finals = []
    for wrap in (lambda step: step, tg.capture):
        tg.manual_seed(0)
        model = network(make()).to(GPU)
        model(x)  # sizes that were left open
        optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9)

        def step(x, labels, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        step = wrap(step)
        losses = [step(x, labels).item() for _ in range(6)]
        finals.append([np.array(losses), *(t.numpy() for t in model.state_dict().values())])
    assert_equal(*finals)


REFUSED = {
    "item": lambda x: x.sum().item(),
    "numpy": lambda x: tg.tensor(x.numpy(), device=GPU),
    "from the host": lambda x: x + tg.tensor([1.0], device=GPU),
    "dropout": lambda x: F.dropout(x, 0.5),
    "a raw read": lambda x: x * x.data.sum().item(),
    "a size that is data": lambda x: x.data[x.data > 0],
}


@pytest.mark.parametrize("step", REFUSED.values(), ids=REFUSED)
def test_what_no_graph_can_repeat_is_refused_and_the_gpu_goes_on(step):
    captured = tg.capture(step)
    x = tg.ones(3, device=GPU)
    with pytest.raises(tg.CaptureError):
        for _ in range(3):
            captured(x)
    doubled = tg.capture(lambda x: x * 2)
    assert [doubled(x).tolist() for _ in range(4)] == [[2.0] * 3] * 4


def test_an_upload_that_cupy_makes_by_itself_is_refused(cupy):
    captured = tg.capture(lambda x: tg.Tensor(x.data + cupy.asarray(np.ones(3, "float32"))))
    with pytest.raises(tg.CaptureError, match="copies from the host"):
        for _ in range(3):
            captured(tg.ones(3, device=GPU))
    assert cupy.asarray(np.ones(2)).get().tolist() == [1.0, 1.0]  # and is possible again


def test_graphs_run_on_the_current_stream_between_what_surrounds_them(cupy):
    step = tg.capture(lambda x: (x * 2 + 1).sum())
    stream = cupy.cuda.Stream(non_blocking=True)
    x = tg.zeros(1 << 20, device=GPU)
    with stream:
        for i in range(20):
            x[...] = float(i)  # on the stream, before the copy into the graph's input
            assert step(x).item() == (2 * i + 1) * (1 << 20)


def test_memory_that_others_use_meanwhile_does_no_harm(cupy):
    training = Training(OPTIMIZERS["momentum"], tg.capture)
    plain = Training(OPTIMIZERS["momentum"], lambda step: step)
    for i, batch in enumerate(batches(12)):
        plain.step(*batch), training.step(*batch)
        junk = [cupy.full(1000 * (j + 1), np.nan, "float32") for j in range(i % 5 * 20)]
        assert_equal(plain.state(), training.state())
        del junk
        if i % 4 == 3:
            cupy.get_default_memory_pool().free_all_blocks()


def test_memory_is_given_back(cupy):
    def used():
        cupy.get_default_memory_pool().free_all_blocks()
        return cupy.cuda.runtime.memGetInfo()[0]

    step = tg.capture(lambda x: (x * 2).exp() + x)
    x = tg.ones(64 << 20, device=GPU)
    before = used()
    for _ in range(4):
        step(x)
    held = before - used()
    assert held >= x.data.nbytes
    step.release()
    assert before - used() < held / 8


def test_running_out_of_memory_leaves_to_earlier_graphs_what_is_theirs(cupy):
    step = tg.capture(lambda x: (x * 2 + 1).exp().sum())
    x = tg.ones(1000, device=GPU)
    expected = [step(x).item() for _ in range(4)]
    cupy.get_default_memory_pool().free_all_blocks()
    most = cupy.cuda.runtime.memGetInfo()[0]
    large = tg.Tensor(cupy.empty(most // 10 * 4 // 4, "float32"))
    with pytest.raises(MemoryError):
        step(large)  # there is room for its copy, and then for nothing as large
    del large
    cupy.get_default_memory_pool().free_all_blocks()
    junk = [cupy.full(1000, np.nan, "float32") for _ in range(20)]
    assert [step(x).item() for _ in range(4)] == expected
    assert all(bool(cupy.isnan(other).all()) for other in junk)


def test_replays_are_quicker_than_the_step(cupy, emulated):
    if emulated:
        pytest.skip("an emulated GPU's timings mean nothing")
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(30))).to(GPU)
    sgd = optim.SGD(model.parameters(), 1e-3)

    def step(x):
        sgd.zero_grad()
        model(x).sum().backward()
        sgd.step()

    x = tg.ones(16, 32, device=GPU)
    seconds = []
    for run in (step, tg.capture(step)):
        for _ in range(5):
            run(x)
        times = cupyx_benchmark(cupy, lambda run=run: run(x))
        seconds.append(times)
    assert seconds[1] < seconds[0] / 2


def cupyx_benchmark(cupy, run):
    """Return the median milliseconds of a call, host and GPU together."""
    start, end = (cupy.cuda.Event() for _ in range(2))
    times = []
    for _ in range(20):
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return float(np.median(times))
