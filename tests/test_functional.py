"""The functional face: each function against its formula, and arrays in, arrays out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_bn as tg
from tinygrad_bn import functional as F

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6))
IMAGES = RNG.normal(size=(2, 4, 6, 6))

CALLS = {
    "linear": (lambda x: F.linear(x, np.ones((2, 6)), np.ones(2)), X),
    "conv2d": (lambda x: F.conv2d(x, np.ones((2, 2, 3, 3)), np.ones(2), 2, 1, 1, 2), IMAGES),
    "conv_block": (lambda x: F.conv_block(x, np.ones((2, 4, 3, 3), "f2"), training=True), IMAGES),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), IMAGES),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2, 1), IMAGES),
    "dropout": (lambda x: F.dropout(x, 0.5), X),
    "flatten": (lambda x: F.flatten(x, 1), IMAGES),
    "relu": (F.relu, X),
    "sigmoid": (F.sigmoid, X),
    "tanh": (F.tanh, X),
    "softmax": (F.softmax, X),
    "log_softmax": (F.log_softmax, X),
    "logsumexp": (F.logsumexp, X),
    "cross_entropy": (lambda x: F.cross_entropy(x, np.array([0, 5, 2, 2])), X),
    "mse_loss": (lambda x: F.mse_loss(x, np.ones((4, 6))), X),
    "accuracy": (lambda x: F.accuracy(x, np.array([0, 5, 2, 2])), X),
    "one_hot": (lambda x: F.one_hot(x, 4), np.arange(4)),
    "where": (lambda x: F.where(X > 0, x, 0.0), X),
    "maximum": (lambda x: F.maximum(x, 0.5), X),
    "minimum": (lambda x: F.minimum(0.5, x), X),
    "concatenate": (lambda x: F.concatenate([x, x], axis=1), X),
    "stack": (lambda x: F.stack([x, x]), X),
    "pad": (lambda x: F.pad(x, [(1, 0), (0, 2)], 3.0), X),
    "batch_norm": (lambda x: F.batch_norm(x, training=True), X),
    "batch_norm_composite": (F.batch_norm_composite, X),
    "batch_norm_relu": (lambda x: F.batch_norm_relu(x, training=True, residual=x), X),
    "batch_renorm": (lambda x: F.batch_renorm(x, np.zeros(6), np.ones(6), training=True), X),
    "layer_norm": (lambda x: F.layer_norm(x, 6, np.ones(6)), X),
    "group_norm": (lambda x: F.group_norm(x, 2), IMAGES),
    "instance_norm": (F.instance_norm, IMAGES),
    "rms_norm": (lambda x: F.rms_norm(x, 6), X),
}


#: Calls that hand integers on; with 200 channels arithmetic in uint8 would overflow.
SIZES = {
    "conv2d": lambda n: F.conv2d(
        np.ones((1, 200, 5, 5)), np.ones((200, 50, 2, 2)), None, n(2), n(1), n(1), n(4)
    ),
    "conv_block": lambda n: F.conv_block(
        IMAGES, np.ones((4, 2, 3, 3)), training=True, groups=n(2), pool=n(2), stride=n(1)
    ),
    "max_pool2d": lambda n: F.max_pool2d(IMAGES, n(2), n(1), n(1)),
    "batch_norm": lambda n: F.batch_norm(
        np.arange(40_000.0).reshape(200, 200), training=True, groups=n(4), axis=n(1)
    ),
    "group_norm": lambda n: F.group_norm(np.arange(800.0).reshape(2, 200, 2), n(4)),
    "layer_norm": lambda n: F.layer_norm(X, n(6)),
    "rms_norm": lambda n: F.rms_norm(X, n(6)),
    "softmax": lambda n: F.softmax(X, n(0)),
    "flatten": lambda n: F.flatten(IMAGES, n(2)),
    "a reduction": lambda n: tg.Tensor(X).sum(axis=n(1)).numpy(),
    "a gradient": lambda n: _gradient_of_groups(n(2)),
}


def _gradient_of_groups(groups):
    x = tg.tensor(IMAGES, requires_grad=True)
    (g,) = tg.grad(F.conv2d(x, np.ones((4, 2, 3, 3)), groups=groups).sum(), x)
    return g.numpy()


@pytest.mark.parametrize("integer", [np.uint8, np.int64, np.array], ids=["uint8", "int64", "0-d"])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_axes_may_be_any_integers(name, integer):
    np.testing.assert_array_equal(SIZES[name](integer), SIZES[name](int))


def test_every_function_is_called_here():
    assert set(CALLS) == set(F.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_arrays_in_arrays_out_and_tensors_in_tensors_out(name):
    function, x = CALLS[name]
    before = x.copy()
    results = []
    for value in (x, tg.Tensor(x), tg.Tensor(x).requires_grad_(x.dtype.kind == "f")):
        tg.manual_seed(0)
        results.append(function(value))
    raw, plain, recorded = results
    assert type(raw) is np.ndarray
    assert type(plain) is type(recorded) is tg.Tensor
    assert not plain.requires_grad
    assert recorded.requires_grad == (name not in ("accuracy", "one_hot"))
    np.testing.assert_array_equal(plain.numpy(), raw)
    np.testing.assert_array_equal(recorded.numpy(), raw)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"accuracy", "one_hot"}))
def test_python_numbers_do_not_widen(name, dtype):
    function, x = CALLS[name]
    tg.manual_seed(0)
    if name in ("linear", "conv2d", "mse_loss"):  # they are called with arrays of float64
        dtype = "float64"
    assert function(x.astype(dtype)).dtype == np.dtype(dtype)


# --- linear ----------------------------------------------------------------------------------


@given(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4), st.integers(1, 4), st.booleans())
def test_linear_is_its_formula(shape, out, has_bias):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape), rng.normal(size=(out, shape[-1]))
    bias = rng.normal(size=out) if has_bias else None
    expected = np.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias)
    np.testing.assert_allclose(F.linear(x, weight, bias), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "words"),
    [
        ((2, 3), (4, 5), None, r"x has shape \(2, 3\) and weight \(4, 5\)"),
        ((2, 3), (3,), None, "expected x"),
        ((), (3, 1), None, "expected x"),
        ((2, 3), (4, 3), (3,), r"bias has shape \(3,\), expected \(4,\)"),
    ],
)
def test_linear_says_what_does_not_fit(x, weight, bias, words):
    with pytest.raises(ValueError, match=f"linear: .*{words}"):
        F.linear(np.ones(x), np.ones(weight), None if bias is None else np.ones(bias))


# --- dropout ---------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(0, 2**31))
def test_dropout_keeps_scaled_entries_or_zeros(p, seed):
    tg.manual_seed(seed)
    x = np.arange(1.0, 101.0)
    y = F.dropout(x, p)
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / (1 - p), rtol=1e-12)
    if p in (0, 1):
        assert kept.all() == (p == 0)
        assert kept.any() == (p == 0)


def test_dropout_keeps_the_expectation_and_passes_the_same_entries_back():
    tg.manual_seed(0)
    x = tg.ones(100_000, requires_grad=True)
    y = F.dropout(x, 0.3)
    # The deviation of one entry is √(p / (1 - p)) = 0.65: five standard errors of the mean.
    assert abs(y.mean().item() - 1) < 5 * 0.65 / 100_000**0.5
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.numpy())


def test_dropout_in_evaluation_is_its_input():
    x = tg.ones(3)
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 0.0) is x


def test_dropout_drops_infinities_to_zero_and_repeats_with_a_seed():
    drawn = []
    for _ in range(2):
        tg.manual_seed(3)
        drawn.append(F.dropout(np.full(100, np.inf), 0.5))
    assert set(drawn[0].tolist()) == {0.0, np.inf}
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_needs_a_probability(p):
    with pytest.raises(ValueError, match="dropout: p is"):
        F.dropout(X, p)


# --- scores ----------------------------------------------------------------------------------


def test_mse_loss_is_its_formula_with_its_gradient():
    x, target = (tg.tensor(RNG.normal(size=(3, 2)), requires_grad=True) for _ in range(2))
    loss = F.mse_loss(x, target)
    loss.backward()
    difference = x.numpy() - target.numpy()
    assert loss.item() == pytest.approx((difference**2).mean(), rel=1e-14)
    np.testing.assert_allclose(x.grad.numpy(), difference / 3, rtol=1e-14)
    np.testing.assert_allclose(target.grad.numpy(), -difference / 3, rtol=1e-14)


def test_mse_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"mse_loss: x has shape \(3, 1\) and target \(3,\)"):
        F.mse_loss(np.ones((3, 1)), np.ones(3))


def test_accuracy_of_labels_and_of_probabilities():
    logits = np.array([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [0.0, 5.0, 1.0]])
    labels = np.array([1, 0, 1, 1])
    assert float(F.accuracy(logits, labels)) == 0.75
    assert F.accuracy(tg.Tensor(logits), labels.astype("uint8")).item() == 0.75
    assert float(F.accuracy(logits, np.eye(3)[labels] * 0.9 + 0.05)) == 0.75
    assert F.accuracy(logits, labels).dtype == np.float32


def test_accuracy_of_pixels_and_of_nothing():
    logits = RNG.normal(size=(2, 3, 4, 5))
    labels = logits.argmax(axis=1)
    assert float(F.accuracy(logits, labels)) == 1.0
    labels[0, 0, 0] = (labels[0, 0, 0] + 1) % 3
    assert float(F.accuracy(logits, labels)) == pytest.approx(39 / 40)
    assert np.isnan(float(F.accuracy(np.ones((0, 3)), np.ones(0, int))))


def test_accuracy_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"accuracy: logits have shape \(4, 3\) and target \(3,\)"):
        F.accuracy(np.ones((4, 3)), np.ones(3, int))


@given(
    hnp.arrays(
        st.sampled_from(["uint8", "int64"]),
        hnp.array_shapes(max_dims=3),
        elements=st.integers(0, 4),
    )
)
def test_one_hot_rows_are_one_at_the_label(labels):
    rows = F.one_hot(labels, 5, dtype="float64")
    assert rows.shape == (*labels.shape, 5)
    np.testing.assert_array_equal(rows, np.eye(5)[labels])


def test_one_hot_says_what_is_wrong():
    with pytest.raises(ValueError, match="one_hot: labels range from -1 to 3, expected 0 to 2"):
        F.one_hot(np.array([-1, 3]), 3)
    with pytest.raises(TypeError, match="one_hot: labels are float64"):
        F.one_hot(np.array([1.0]), 3)
    assert F.one_hot(np.array([], int), 3).shape == (0, 3)


# --- putting together --------------------------------------------------------------------------


def test_joining_takes_sequences_and_sends_gradients_to_each():
    x, y = tg.ones(2, requires_grad=True), tg.ones(3, requires_grad=True)
    (F.concatenate([x, y]) * np.arange(5.0)).sum().backward()
    assert (x.grad.tolist(), y.grad.tolist()) == ([0, 1], [2, 3, 4])
    assert tg.stack([x, x], axis=-1).shape == (2, 2)
    assert tg.concatenate((x, y)).shape == (5,)
    for join in (F.concatenate, F.stack):
        with pytest.raises(ValueError, match="got no arrays"):
            join([])


def test_pad_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"pad: pad_width is \(\(1, 0\),\) for an x of shape"):
        F.pad(X, [(1, 0)])
    with pytest.raises(ValueError, match="sizes >= 0"):
        F.pad(np.ones(2), [(-1, 0)])
