import numpy as np
import pytest
from hypothesis import strategies as st

from tests.testing.planted import RIGHT, SHAPES, WRONG, WRONG_TWICE, made
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing import GradCheckError, Inconclusive, Law, strategies, verify
from tinygrad_bn.testing.search import SHRINKS, search


def inputs_of(op):
    return st.tuples(*(strategies.float_arrays(shape) for shape in SHAPES[op.name]))


@pytest.mark.parametrize("name", ["tanh", "matmul", "softmax", "two", "sigmoid_saving"])
def test_right_ops_pass(name):
    # What hands out residuals returns no plain array; as an op it is its own reference.
    reference = RIGHT[name] if name == "sigmoid_saving" else RIGHT[name].forward
    report = verify(RIGHT[name], inputs_of(RIGHT[name]), reference=reference, seed=0)
    assert report.examples == 200 == sum(count for _, count in report.checks)
    assert "check_double_grad" in dict(report.checks)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_ops_are_killed_by_the_check_of_gradients(name, seed):
    op, _ = WRONG[name]
    with pytest.raises(GradCheckError) as caught:
        verify(op, inputs_of(op), seed=seed, shrink=False, reference=RIGHT[op.name])
    assert caught.value.check == "check_reference"
    assert caught.value.examples <= 10 and caught.value.seed == seed
    with pytest.raises(GradCheckError) as caught:
        verify(op.__call__, inputs_of(op), seed=seed, shrink=False)
    assert caught.value.check == "check_grad"


@pytest.mark.parametrize("name", WRONG_TWICE)
def test_frozen_values_are_killed_at_second_order(name):
    op = WRONG_TWICE[name]
    small = inputs_of(op) if name != "frozen statistics" else _batches()
    with pytest.raises(GradCheckError) as caught:
        verify(op, small, seed=0, shrink=False)
    assert caught.value.check in ("check_double_grad", "check_raw")


def _batches():
    return strategies.batch_norm_inputs(shape=(3, 2, 2, 2), max_ratio=1.0).map(lambda d: d.x)


def test_every_kind_of_op_of_the_registry_passes():
    # One of each kind here; the soak takes all of them.
    for name in ("getitem", "max", "concatenate", "astype", "bitwise_and", "batch_norm"):
        op = REGISTRY[name]
        verify(op, strategies.op_inputs(op), seed=1, max_examples=40)


def test_the_same_seed_draws_the_same_and_shrinking_makes_it_simple():
    op, _ = WRONG["sign"]
    messages = []
    for _ in range(2):
        with pytest.raises(GradCheckError) as caught:
            verify(op.__call__, st.tuples(strategies.float_arrays((3, 4))), seed=5)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "array([[0., 0., 0., 0.]" in messages[0]


def test_a_function_of_which_every_input_is_rejected_fails():
    with pytest.raises(Inconclusive, match=r"all .* inputs were rejected") as caught:
        verify(lambda x: abs(x), st.just(np.zeros(2)), seed=0, max_examples=30)
    assert caught.value.check == "check_grad"


def test_a_function_that_raises_fails():
    def raising(x):
        if x.data.sum() > 1:
            raise ZeroDivisionError("too much")
        return x * 2.0

    with pytest.raises(GradCheckError, match="ZeroDivisionError: too much"):
        verify(raising, strategies.float_arrays((3,)), seed=0)


def test_laws_are_checked_and_named():
    odd = Law("odd", "f(-x) = -f(x)", lambda f, x: [(f(_t(-x)).numpy(), -f(_t(x)).numpy(), 1.0)])
    arrays = strategies.float_arrays((3,))
    assert ("odd", 8) in verify(
        lambda x: x.tanh(), arrays, laws=[odd], seed=0, max_examples=60
    ).checks
    with pytest.raises(GradCheckError) as caught:
        verify(lambda x: x.exp(), arrays, laws=[odd], seed=0, max_examples=60)
    assert caught.value.check == "odd"


def _t(x):
    import tinygrad_bn as tg

    return tg.Tensor(x)


def test_side_effects_dtypes_and_layouts_are_among_the_checks():
    def widened(x):
        return x.astype("float64") * 2.0

    def scribble(g, x):
        g *= 2.0
        return g * x

    def flat(x):
        return x.ravel(order="K").reshape(x.shape) * 2.0

    cases = {
        "check_dtypes": widened,
        "check_pure": made(lambda x: x * x, x=scribble),
        "check_layouts": made(flat, x=lambda g: g * 2.0),
    }
    for check, wrong in cases.items():
        with pytest.raises(GradCheckError) as caught:
            verify(wrong, strategies.away_from_kinks((3, 2), low=0.5, high=2.0), seed=0)
        assert caught.value.check == check


def test_shrinking_stops_in_time():
    calls = []

    def test(drawn):
        calls.append(drawn)
        if sum(drawn) > 10:
            raise GradCheckError("too large")

    with pytest.raises(GradCheckError) as caught:
        search(test, st.lists(st.integers(0, 1000), max_size=50), max_examples=100, seed=0)
    assert caught.value.examples < 100
    # A few more, which Hypothesis needs to make sure of the last.
    assert len(calls) <= caught.value.examples + SHRINKS + 10


def test_a_function_that_is_wrong_once_is_reported_all_the_same():
    seen = []

    def test(drawn):
        seen.append(drawn)
        if len(seen) == 7:
            raise GradCheckError("wrong the seventh time")

    with pytest.raises(GradCheckError, match="seventh"):
        search(test, st.integers(), max_examples=20, seed=0)


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="at least 1"):
        verify(lambda x: x, st.just(np.ones(2)), max_examples=0)
