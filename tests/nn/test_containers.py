"""Sequential and ModuleList: order, names, slices."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import nn


def layers(n=4):
    return [nn.Linear(2, 2) for _ in range(n)]


@pytest.mark.parametrize("make", [lambda m: nn.Sequential(*m), nn.ModuleList])
def test_order_length_and_indexing(make):
    modules = layers()
    held = make(modules)
    assert len(held) == 4
    assert list(held) == modules
    assert held[0] is modules[0]
    assert held[-1] is modules[3]
    assert [name for name, _ in held.named_children()] == ["0", "1", "2", "3"]
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"no item {index}, it holds 4"):
            held[index]


@pytest.mark.parametrize("make", [lambda m: nn.Sequential(*m), nn.ModuleList])
def test_a_slice_shares_its_modules_and_keeps_their_names(make):
    modules = layers()
    part = make(modules)[1:3]
    assert type(part) is type(make([]))
    assert list(part) == modules[1:3]
    assert [name for name, _ in part.named_children()] == ["1", "2"]
    assert part.append(modules[0])[2] is modules[0]
    assert list(make(modules)[::2]) == modules[::2]


def test_items_can_be_replaced_and_added():
    net = nn.Sequential(*layers(2))
    new = nn.ReLU()
    net[-1] = new
    assert net[1] is new
    assert net.append(nn.Tanh()) is net
    assert len(net) == 3
    assert len(nn.ModuleList(layers(1)).extend(layers(2))) == 3


def test_sequential_runs_in_order_and_takes_names():
    double, negate = nn.Module(), nn.ReLU()
    double.forward = lambda x: x * 2
    net = nn.Sequential({"double": double, "relu": negate})
    assert net(tg.tensor([-1.0, 3.0])).tolist() == [0.0, 6.0]
    assert net.relu is negate
    np.testing.assert_array_equal(nn.Sequential()(np.ones(2)), np.ones(2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nn.Sequential(nn.ReLU), TypeError, "item 0 is a type, expected a Module"),
        (lambda: nn.ModuleList([np.tanh]), TypeError, "item 0 is a ufunc"),
        (lambda: nn.Sequential({"forward": nn.ReLU()}), ValueError, "'forward' cannot name"),
        (lambda: nn.Sequential({"training": nn.ReLU()}), ValueError, "'training' cannot name"),
        (lambda: nn.Sequential({"a.b": nn.ReLU()}), ValueError, "cannot name a part"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_calling_a_list_says_that_it_has_no_forward():
    with pytest.raises(NotImplementedError, match="ModuleList defines no forward"):
        nn.ModuleList()(1)
