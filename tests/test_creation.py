"""Tensors made from nothing: shapes, dtypes, devices, and numbers that a seed fixes to the bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tests.backend.conftest import strict_gpu  # noqa: F401
from tests.backend.strict_array import StrictArray

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
FLOATS = st.sampled_from(["float16", "float32", "float64"])
SIZED = [tg.zeros, tg.ones, tg.empty, tg.rand, tg.randn]


@given(st.sampled_from(SIZED), SHAPES, FLOATS)
def test_a_shape_may_be_given_as_sizes_or_as_a_tuple(make, shape, dtype):
    for t in (make(*shape, dtype=dtype), make(shape, dtype=dtype), make(list(shape), dtype=dtype)):
        assert type(t) is tg.Tensor
        assert (t.shape, t.dtype, t.device) == (shape, np.dtype(dtype), "cpu")
        assert not t.requires_grad


@pytest.mark.parametrize("make", SIZED)
def test_float32_unless_said_otherwise(make):
    assert make(2, 3).dtype == np.float32
    assert make(2, 3, requires_grad=True).requires_grad


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (tg.zeros(2, dtype="int32"), np.zeros(2, "int32")),
        (tg.ones(()), np.ones((), "float32")),
        (tg.full((2, 1), 0.5), np.full((2, 1), 0.5, "float32")),
        (tg.full(2, 3), np.array([3, 3])),
        (tg.full((), True), np.array(True)),
        (tg.full(2, np.float64(0.1)), np.full(2, 0.1)),
        (tg.full(2, 1, dtype="float16"), np.ones(2, "float16")),
        (tg.arange(4), np.arange(4)),
        (tg.arange(1, 7, 2), np.array([1, 3, 5])),
        (tg.arange(3, 0, -1), np.array([3, 2, 1])),
        (tg.arange(2.0), np.array([0, 1], "float32")),
        (tg.arange(0, 1, 0.25), np.array([0, 0.25, 0.5, 0.75], "float32")),
        (tg.arange(3, dtype="float64"), np.arange(3.0)),
        (tg.linspace(-1, 1, 5), np.array([-1, -0.5, 0, 0.5, 1], "float32")),
        (tg.linspace(0, 1, 1), np.zeros(1, "float32")),
        (tg.eye(2, 3), np.eye(2, 3, dtype="float32")),
        (tg.eye(2, dtype="float64"), np.eye(2)),
        (tg.zeros_like(np.ones((2, 1), "float16")), np.zeros((2, 1), "float16")),
        (tg.ones_like(tg.arange(3)), np.ones(3, "int64")),
        (tg.full_like(tg.zeros(2), 0.25, dtype="float64"), np.full(2, 0.25)),
        (tg.zeros_like([1.0, 2.0]), np.zeros(2, "float32")),
    ],
)
def test_values_and_dtypes(made, expected):
    assert made.dtype == expected.dtype
    np.testing.assert_array_equal(made.numpy(), expected)


def test_arange_counts_wide_before_it_rounds():
    # Adding a float32 step 10⁶ times would be off by hundreds.
    assert tg.arange(0, 100_000, 0.1, dtype="float32")[-1].item() == np.float32(99_999.9)


def test_tensor_copies_whatever_it_is_given():
    array = np.arange(3.0)
    source = tg.Tensor(array)
    copies = [
        tg.tensor(array),
        tg.tensor(source),
        tg.tensor(memoryview(array)),
        tg.tensor([source]),
    ]
    array[:] = -1
    for copy in copies:
        np.testing.assert_array_equal(copy.numpy().ravel(), [0, 1, 2])


def test_tensor_of_a_tensor_is_a_leaf_of_its_own():
    x = tg.tensor([1.0], requires_grad=True)
    assert not tg.tensor(x * 2).requires_grad
    assert tg.tensor(x * 2, requires_grad=True).is_leaf


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (1, "int64"),
        (1.0, "float32"),
        (True, "bool"),
        ([1, 2.0], "float32"),
        (np.float64(1), "float64"),
    ],
)
def test_tensor_infers_the_dtype(data, dtype):
    assert tg.tensor(data).dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    "draw",
    [
        lambda **k: tg.rand(5, 3, **k),
        lambda **k: tg.randn(5, 3, **k),
        lambda **k: tg.randint(-9, 9, (5, 3), **k),
    ],
)
def test_one_seed_gives_the_same_numbers_on_every_device(strict_gpu, draw):  # noqa: F811
    drawn = []
    for device in ("cpu", "cpu", "cuda"):
        tg.manual_seed(7)
        drawn.append(draw(device=device))
    with tg.default_device("cuda"):
        tg.manual_seed(7)
        drawn.append(draw())
    assert type(drawn[2].data) is type(drawn[3].data) is StrictArray
    for t in drawn[1:]:
        np.testing.assert_array_equal(t.numpy(), drawn[0].numpy())
    tg.manual_seed(8)
    assert (draw().numpy() != drawn[0].numpy()).any()


@pytest.mark.parametrize("draw", [tg.rand, tg.randn])
def test_one_seed_gives_the_same_numbers_in_every_dtype_up_to_rounding(draw):
    tg.manual_seed(0)
    wide = draw(100, dtype="float64").numpy()
    for dtype in ("float32", "float16"):
        tg.manual_seed(0)
        np.testing.assert_array_equal(draw(100, dtype=dtype).numpy(), wide.astype(dtype))


@given(st.integers(0, 2**31), FLOATS)
def test_rand_stays_below_one_in_every_dtype(seed, dtype):
    tg.manual_seed(seed)
    # 5000 numbers: in float16, two of them would round to 1.
    x = tg.rand(5000, dtype=dtype).numpy()
    assert (x >= 0).all()
    assert (x < 1).all()


def test_moments_of_random_numbers():
    tg.manual_seed(0)
    uniform, normal = tg.rand(100_000).numpy(), tg.randn(100_000).numpy()
    # Five standard errors of each: 0.29 / √n, 0.4 / √(2 n)…, 1 / √n.
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(uniform.var() - 1 / 12) < 0.002
    assert abs(normal.mean()) < 0.016
    assert abs(normal.var() - 1) < 0.025
    integers = tg.randint(3, shape=30_000).numpy()
    assert abs(np.bincount(integers, minlength=3) - 10_000).max() < 500


def test_like_follows_device_and_is_no_part_of_the_graph(strict_gpu):  # noqa: F811
    x = tg.ones(2, device="cuda", requires_grad=True)
    for like in (tg.zeros_like(x), tg.ones_like(x.data), tg.full_like(x, 2.0)):
        assert type(like.data) is StrictArray
        assert not like.requires_grad
    assert tg.zeros_like(x, device="cpu").device == "cpu"
    assert tg.tensor(x).device == "cuda:0"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tg.zeros(2.5), TypeError, "zeros: the shape is"),
        (lambda: tg.rand("23"), TypeError, "rand: the shape is"),
        (lambda: tg.ones(2, -1), ValueError, r"ones: the shape is \(2, -1\)"),
        (lambda: tg.arange(0, 3, 0), ValueError, "arange: step is 0"),
        (lambda: tg.randint(3, 3), ValueError, r"randint: \[3, 3\) holds no integer"),
        (lambda: tg.rand(2, dtype="int64"), TypeError, "rand: dtype is int64"),
        (lambda: tg.randn(2, dtype="bool"), TypeError, "randn: dtype is bool"),
        (lambda: tg.zeros(2, dtype="float33"), TypeError, "'float33' names no dtype"),
        (lambda: tg.zeros(2, device="tpu"), ValueError, "unknown device 'tpu'"),
        (lambda: tg.zeros(2, device=""), ValueError, "unknown device ''"),
        (lambda: tg.arange(3, requires_grad=True), TypeError, "only floating"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_every_public_name_is_there():
    for name in tg.__all__:
        assert getattr(tg, name) is not None
    assert set(tg.__all__) <= set(dir(tg))
    with pytest.raises(AttributeError, match="no attribute 'zeroes'"):
        tg.zeroes  # noqa: B018


def test_kernel_status_tells_of_every_op():
    status = tg.kernel_status()
    assert {"add", "conv2d", "batch_norm"} <= set(status)
    assert all(
        isinstance(state, str) for families in status.values() for state in families.values()
    )
