"""Nothing above the backend floor names an array library: it all runs on a second one, bit for bit.

Every op of the registry, its derivative and the derivative of that, and training steps, on NumPy
arrays and on `StrictArray`s, which raise where NumPy's functions meet them.
"""

import importlib
import pkgutil

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.strict_array import StrictArray, plain, strict, strict_backend
from tinygrad_bn import backend, nn, ops
from tinygrad_bn.backend import ARRAY_TYPES, cuda, register_backend
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.domain import Boolean, Integer, case
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.ops.elementwise import relu

for _module in pkgutil.iter_modules(ops.__path__):
    importlib.import_module(f"{ops.__name__}.{_module.name}")


@pytest.fixture(autouse=True)
def generic():
    with use_kernels("generic"):
        yield


SHAPES = ((3, 4), (4,), (2, 1, 4))  # of ops whose inputs broadcast: they do


def _cases(op):
    domain = op.domain
    if domain is not None and domain.cases:
        return domain.cases
    count = len(op.inputs) if domain is None else len(domain.inputs)
    return (case(*SHAPES[:count]),)


def _draw(rng, kind, shape):
    """Return a random array of one kind of input, clear of its kinks."""
    if isinstance(kind, Integer):
        return rng.integers(kind.low, kind.high, shape)
    if isinstance(kind, Boolean):
        return rng.random(shape) < 0.5
    low, high, kinks = (-2.0, 2.0, ()) if kind is None else (kind.low, kind.high, kind.kinks)
    values = np.asarray(rng.uniform(low, high, shape))
    for kink in kinks:
        values = np.where(np.abs(values - kink) < 0.05, np.minimum(kink + 0.1, high), values)
    return values


def _inputs(op, sample):
    rng = np.random.default_rng(0)
    kinds = (None,) if op.domain is None else op.domain.inputs
    return [
        None if shape is None else _draw(rng, kinds[min(i, len(kinds) - 1)], shape)
        for i, shape in enumerate(sample.shapes)
    ]


def _everything(op, arrays, options, convert):
    """Return the raw outputs, gradients and second gradients of an op on converted arrays."""
    backend.manual_seed(0)
    inputs = [
        None if a is None else tg.Tensor(convert(a), requires_grad=a.dtype.kind == "f")
        for a in arrays
    ]
    out = op(*inputs, **options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    found = [tensor.data for tensor in outputs]
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    if not outputs:
        return found
    rng = np.random.default_rng(1)
    seeds = [tg.Tensor(rng.normal(size=tensor.shape)).to(tensor.device) for tensor in outputs]
    raw = tg.grad(outputs, leaves, seeds, retain_graph=True, allow_unused=True)
    taped = tg.grad(outputs, leaves, seeds, create_graph=True, allow_unused=True)
    squares = [(g * g).sum() for g in taped if g is not None and g.requires_grad]
    second = tg.grad(squares, leaves, allow_unused=True) if squares else ()
    return found + [g if g is None else g.data for g in (*raw, *taped, *second)]


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        pytest.param(name, sample, id=f"{name}-{i}")
        for name, op in REGISTRY.items()
        for i, sample in enumerate(_cases(op))
    ],
)
def test_op_and_its_derivatives_run_on_another_array_type(strict_gpu, name, sample):
    op = REGISTRY[name]
    arrays = _inputs(op, sample)
    expected = _everything(op, arrays, sample.options, np.array)
    found = _everything(op, arrays, sample.options, strict)
    moved = 1 if name == "to_device" else 0  # its output is where it was told to go
    assert len(found) == len(expected)
    for got, want in zip(found[moved:], expected[moved:], strict=True):
        if want is None:
            assert got is None
        else:
            assert type(got) is StrictArray
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(plain(got), want)


def _two_layers(convert):
    """Return losses and parameters of five steps of gradient descent on a small network."""
    rng = np.random.default_rng(0)
    x, target = (tg.Tensor(convert(rng.normal(size=shape))) for shape in ((8, 5), (8, 2)))
    parameters = [
        tg.Tensor(convert(rng.normal(size=shape).astype("float32")), requires_grad=True)
        for shape in ((5, 7), (7,), (7, 2), (2,))
    ]
    losses = []
    for _ in range(5):
        w, b, v, c = parameters
        hidden = relu(x @ w + b)
        loss = ((hidden @ v + c - target) ** 2).mean()
        loss.backward()
        losses.append(loss.item())
        with tg.no_grad():
            for parameter in parameters:
                parameter -= parameter.grad * 0.05
                parameter.grad = None
    return losses, [parameter.numpy() for parameter in parameters]


def test_gradient_descent_agrees_bit_for_bit(strict_gpu):
    losses, parameters = _two_layers(np.array)
    strict_losses, strict_parameters = _two_layers(strict)
    assert losses == strict_losses
    assert losses[-1] < losses[0]
    for ours, theirs in zip(parameters, strict_parameters, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_modules_and_sgd_agree_bit_for_bit(strict_gpu, momentum):
    from tinygrad_bn import functional as F
    from tinygrad_bn import nn, optim

    def train(device):
        backend.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(device)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        rng = np.random.default_rng(0)
        x = tg.tensor(rng.normal(size=(8, 5)).astype("float32"), device=device)
        labels = tg.tensor(rng.integers(0, 3, 8), device=device)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, list(model.parameters())

    losses, parameters = train("cpu")
    strict_losses, strict_parameters = train("cuda")
    assert losses == strict_losses
    assert losses[-1] < losses[0]
    for ours, theirs in zip(parameters, strict_parameters, strict=True):
        assert type(theirs.data) is StrictArray
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_in_place_writes_reach_the_other_array_type(strict_gpu):
    def written(convert):
        x = tg.Tensor(convert(np.arange(4.0)), requires_grad=True)
        v = tg.Tensor(convert(np.array([5.0, 6.0])), requires_grad=True)
        y = x * 2
        y[1:3] = v
        y += x
        y *= 3
        y /= 2
        y -= 1
        y.sum().backward()
        return [y.numpy(), x.grad.numpy(), v.grad.numpy()]

    for ours, theirs in zip(written(np.array), written(strict), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def unseen_gpu(monkeypatch):
    """Have StrictArray taken for CuPy's array, of which none has been seen so far."""
    monkeypatch.setattr(cuda, "unavailable_because", lambda: None)
    monkeypatch.setattr(cuda, "_registered", lambda: register_backend(strict_backend))
    monkeypatch.setattr(StrictArray, "__module__", "cupy")
    assert StrictArray not in ARRAY_TYPES
    yield
    ARRAY_TYPES.pop(StrictArray, None)


@pytest.mark.parametrize(
    "use", [tg.Tensor, tg.tensor, tg.zeros_like, nn.Parameter], ids=lambda use: use.__name__
)
def test_the_first_array_of_cupy_may_be_met_anywhere(unseen_gpu, use):
    assert type(use(strict(np.ones(3))).data) is StrictArray


def test_the_first_array_of_cupy_is_no_gradient_of_the_cpus(unseen_gpu):
    with pytest.raises(ValueError, match="on 'cpu' and on 'cuda:0'"):
        tg.tensor([1.0], requires_grad=True).backward(strict(np.ones(1)))


def test_lists_are_operands_and_are_written_as_they_are_on_the_cpu(strict_gpu):
    results = []
    for device in ("cpu", "cuda"):
        x = tg.tensor([1.0, 2.0], device=device, requires_grad=True)
        product = x * [3.0, 4.0]
        product[0] = 5.0
        product += [1, 2]
        product[:] = product * (2, 2)
        product.sum().backward()
        written = tg.zeros(2, 2, device=device)
        written[0] = [1, 2]
        joined = tg.concatenate([tg.where(written[0] > 1, [7.0, 8.0], 0), [9.0]])
        results.append([t.numpy() for t in (product.detach(), x.grad, written, joined)])
    for here, there in zip(*results, strict=True):
        np.testing.assert_array_equal(there, here)
        assert there.dtype == here.dtype


@pytest.mark.parametrize("index", [1, (1,), (1, Ellipsis), slice(1, 2)])
def test_an_entry_that_was_read_before_a_write_is_the_same_on_both_array_types(strict_gpu, index):
    seen = []
    for convert in (np.array, strict):
        t = tg.Tensor(convert(np.arange(4.0)))
        entry = t[index]
        t[1] = 9.0
        seen.append(entry.sum().item())
    assert seen[0] == seen[1]


def test_a_tensor_of_another_array_type_needs_no_conversion(strict_gpu):
    t = tg.Tensor(strict(np.arange(4.0)))
    assert t.dtype == np.float64
    assert t.sum().item() == 6.0
    assert [row.item() for row in t] == [0.0, 1.0, 2.0, 3.0]
    assert float(t[1]) == 1.0
