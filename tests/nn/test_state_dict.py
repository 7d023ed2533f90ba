"""State dicts: shared going out, written in place coming in, and nothing half-loaded."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray
from tinygrad_bn import nn


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def values(model):
    return {name: t.numpy().copy() for name, t in model.state_dict().items()}


def test_names_shapes_and_dtypes_are_pytorchs():
    assert {name: (t.shape, str(t.dtype)) for name, t in network().state_dict().items()} == {
        "0.weight": ((2, 1, 3, 3), "float32"),
        "0.bias": ((2,), "float32"),
        "1.weight": ((2,), "float32"),
        "1.bias": ((2,), "float32"),
        "1.running_mean": ((2,), "float32"),
        "1.running_var": ((2,), "float32"),
        "1.num_batches_tracked": ((), "int64"),
        "3.weight": ((3, 8), "float32"),
        "3.bias": ((3,), "float32"),
    }


def test_it_shares_memory_and_takes_no_part_in_the_graph():
    model = network()
    state = model.state_dict()
    assert not any(t.requires_grad for t in state.values())
    model[0].weight.data[...] = 5
    assert (state["0.weight"].numpy() == 5).all()
    assert np.shares_memory(state["1.running_mean"].data, model[1].running_mean.data)


def test_a_round_trip_makes_models_equal_to_the_bit():
    first, second = network(), network()
    x = tg.randn(4, 1, 4, 4)
    first(x)
    kept = list(second.parameters())
    assert second.load_state_dict(first.state_dict()) == ([], [])
    np.testing.assert_array_equal(second.eval()(x).numpy(), first.eval()(x).numpy())
    assert all(a is b for a, b in zip(second.parameters(), kept, strict=True))
    assert second[1].num_batches_tracked.item() == 1
    # Written, not adopted: the models do not share memory.
    second[0].weight.data[...] = 0
    assert (first[0].weight.numpy() != 0).any()


def test_arrays_of_other_dtypes_and_layouts_are_converted():
    model = network()
    state = {k: np.array(v, "float64", order="F") for k, v in values(network()).items()}
    model.load_state_dict(state)
    for name, t in model.state_dict().items():
        assert t.dtype == (np.int64 if "num_batches" in name else np.float32)
        np.testing.assert_array_equal(t.numpy(), state[name].astype(t.dtype))


def test_loading_crosses_devices(strict_gpu):  # noqa: F811
    gpu, cpu = network().to("cuda"), network()
    gpu.load_state_dict(cpu.state_dict())
    assert type(gpu[0].weight.data) is StrictArray
    cpu[0].weight.data[...] = 0
    cpu.load_state_dict(gpu.state_dict())
    np.testing.assert_array_equal(cpu[0].weight.numpy(), gpu[0].weight.numpy())
    assert (cpu[0].weight.numpy() != 0).any()


def test_all_that_does_not_fit_is_listed_at_once_and_nothing_is_loaded():
    model = network()
    before = values(model)
    state = {name: value + 1 for name, value in before.items()}
    del state["0.bias"], state["1.running_var"]
    state["extra"] = np.ones(1)
    state["3.weight"] = np.ones((3, 9))
    state["3.bias"] = np.ones((1, 3))
    state["1.weight"] = [1.0, 1.0]
    with pytest.raises(nn.StateDictError) as caught:
        model.load_state_dict(state)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    for part in (
        "missing: 0.bias",
        "missing: 1.running_var",
        "unexpected: extra",
        "3.weight has shape (3, 9), expected (3, 8)",
        "3.bias has shape (1, 3), expected (3,)",
        "1.weight is a list",
        "nothing was loaded",
        "strict=False",
    ):
        assert part in message
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_not_strict_loads_what_both_have_and_reports_the_rest():
    model = network()
    result = model.load_state_dict({"3.bias": np.ones(3), "extra": np.ones(1)}, strict=False)
    assert model[3].bias.tolist() == [1, 1, 1]
    assert result.unexpected_keys == ["extra"]
    assert len(result.missing_keys) == 8
    with pytest.raises(nn.StateDictError, match=r"3\.bias has shape") as caught:
        model.load_state_dict({"3.bias": np.ones(4)}, strict=False)
    assert "missing" not in str(caught.value)


def test_loading_between_forward_and_backward_is_noticed():
    model = nn.Linear(2, 2)
    loss = model(tg.randn(3, 2, requires_grad=True)).sum()
    model.load_state_dict(values(model))
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


def test_buffers_that_are_not_persistent_stay_out():
    module = nn.Module()
    module.register_buffer("kept", tg.ones(1))
    module.register_buffer("scratch", tg.ones(1), persistent=False)
    assert list(module.state_dict()) == ["kept"]
    assert list(module.state_dict("a.b")) == ["a.b.kept"]
    assert len(list(module.buffers())) == 2
