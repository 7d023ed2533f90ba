"""Operators and methods of a Tensor: NumPy's names, NumPy's results."""

import operator

import numpy as np
import pytest

import tinygrad_bn as tg

BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]
A = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "float32")
B = np.array([2.0, 2.0, 0.5], "float32")
EXPONENTS = np.array([2, 1, 1])


def agrees(tensor, array):
    """Assert that a Tensor holds what NumPy computed, dtype and all."""
    assert isinstance(tensor, tg.Tensor)
    assert type(tensor.data) is np.ndarray
    assert tensor.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(tensor.numpy(), array, strict=True)


@pytest.mark.parametrize("function", [*BINARY, *COMPARISONS], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "other",
    [
        B,
        A,
        2,
        2.0,
        True,
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.array(2.0),
        np.array([2, 1, 1]),
    ],
    ids=lambda v: f"{type(v).__name__}{getattr(v, 'shape', '')}{getattr(v, 'dtype', '')}",
)
def test_operators_agree_with_numpy_on_both_sides(function, other):
    agrees(function(tg.Tensor(A), other), function(A, other))
    agrees(function(other, tg.Tensor(A)), np.asarray(function(other, A)))
    if isinstance(other, (np.ndarray, np.generic)):
        agrees(function(tg.Tensor(A), tg.Tensor(other)), function(A, other))


def test_python_scalars_are_weak_and_numpy_scalars_are_strong():
    half = tg.tensor(np.ones(2, "float16"))
    assert (half * 2.0).dtype == np.float16
    assert (2 / half).dtype == np.float16
    assert (half * np.float64(2)).dtype == np.float64
    assert (np.float32(2) * half).dtype == np.float32
    assert (tg.tensor([1, 2]) * 0.5).dtype == np.float64  # as NumPy's int64


def test_an_array_on_the_left_leaves_the_operator_to_the_tensor():
    x = tg.tensor(A, requires_grad=True)
    for function in (*BINARY, operator.matmul):
        left = np.ones((2, 2), "float32") if function is operator.matmul else A
        result = function(left, x)
        assert isinstance(result, tg.Tensor)
        assert result.requires_grad
    with pytest.raises(TypeError, match="Tensor"):
        np.ones(2).__iadd__(tg.tensor([1.0, 2.0]))
    with pytest.raises(TypeError, match="Tensor"):
        np.exp(x)


def test_matrix_product_and_unary_operators():
    t = tg.Tensor(A)
    agrees(t @ A.T, A @ A.T)
    agrees(A @ t.T, A @ A.T)
    agrees(t @ tg.Tensor(B), A @ B)
    agrees(-t, -A)
    agrees(abs(-t), A)
    assert +t is t


def test_comparisons_give_no_gradient():
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    for function in COMPARISONS:
        result = function(x, 1.0)
        assert result.dtype == np.bool_
        assert not result.requires_grad


REDUCTIONS = ["sum", "mean", "max", "min", "var"]


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1, -3, (0, 2), (-1, 0), (0, 1, 2), ()])
@pytest.mark.parametrize("keepdims", [False, True])
def test_reductions_agree_with_numpy(name, axis, keepdims):
    # Sixteenths: sums, and the means of 2, 4 or 8 of them, are exact in any order.
    array = np.random.default_rng(0).integers(-32, 32, (2, 4, 2)) / 16
    expected = np.asarray(getattr(array, name)(axis=axis, keepdims=keepdims))
    agrees(getattr(tg.Tensor(array), name)(axis=axis, keepdims=keepdims), expected)
    agrees(getattr(tg.Tensor(array), name)(axis, keepdims=keepdims), expected)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_an_axis_out_of_range_is_refused(name, axis):
    with pytest.raises(ValueError, match=r"out of (range|bounds)"):
        getattr(tg.Tensor(A), name)(axis=axis)


def test_argmax_agrees_with_numpy():
    agrees(tg.Tensor(A).argmax(), np.asarray(A.argmax()))
    agrees(tg.Tensor(A).argmax(axis=-1, keepdims=True), A.argmax(axis=-1, keepdims=True))


def test_reductions_of_a_zero_dimensional_tensor_are_zero_dimensional():
    t = tg.tensor(2.0, requires_grad=True)
    for name in ("sum", "mean", "max", "min"):
        result = getattr(t, name)()
        assert (result.shape, result.item()) == ((), 2.0)
        assert tg.grad(result, t)[0].item() == 1.0


FUNCTIONS = ["exp", "log", "sqrt", "abs", "tanh"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_agree_with_numpy(name):
    agrees(getattr(tg.Tensor(A), name)(), getattr(np, name)(A))


def test_clip_relu_and_sigmoid():
    t = tg.Tensor(A - 3)
    agrees(t.clip(-1, 1.5), (A - 3).clip(-1, 1.5))
    agrees(t.clip(max=0), (A - 3).clip(max=0))
    agrees(t.relu(), np.maximum(A - 3, 0))
    assert t.sigmoid().numpy()[0, 2] == 0.5


@pytest.mark.parametrize(
    "move",
    [
        lambda a: a.reshape(3, 2),
        lambda a: a.reshape((3, -1)),
        lambda a: a.reshape([6]),
        lambda a: a.reshape(-1),
        lambda a: a.reshape(np.int64(6)),
        lambda a: a.reshape(np.int64(3), np.int64(2)),
        lambda a: a.transpose(),
        lambda a: a.transpose(1, 0),
        lambda a: a.transpose((-1, 0)),
        lambda a: a.transpose(None),
        lambda a: a.T,
        lambda a: a.swapaxes(0, -1),
        lambda a: a.flatten(),
        lambda a: a.reshape(1, 2, 3, 1).squeeze(),
        lambda a: a.reshape(1, 2, 3, 1).squeeze(0),
        lambda a: a.reshape(1, 2, 3, 1).squeeze((0, -1)),
        lambda a: a.copy(),
        lambda a: a.astype("int32"),
        lambda a: a[0],
        lambda a: a[-1, 1:],
        lambda a: a[..., None, ::2],
        lambda a: a[np.array([1, 0]), [0, 2]],
        lambda a: a[a > 2],
    ],
)
def test_shapes_and_indices_agree_with_numpy(move):
    agrees(move(tg.Tensor(A)), move(A))


def test_expand_dims_broadcast_to_and_flatten_from_an_axis():
    t = tg.Tensor(A)
    agrees(t.expand_dims(-1), np.expand_dims(A, -1))
    agrees(t.expand_dims(0), np.expand_dims(A, 0))
    agrees(t.broadcast_to((4, 2, 3)), np.broadcast_to(A, (4, 2, 3)))
    assert tg.Tensor(np.ones((2, 3, 4))).flatten(1).shape == (2, 12)
    assert tg.tensor(1.0).flatten().shape == (1,)


def test_shapes_that_do_not_fit_are_refused():
    t = tg.Tensor(A)
    for attempt in (
        lambda: t.reshape(4, 2),
        lambda: t + np.ones(4),
        lambda: t @ A,
        lambda: t.squeeze(0),
        lambda: t.expand_dims(4),
        lambda: t.transpose(0, 0),
    ):
        with pytest.raises(ValueError):
            attempt()


def test_entries_of_tensors_may_be_indices():
    t = tg.Tensor(A)
    agrees(t[tg.tensor([1, 0])], A[[1, 0]])
    agrees(t[:, tg.tensor(1)], A[:, 1])
    agrees(t[t > 2], A[A > 2])
    agrees(t[[tg.tensor(1), tg.tensor(0)]], A[[1, 0]])


def test_results_are_never_numpy_scalars():
    t = tg.tensor(np.array([1.0, 2.0]))
    for result in (t[0], t.sum(), t[0] * 2, t @ t, t.max() > 1, t[0].exp(), -t[0]):
        assert type(result.data) is np.ndarray
        assert result.shape == ()


def test_boolean_tensors_combine_as_arrays_do():
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    t, u = tg.Tensor(a), tg.Tensor(b)
    for got, expected in ((t & u, a & b), (t | u, a | b), (~t, ~a), (a & u, a & b), (a | u, a | b)):
        assert isinstance(got, tg.Tensor)
        np.testing.assert_array_equal(got.numpy(), expected)
