"""A Tensor as a value: what it is made from, what it turns into, what it prints."""

import copy
import operator
import pickle

import numpy as np
import pytest

import tinygrad_bn as tg

# --- making one -------------------------------------------------------------------------------


def test_tensor_shares_an_array_and_the_function_copies_it():
    array = np.ones(3)
    assert tg.Tensor(array).data is array
    assert tg.Tensor(tg.Tensor(array)).data is array
    assert tg.Tensor(array, dtype="float64", device="cpu").data is array
    assert not np.shares_memory(tg.tensor(array).data, array)
    assert not np.shares_memory(tg.tensor(tg.Tensor(array)).data, array)
    assert not np.shares_memory(tg.Tensor(array, dtype="float32").data, array)


def test_a_tensor_of_a_tensor_is_a_leaf():
    x = tg.tensor([1.0], requires_grad=True)
    for twin in (tg.Tensor(x * 2), tg.tensor(x * 2), tg.Tensor(x)):
        assert twin.is_leaf
        assert not twin.requires_grad


@pytest.mark.parametrize("make", [tg.Tensor, tg.tensor])
@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (1.5, "float32"),
        ([1.5, 2], "float32"),
        ([[1.0], (2.0,)], "float32"),
        ([], "float32"),
        (3, "int64"),
        ([1, 2], "int64"),
        (True, "bool"),
        ([True, False], "bool"),
        (np.float64(1.5), "float64"),
        ([np.float64(1.5)], "float64"),
        ([np.float32(1.5)], "float32"),
        ([np.float16(1.5)], "float16"),
        ([np.ones(2), [1.0, 2.0]], "float64"),
        (np.ones(2, "float16"), "float16"),
        (np.int32(3), "int32"),
        (np.ones(2, "uint8"), "uint8"),
    ],
    ids=repr,
)
def test_python_floats_become_float32_and_numpys_values_keep_their_dtype(make, data, dtype):
    tensor = make(data)
    assert type(tensor.data) is np.ndarray
    assert tensor.dtype == dtype
    assert tensor.tolist() == np.asarray(data).tolist()
    assert make(data, dtype="float64").dtype == np.float64


def test_lists_may_hold_tensors():
    made = tg.tensor([tg.tensor([1.0, 2.0]), tg.tensor([3.0, 4.0])])
    assert (made.tolist(), made.dtype) == ([[1.0, 2.0], [3.0, 4.0]], np.float32)


def test_python_floats_beside_tensors_in_a_list_are_weak():
    assert tg.tensor([tg.tensor(1.0), 2.0]).dtype == np.float32
    assert tg.tensor([np.float32(1), 2.0]).dtype == np.float32


@pytest.mark.parametrize(
    "data",
    ["abc", ["a", "b"], None, [None], {"a": 1}, {1, 2}, object(), b"1", np.array(["a"])],
    ids=repr,
)
def test_what_is_no_number_is_refused(data):
    with pytest.raises(TypeError, match=r"Tensor: .*expected numbers"):
        tg.Tensor(data)


@pytest.mark.parametrize("data", [np.array([None]), np.array(["2020"], "M8[D]"), np.array([b"a"])])
def test_arrays_of_anything_but_numbers_are_refused(data):
    with pytest.raises(TypeError, match=r"Tensor: .*expected numbers"):
        tg.Tensor(data)


@pytest.mark.parametrize("data", [[[1.0], [1.0, 2.0]], [1.0, [2.0]], [np.ones(2), np.ones(3)]])
def test_ragged_lists_are_refused(data):
    with pytest.raises((TypeError, ValueError), match=r"Tensor: .*equal length"):
        tg.Tensor(data)


def test_an_unknown_dtype_is_named():
    with pytest.raises(TypeError, match="'float33' names no dtype"):
        tg.Tensor([1.0], dtype="float33")


def test_facts_about_a_tensor():
    t = tg.tensor(np.zeros((2, 3, 4), "float32"))
    assert (t.shape, t.ndim, t.size, t.dtype, t.device) == ((2, 3, 4), 3, 24, np.float32, "cpu")
    assert (len(t), t.T.shape, t.is_leaf, t.requires_grad, t.grad) == (
        2,
        (4, 3, 2),
        True,
        False,
        None,
    )


def test_requires_grad_is_set_on_leaves_and_refused_to_results():
    x = tg.tensor([1.0])
    assert x.requires_grad_() is x
    assert x.requires_grad
    y = x * 2
    with pytest.raises(RuntimeError, match=r"requires_grad_\(False\).*detach"):
        y.requires_grad_(False)
    assert not x.requires_grad_(False).requires_grad


# --- turning it into something else -----------------------------------------------------------


def test_numpy_and_detach_share_memory_also_of_a_tensor_that_requires_grad():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    assert x.numpy() is x.data
    assert x.detach().data is x.data
    assert not (x * 2).detach().requires_grad


def test_implicit_conversion_is_refused_where_the_graph_would_be_lost():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    for convert in (
        np.asarray,
        np.array,
        lambda t: np.concatenate([t, t]),
        lambda t: np.asarray(t + 1),
    ):
        with pytest.raises(RuntimeError, match=r"requires grad.*\.detach\(\)\.numpy\(\)"):
            convert(x)
    np.testing.assert_array_equal(np.asarray(x.detach()), [1, 2])


def test_implicit_conversion_follows_numpys_copy_and_dtype():
    t = tg.tensor(np.ones(2))
    assert np.asarray(t) is t.data
    assert np.array(t, copy=False) is t.data
    assert not np.shares_memory(np.array(t), t.data)
    assert np.asarray(t, dtype="float32").dtype == np.float32
    with pytest.raises(ValueError, match="copy"):
        np.array(t, dtype="float32", copy=False)


@pytest.mark.parametrize("convert", [bool, float, int, operator.index])
def test_more_than_one_entry_is_no_single_value(convert):
    for data in ([1, 2], []):
        with pytest.raises(
            TypeError, match=rf"{convert.__name__}\(\) of a Tensor of shape.*reduce"
        ):
            convert(tg.tensor(data, dtype="int64"))


def test_a_single_entry_is_a_value_whatever_its_rank():
    for data in (3, [3], [[3]]):
        t = tg.tensor(data)
        assert (bool(t), float(t), int(t), operator.index(t), t.item()) == (True, 3.0, 3, 3, 3)
    assert float(tg.tensor(2.5, requires_grad=True)) == 2.5
    assert type(tg.tensor(2.5).item()) is float
    assert [10, 20, 30][tg.tensor(1)] == 20


def test_a_float_is_no_index():
    with pytest.raises(TypeError, match=r"index|integer"):
        operator.index(tg.tensor(1.0))
    with pytest.raises(TypeError, match=r"index|integer|indices"):
        [1, 2][tg.tensor(1.0)]


def test_item_of_several_entries_is_refused():
    with pytest.raises(ValueError, match=r"item: .*\(2,\).*exactly one"):
        tg.tensor([1.0, 2.0]).item()


def test_dlpack_round_trip_shares_memory():
    t = tg.tensor([1.0, 2.0])
    array = np.from_dlpack(t)
    assert np.shares_memory(array, t.data)
    assert tg.Tensor(array).tolist() == [1.0, 2.0]


def test_pickling_and_deepcopy_keep_the_values_and_drop_the_graph():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    (x * x).sum().backward()
    twin, memo = copy.deepcopy([x, x]), pickle.loads(pickle.dumps(x))
    assert twin[0] is twin[1]
    for other in (twin[0], memo):
        assert type(other) is tg.Tensor
        assert other.tolist() == [1.0, 2.0]
        assert other.requires_grad
        assert other.is_leaf
        assert not np.shares_memory(other.data, x.data)
        other.sum().backward()
    assert x.grad.tolist() == [2.0, 4.0]
    assert not np.shares_memory(copy.deepcopy(x).grad.data, x.grad.data)
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"detach\(\)"):
            make(x * 2)


# --- iterating, hashing, printing -------------------------------------------------------------


def test_iteration_gives_the_rows_and_ends():
    x = tg.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    rows = list(x)
    assert [row.tolist() for row in rows] == [[1.0, 2.0], [3.0, 4.0]]
    (first, second) = x
    (first * second).sum().backward()
    assert x.grad.tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert [row.tolist() for row in reversed(x)] == [[3.0, 4.0], [1.0, 2.0]]


def test_a_zero_dimensional_tensor_has_no_length_and_is_not_iterated():
    for use in (len, iter, list):
        with pytest.raises(TypeError, match="0-d"):
            use(tg.tensor(1.0))


def test_indexing_past_the_end_is_an_index_error():
    with pytest.raises(IndexError, match="out of bounds"):
        tg.tensor([1.0])[1]


def test_membership_compares_entries():
    assert 2.0 in tg.tensor([1.0, 2.0])
    assert 3.0 not in tg.tensor([1.0, 2.0])


def test_tensors_are_keys_by_identity():
    x, y = tg.tensor([1.0, 2.0]), tg.tensor([1.0, 2.0])
    assert {x: "x", y: "y"}[x] == "x"
    assert len({x, y, x}) == 2
    before = hash(x)
    x += 1
    assert hash(x) == before


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tg.tensor([1.0, 2.5]), "Tensor([1. , 2.5], dtype=float32)"),
        (lambda: tg.tensor(3), "Tensor(3, dtype=int64)"),
        (lambda: tg.tensor([]), "Tensor([], dtype=float32)"),
        (
            lambda: tg.tensor([1.0], requires_grad=True),
            "Tensor([1.], dtype=float32, requires_grad=True)",
        ),
        (
            lambda: tg.tensor([1.0], requires_grad=True) * 2,
            "Tensor([2.], dtype=float32, op='multiply')",
        ),
        (
            lambda: tg.tensor([[1, 2], [3, 4]]),
            "Tensor([[1, 2],\n        [3, 4]], dtype=int64)",
        ),
    ],
)
def test_repr_shows_entries_dtype_and_where_it_came_from(make, text):
    assert repr(make()) == text


def test_repr_of_a_large_tensor_is_short():
    assert len(repr(tg.tensor(np.zeros((1000, 1000))))) < 1000


def test_a_single_entry_can_be_formatted_as_a_number():
    assert f"{tg.tensor([2.5]):.3f}" == "2.500"
    assert f"{tg.tensor([2.5])}" == repr(tg.tensor([2.5]))
    with pytest.raises(ValueError):
        f"{tg.tensor([1.0, 2.0]):.3f}"
