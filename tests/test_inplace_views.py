"""Views and writes: one version for one memory, and no view that knows less than its memory."""

import copy
import operator

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.ops.shape import flip


def leaf(*values):
    return tg.tensor(np.array(values, "float64"), requires_grad=True)


VIEWS = {
    "a slice": lambda t: t[:2],
    "the whole": lambda t: t[...],
    "reshape": lambda t: t.reshape(2, 2),
    "transpose": lambda t: t.reshape(2, 2).T,
    "swapaxes": lambda t: t.reshape(2, 2).swapaxes(0, 1),
    "flatten": lambda t: t.reshape(2, 2).flatten(),
    "expand_dims": lambda t: t.expand_dims(0),
    "squeeze": lambda t: t.reshape(4, 1).squeeze(),
    "broadcast_to": lambda t: t.broadcast_to((3, 4)),
    "flip": lambda t: flip(t, axis=0),
    "a view of a view": lambda t: t[:3][1:],
}
SHARING = {
    **VIEWS,
    "detach": lambda t: t.detach(),
    "a Tensor of the Tensor": lambda t: tg.Tensor(t),
    "copy.copy": copy.copy,
}


@pytest.mark.parametrize("take", SHARING.values(), ids=SHARING.keys())
def test_a_write_to_the_base_is_noticed_by_what_saved_the_view(take):
    base = tg.tensor(np.array([1.0, 2.0, 3.0, 4.0]))
    view = take(base)
    assert np.shares_memory(view.numpy(), base.numpy())
    weight = tg.tensor(np.ones(view.shape), requires_grad=True)
    pending = (weight * view).sum()
    base[1] = 9.0
    with pytest.raises(RuntimeError, match="in place"):
        pending.backward()


WRITABLE = {name: take for name, take in SHARING.items() if name != "broadcast_to"}


@pytest.mark.parametrize("take", WRITABLE.values(), ids=WRITABLE.keys())
def test_a_write_to_a_view_is_noticed_by_what_saved_the_base(take):
    base = tg.tensor(np.array([1.0, 2.0, 3.0, 4.0]))
    weight = leaf(1.0, 1.0, 1.0, 1.0)
    pending = (weight * base).sum()
    view = take(base)
    view[0] = 9.0
    with pytest.raises(RuntimeError, match="in place"):
        pending.backward()


COPIES = {
    "copy": lambda t: t.copy(),
    "astype": lambda t: t.astype("float64"),
    "an integer array": lambda t: t[np.array([0, 1])],
    "a mask": lambda t: t[np.array([True, True, False, False])],
    "flatten of a transpose": lambda t: t.reshape(2, 2).T.flatten(),
    "tensor": lambda t: tg.tensor(t),
    "deepcopy": copy.deepcopy,
    "arithmetic": lambda t: t + 0,
}


@pytest.mark.parametrize("take", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_not_affected_by_writes_to_the_original(take):
    original = tg.tensor(np.array([1.0, 2.0, 3.0, 4.0]))
    twin = take(original)
    kept = twin.numpy().copy()
    weight = tg.tensor(np.ones(twin.shape), requires_grad=True)
    pending = (weight * twin).sum()
    original[:] = 9.0
    pending.backward()
    np.testing.assert_array_equal(weight.grad.numpy(), kept)


# --- recorded writes --------------------------------------------------------------------------


@pytest.mark.parametrize("take", VIEWS.values(), ids=VIEWS.keys())
def test_writing_what_requires_grad_into_a_view_is_refused(take):
    view = take(tg.tensor(np.zeros(4)))
    kept = view.tolist()
    for write in (
        lambda: operator.setitem(view, 0, leaf(1.0)[0]),
        lambda: view.__iadd__(leaf(1.0)),
    ):
        with pytest.raises(RuntimeError, match=r"to a view.*base\[index\] = value"):
            write()
    assert view.tolist() == kept
    assert not view.requires_grad


@pytest.mark.parametrize("take", VIEWS.values(), ids=VIEWS.keys())
def test_writing_a_number_into_a_view_on_the_graph_is_refused(take):
    view = take(leaf(1.0, 2.0, 3.0, 4.0) * 1)
    with pytest.raises(RuntimeError, match="to a view"):
        view *= 2.0


@pytest.mark.parametrize("take", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("on_graph", [False, True])
@pytest.mark.parametrize(
    "use",
    [lambda view: view * 2.0, lambda view: view * leaf(1.0), lambda view: view.reshape(-1) * 2.0],
    ids=["alone", "with another", "as a view"],
)
def test_a_view_that_missed_a_recorded_write_cannot_be_used(take, on_graph, use):
    base = leaf(1.0, 2.0, 3.0, 4.0) * 1 if on_graph else tg.tensor(np.zeros(4))
    view = take(base)
    base[0] = leaf(5.0)[0]
    with pytest.raises(RuntimeError, match="take the view again"):
        use(view)
    assert use(take(base)).requires_grad


def test_a_detached_tensor_does_not_carry_recorded_writes_into_the_original_unseen():
    original = tg.tensor(np.zeros(2))
    detached, v = original.detach(), leaf(5.0)
    try:
        detached[0] = v[0]
        result = original * 2.0
    except RuntimeError:
        return  # either the write or the later use may be refused
    assert result.requires_grad  # or the original would have to know


def test_a_view_may_be_read_again_after_an_unrecorded_write():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    view = x[:2]
    with tg.no_grad():
        x *= 10.0
        view[1] = 7.0
    (view * 2.0).sum().backward()
    assert x.tolist() == [10.0, 7.0, 30.0, 40.0]
    assert x.grad.tolist() == [2.0, 2.0, 0.0, 0.0]


def test_a_recurrence_can_be_written_in_place_with_copies():
    x = leaf(2.0)
    y = tg.tensor(np.ones(5))
    for i in range(1, 5):
        y[i] = y[i - 1].copy() * x[0]
    assert y.tolist() == [1.0, 2.0, 4.0, 8.0, 16.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0 + 2 * 2 + 3 * 4 + 4 * 8]


def test_gradients_of_views_reach_the_base():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    matrix = x.reshape(2, 2)
    (matrix.T[0] * matrix[1]).sum().backward()
    # (x₀, x₂) · (x₂, x₃)
    assert x.grad.tolist() == [3.0, 0.0, 1.0 + 4.0, 3.0]
