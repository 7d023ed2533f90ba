"""`capture`: a step replayed as a graph does what the step does, to the bit, or says why it cannot.

The graphs are those of `strict_graph`: launches written down and done again, on memory that holds
nonsense wherever nothing was written since. What a CUDA graph does beside is for tests/gpu.
"""

import gc
import weakref

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import TRAFFIC
from tinygrad_bn import functional as F
from tinygrad_bn import nn, optim
from tinygrad_bn.backend.kernels import use_kernels

pytestmark = pytest.mark.usefixtures("strict_gpu")

GPU = "cuda:0"

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: optim.AdamW(p, 0.01),
}


class Net(nn.Module):
    """A convolution, a masked batch norm and one with cumulative averages."""

    def __init__(self):
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm1 = nn.BatchNorm2d(3, momentum=None)
        self.norm2 = nn.BatchNorm1d(12, groups=2)
        self.dense = nn.Linear(12, 4)

    def forward(self, x, mask):
        x = F.max_pool2d(F.relu(self.norm1(self.conv(x))), 2)
        return self.dense(F.relu(self.norm2(x.reshape(len(x), -1), mask)))


class Training:
    """A model, its optimizer and schedule, and a step of training that `wrap` may capture."""

    def __init__(self, make, wrap, schedule_inside=True, dtype="float32"):
        tg.manual_seed(0)
        self.model = Net().astype(dtype).to(GPU)
        self.optimizer = make(self.model.parameters())
        self.schedule = optim.CosineSchedule(self.optimizer, 8, warmup=2)
        self.schedule_inside = schedule_inside
        self.step = wrap(self._step)

    def _step(self, x, labels, mask):
        self.optimizer.zero_grad()
        logits = self.model(x, mask)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        if self.schedule_inside:
            self.schedule.step()
        return {"loss": loss, "logits": logits}

    def state(self):
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters()]
        for kept in self.optimizer._state.values():
            tensors += [tg.Tensor(kept[name]) for name in self.optimizer.slots if name in kept]
        return [None if t is None else t.numpy() for t in tensors]


def batches(count, sizes=(8,), dtype="float32"):
    rng = np.random.default_rng(1)
    for i in range(count):
        n = sizes[i % len(sizes)]
        yield (
            tg.tensor(rng.normal(size=(n, 1, 6, 6)).astype(dtype), device=GPU),
            tg.tensor(rng.integers(0, 4, n), device=GPU),
            tg.tensor(rng.random((n, 1)) < 0.8, device=GPU),
        )


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("inside", [True, False], ids=["schedule inside", "schedule outside"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_replays_train_bit_for_bit_as_the_step_does(make, inside):
    plain = Training(make, lambda step: step, inside)
    captured = Training(make, tg.capture, inside)
    for batch in batches(8):
        results = [training.step(*batch) for training in (plain, captured)]
        for training in (plain, captured):
            if not inside:
                training.schedule.step()
        for name in ("loss", "logits"):
            np.testing.assert_array_equal(*(result[name].numpy() for result in results))
        assert_equal(plain.state(), captured.state())
        assert plain.optimizer.lr == captured.optimizer.lr
    assert captured.step.graphs == 1
    steps = [s["step"] for s in captured.optimizer._state.values()]
    assert steps == [8] * len(steps)


def test_half_precision_trains_bit_for_bit():
    plain, captured = (
        Training(OPTIMIZERS["adamw"], wrap, dtype="float16") for wrap in (lambda f: f, tg.capture)
    )
    for batch in batches(5, dtype="float16"):
        plain.step(*batch), captured.step(*batch)
        assert_equal(plain.state(), captured.state())


def test_one_graph_per_signature_and_any_order_of_them():
    plain, captured = (Training(OPTIMIZERS["adam"], wrap) for wrap in (lambda f: f, tg.capture))
    for batch in batches(14, sizes=(8, 8, 6)):
        plain.step(*batch), captured.step(*batch)
        assert_equal(plain.state(), captured.state())
    assert captured.step.graphs == 2


def test_on_a_cpu_it_simply_calls():
    calls = []

    @tg.capture
    def step(x, factor):
        calls.append(x)
        return (x * factor).sum().item()

    x = tg.ones(3)
    assert [step(x, 2.0) for _ in range(4)] == [6.0] * 4
    assert [call is x for call in calls] == [True] * 4
    assert step.graphs == 0
    assert step.__name__ == "step"


def test_replays_do_not_run_python_nor_read_back():
    calls = []
    training = Training(OPTIMIZERS["momentum"], lambda f: tg.capture(counting(f, calls)))
    data = list(batches(6))
    for batch in data[:3]:
        training.step(*batch)
    assert len(calls) == 3
    TRAFFIC.clear()
    for batch in data[3:]:
        training.step(*batch)
    assert len(calls) == 3
    assert not TRAFFIC


def counting(function, calls):
    def wrapped(*args):
        calls.append(args)
        return function(*args)

    return wrapped


def test_each_call_is_one_step_and_inputs_are_copied():
    w = nn.Parameter(tg.zeros(2, device=GPU))
    sgd = optim.SGD([w], 1.0)

    @tg.capture
    def step(x):
        sgd.zero_grad()
        (w * x).sum().backward()
        sgd.step()

    total = np.zeros(2)
    for i in range(6):
        x = tg.tensor([1.0, float(i)], device=GPU)
        step(x)
        total -= [1.0, i]
        np.testing.assert_array_equal(w.numpy(), total)
        x[...] = 100.0  # the graph has its own copy
    assert x.tolist() == [100.0, 100.0]


def test_parameters_buffers_and_gradients_keep_their_storage():
    training = Training(OPTIMIZERS["momentum"], tg.capture)
    data = list(batches(6))
    held = [t.data for t in (*training.model.parameters(), *training.model.buffers())]
    for batch in data[:3]:
        training.step(*batch)
    grads = [(p.grad, p.grad.data) for p in training.model.parameters()]
    for batch in data[3:]:
        training.step(*batch)
        for p, (tensor, array) in zip(training.model.parameters(), grads, strict=True):
            assert p.grad is tensor
            assert p.grad.data is array
    now = [t.data for t in (*training.model.parameters(), *training.model.buffers())]
    assert all(a is b for a, b in zip(held, now, strict=True))


@pytest.mark.parametrize("where", ["before", "after", "outside"])
def test_gradients_are_dropped_wherever_zero_grad_stands(where):
    results = []
    for wrap in (lambda f: f, tg.capture):
        w = nn.Parameter(tg.ones(3, device=GPU))
        sgd = optim.SGD([w], 0.1, momentum=0.9)

        def step(x, w=w, sgd=sgd):
            if where == "before":
                sgd.zero_grad()
            (w * w * x).sum().backward()
            sgd.step()
            if where == "after":
                sgd.zero_grad()

        step = wrap(step)
        for i in range(6):
            step(tg.tensor([1.0, 2.0, float(i)], device=GPU))
            if where == "outside":
                sgd.zero_grad()
        results.append([w.numpy(), w.grad if w.grad is None else w.grad.numpy()])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert (results[0][1] is None) == (results[1][1] is None) == (where != "before")


def test_gradients_accumulate_over_captured_backward_passes():
    results = []
    for wrap in (lambda f: f, tg.capture):
        w = nn.Parameter(tg.ones(3, device=GPU))
        sgd = optim.SGD([w], 0.1)
        w.grad = tg.zeros(3, device=GPU)
        backward = wrap(lambda x, w=w: (w * w * x).sum().backward())
        update = wrap(lambda sgd=sgd: sgd.step())
        with tg.default_device(GPU):
            for i in range(12):
                backward(tg.tensor([1.0, 2.0, float(i)], device=GPU))
                if i % 2:
                    update()
                    w.grad[...] = 0.0
        results.append(w.numpy())
    np.testing.assert_array_equal(*results)


def test_gradients_accumulate_and_start_anew_with_zero_grad():
    # After zero_grad the backward makes gradients, otherwise it adds to them: two graphs.
    results = []
    for wrap in (lambda f: f, tg.capture):
        w = nn.Parameter(tg.ones(3, device=GPU))
        backward = wrap(lambda x, w=w: (w * w * x).sum().backward())
        totals = []
        for i in range(20):
            backward(tg.tensor([1.0, 2.0, float(i)], device=GPU))
            totals.append(w.grad.numpy())
            if i % 2:
                w.grad = None
        results.append(totals)
    assert_equal(*results)


# --- what changes between calls ------------------------------------------------------------------


def test_a_change_of_what_replays_rely_on_is_noticed():
    trainings = [Training(OPTIMIZERS["momentum"], wrap) for wrap in (lambda f: f, tg.capture)]
    data = batches(60)

    def steps(count=4):
        for _ in range(count):
            batch = next(data)
            for training in trainings:
                training.step(*batch)
        assert_equal(*(training.state() for training in trainings))

    def change(function):
        for training in trainings:
            function(training)
        steps()

    steps()
    change(lambda t: t.optimizer.param_groups[0].update(momentum=0.5))
    change(lambda t: setattr(t.optimizer, "lr", 0.003))
    change(lambda t: t.model.norm1.eval())
    change(lambda t: t.model.norm1.train())
    change(lambda t: setattr(t.model.norm2, "eps", 1e-3))
    change(lambda t: t.model.conv.weight.requires_grad_(False))
    change(lambda t: t.model.load_state_dict({**t.model.state_dict()}))
    change(lambda t: t.optimizer.load_state_dict(t.optimizer.state_dict()))
    change(lambda t: t.model.astype("float64"))


def test_a_step_whose_surroundings_always_change_is_refused_with_what_changes():
    w = nn.Parameter(tg.ones(2, device=GPU))

    @tg.capture
    def step(x):
        (w * x).sum().backward()

    x = tg.ones(2, device=GPU)
    with pytest.raises(tg.CaptureError, match=r"the \.grad of a Tensor.* is another"):
        for _ in range(60):
            w.grad = tg.zeros(2, device=GPU)
            step(x)


def test_too_many_signatures_are_refused():
    step = tg.capture(lambda x, factor: x * factor)
    x = tg.ones(2, device=GPU)
    with pytest.raises(tg.CaptureError, match="pass numbers that change as Tensors"):
        for i in range(40):
            step(x, float(i))
    step.release()
    assert step(x, 3.0).tolist() == [3.0, 3.0]


def test_arguments_are_nested_and_what_is_no_array_is_part_of_the_signature():
    step = tg.capture(lambda batch, *, scale: {"out": [batch["x"][0] * scale, batch["y"]]})
    for _ in range(3):
        for scale in (2.0, 3.0):
            x, y = tg.ones(2, device=GPU), tg.zeros(1, device=GPU)
            out = step({"x": (x,), "y": y.data}, scale=scale)["out"]
            assert out[0].tolist() == [scale, scale]
            assert type(out[1]) is type(y.data)
    assert step.graphs == 2


# --- what is refused -----------------------------------------------------------------------------


def _item(x):
    return x.sum().item()


def _lazy_state(x, seen=[]):  # noqa: B006  (its state is what is tested)
    w = _lazy_state.late if len(seen) > 1 else _lazy_state.early
    seen.append(1)
    _lazy_state.sgd.zero_grad()
    (w * x).sum().backward()
    _lazy_state.sgd.step()


class Counting(nn.Module):
    def __init__(self):
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Recurrent(nn.Module):
    def __init__(self):
        self.hidden = tg.zeros(3, device=GPU)

    def forward(self, x):
        self.hidden = self.hidden + x
        return self.hidden


def _rebound(x, w=None):
    _rebound.w.data = _rebound.w.data - 0.1 * x.data
    return nn.Identity()(_rebound.w * x)


REFUSED = {
    "item": (_item, r"reads a value \(item\(\)"),
    "float": (lambda x: x * float(x.sum()), r"reads a value \(float\(\)"),
    "bool": (lambda x: x if x.sum() > 0 else -x, r"reads a value \(bool\(\)"),
    "numpy": (lambda x: tg.tensor(x.numpy(), device=GPU), "copies an array to the host"),
    "to the cpu": (lambda x: x.cpu(), "copies an array to the host|from 'cuda:0' to 'cpu'"),
    "from the host": (lambda x: x + tg.tensor([1.0], device=GPU), "from 'cpu' to 'cuda:0'"),
    "dropout": (lambda x: F.dropout(x, 0.5), "draws random numbers on the host"),
    "randn": (lambda x: x + tg.randn(3, device=GPU), "draws random numbers on the host"),
    "a raw read": (lambda x: x * x.data.sum().item(), "a read while capturing"),
    "a size that is data": (lambda x: x.data[x.data > 0], "a wait while capturing"),
    "a number returned": (lambda x: (x, 3), "returns 3, a int"),
    "a history returned": (lambda x: x.requires_grad_() * 2, "whose history is still to be walked"),
    "a host array returned": (lambda x: tg.ones(2), "an array on the host"),
    "state made late": (_lazy_state, "first gradient of a parameter"),
    "a counter": (Counting(), "changes 'calls' of a Counting"),
}


@pytest.mark.parametrize(("step", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_graph_can_repeat_is_refused_with_the_reason(step, reason):
    _lazy_state.early = nn.Parameter(tg.ones(3, device=GPU))
    _lazy_state.late = nn.Parameter(tg.ones(3, device=GPU))
    _lazy_state.sgd = optim.SGD([_lazy_state.early, _lazy_state.late], 0.1, momentum=0.9)
    captured = tg.capture(step)
    with pytest.raises(tg.CaptureError, match=reason):
        for _ in range(3):
            captured(tg.ones(3, device=GPU))
    # It was no real reading: what comes after can be read and drawn.
    assert tg.randn(3, device=GPU).sum().item() != 0


def test_new_memory_for_a_tensor_is_refused():
    layer = Recurrent()
    captured = tg.capture(layer)
    with pytest.raises(tg.CaptureError, match="changes 'hidden' of a Recurrent"):
        for _ in range(3):
            captured(tg.ones(3, device=GPU))
    w = tg.ones(3, device=GPU)
    module = nn.Module()
    module.register_buffer("w", w)
    module.forward = lambda x: setattr(w, "data", w.data * 2) or w * x
    with pytest.raises(tg.CaptureError, match=r"new memory.* write in place"):
        captured = tg.capture(module)
        for _ in range(3):
            captured(tg.ones(3, device=GPU))


def test_inputs_that_require_grad_or_are_elsewhere_are_refused():
    step = tg.capture(lambda x, y: x + y)
    x = tg.ones(2, device=GPU)
    with pytest.raises(tg.CaptureError, match="input 0 requires grad"):
        step(tg.ones(2, device=GPU, requires_grad=True), x)
    for other in ("cpu", "cuda:1"):
        with pytest.raises(tg.CaptureError, match=f"input 1 is on '{other}'.*'cuda:0'"):
            step(x, tg.ones(2, device=other))


def test_an_error_of_the_step_itself_comes_through_and_later_calls_work():
    fail = []

    @tg.capture
    def step(x):
        if fail:
            raise KeyError("mine")
        return x * 2

    x = tg.ones(2, device=GPU)
    step(x), step(x)
    fail.append(1)
    with pytest.raises(KeyError, match="mine"):
        step(x)
    fail.clear()
    assert [step(x).tolist() for _ in range(3)] == [[2.0, 2.0]] * 3
    assert step.graphs == 1


# --- the rest ------------------------------------------------------------------------------------


def test_a_captured_step_inside_another_is_part_of_it():
    inner = tg.capture(lambda x: x * 2)
    outer = tg.capture(lambda x: inner(x) + 1)
    x = tg.ones(2, device=GPU)
    assert [outer(x).tolist() for _ in range(4)] == [[3.0, 3.0]] * 4
    assert (inner.graphs, outer.graphs) == (0, 1)


def test_evaluation_under_no_grad_is_captured():
    model = Net().to(GPU).eval()
    evaluate = tg.capture(tg.no_grad()(lambda x, mask: model(x, mask)))
    for x, _, mask in batches(5):
        with tg.no_grad():
            expected = model(x, mask).numpy()
        got = evaluate(x, mask)
        np.testing.assert_array_equal(got.numpy(), expected)
        assert not got.requires_grad
    assert evaluate.graphs == 1


def test_it_works_on_the_gpu_of_its_inputs():
    step = tg.capture(lambda x: (x * 3).sum())
    for _ in range(5):
        result = step(tg.ones(4, device="cuda:1"))
        assert (result.device, result.item()) == ("cuda:1", 12.0)


def test_kernels_and_grad_mode_are_part_of_the_signature():
    step = tg.capture(lambda x: tg.is_grad_enabled() * x)
    x = tg.ones(1, device=GPU)
    for _ in range(4):
        assert step(x).item() == 1.0
        with tg.no_grad():
            assert step(x).item() == 0.0
        with use_kernels("generic"):
            assert step(x).item() == 1.0
    assert step.graphs == 3


def test_memory_is_held_with_the_function_and_given_back_with_it():
    step = tg.capture(lambda x: x * 2)
    x = tg.ones(1000, device=GPU)
    for _ in range(3):
        step(x)
    (signature,) = step._signatures.values()
    buffer = weakref.ref(signature.buffers[0])
    recorder = signature.recorder
    assert not recorder.released
    del signature
    step.release()
    gc.collect()
    assert recorder.released
    assert buffer() is None
    assert step.graphs == 0
    assert step(x).tolist() == [2.0] * 1000  # it begins again
    recorder = next(iter(step._recorders.values()))
    del step
    gc.collect()
    assert recorder.released


def test_backward_through_values_from_before_a_replay_is_refused():
    training = Training(OPTIMIZERS["sgd"], tg.capture)
    data = list(batches(5))
    for batch in data[:4]:
        training.step(*batch)
    loss = (training.model.dense.weight**2).sum()
    training.step(*data[4])
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()
