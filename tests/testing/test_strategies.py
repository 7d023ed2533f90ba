import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from tinygrad_bn.domain import Boolean, Domain, Integer, Real, case
from tinygrad_bn.op import REGISTRY, Op
from tinygrad_bn.testing import batch_norm_verification
from tinygrad_bn.testing import strategies as tgst
from tinygrad_bn.testing.strategies.batch_norm import verified_inputs


def counted(strategy, classify, examples=200):
    """Return how often `classify` gave each of its answers, over drawn examples."""
    seen = Counter()

    @settings(max_examples=examples, database=None)
    @given(strategy)
    def run(drawn):
        seen.update(classify(drawn))
        seen["all"] += 1

    run()
    return seen


# --- batch norm --------------------------------------------------------------------------------


def per_channel(array, drawn):
    return np.moveaxis(array, drawn.axis, 0).reshape(drawn.channels, -1)


def faults(drawn):
    x = per_channel(drawn.x, drawn).astype("float64")
    g = per_channel(drawn.cotangent, drawn)
    if drawn.count < 3:
        yield "few values"
    if not np.isfinite(x).all():
        yield "overflow"
    elif (x.std(axis=1) <= 1e-9 * np.abs(x).max()).any():
        yield "no variance"
    if (np.ptp(g, axis=1) == 0).any():
        yield "constant cotangent"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"small": True}, {"shape": (8, 4, 6, 6)}], ids=str)
def test_batch_norm_inputs_are_not_degenerate(dtype, options):
    seen = counted(tgst.batch_norm_inputs(dtype=dtype, **options), faults)
    # Hypothesis's own arrays had a variance of 0 in 67 %, a constant cotangent in 62 % and at most
    # two values in 26 %.
    assert seen == {"all": seen["all"]}


@pytest.mark.parametrize("check", batch_norm_verification.CHECKS, ids=lambda check: check.name)
def test_what_verify_batch_norm_draws_is_not_degenerate(check):
    seen = counted(verified_inputs(**check.drawn), faults, examples=60)
    if check.name == "constant channels":
        # 60 to 68 % measured over 600 draws; Hypothesis repeats itself, so few draws scatter.
        assert seen["no variance"] > 0.3 * seen["all"] and not seen["overflow"]
    else:
        assert seen == {"all": seen["all"]}


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_relu", "var", "layer_norm", "softmax"])
def test_constant_inputs_of_ops_are_rare(name):
    op = REGISTRY[name]

    def constant(drawn):
        x, axis = drawn.arrays[0], drawn.options.get("axis")
        kept = axis if name.startswith("batch_norm") else ()
        over = tuple(i for i in range(x.ndim) if i not in kept)
        yield from ["constant"] * bool(x.size > 1 and (np.ptp(x, axis=over) == 0).any())

    seen = counted(tgst.op_inputs(op), constant)
    # 1 to 3 % measured: all zeros is what Hypothesis tries first, and what it shrinks to.
    assert seen["constant"] < 0.1 * seen["all"]


def test_batch_norm_inputs_span_what_they_promise():
    def properties(drawn):
        yield f"rank {drawn.x.ndim}"
        yield f"axis {drawn.axis}"
        yield f"training {drawn.training}"
        x = per_channel(drawn.x, drawn)
        spread = float(np.median(x.std(axis=1)))
        ratio = float(np.abs(x.mean(axis=1)).max()) / spread
        yield from ["ratio > 1e5"] * (ratio > 1e5) + ["ratio < 1"] * (ratio < 1)
        yield from ["spread < 1e-2"] * (spread < 1e-2) + ["spread > 1e2"] * (spread > 1e2)
        small, large = drawn.eps < 1e-6 * spread**2, drawn.eps > 1e6 * spread**2
        yield from ["eps far below"] * small + ["eps far above"] * large
        if drawn.weight is None:
            yield "no weight"
        elif (drawn.weight == 0).any():
            yield "zero in gamma"

    seen = counted(tgst.batch_norm_inputs(), properties)
    wanted = [f"rank {n}" for n in (2, 3, 4, 5)] + ["axis 1", "axis -1"]
    wanted += ["training True", "training False", "ratio > 1e5", "ratio < 1", "spread < 1e-2"]
    wanted += ["spread > 1e2", "eps far below", "eps far above", "no weight", "zero in gamma"]
    # One in a hundred at least: in 200 examples each of them then turns up almost surely.
    assert {name: seen[name] for name in wanted if seen[name] < 0.01 * seen["all"]} == {}


def test_batch_norm_inputs_keep_what_is_given():
    drawn = find(
        tgst.batch_norm_inputs(shape=(8, 4, 6, 6), dtype="float32", training=False), lambda d: True
    )
    assert drawn.x.shape == drawn.cotangent.shape == (8, 4, 6, 6)
    assert drawn.x.dtype == drawn.running_var.dtype == np.float32
    assert not drawn.training


def test_degenerate_cases_are_all_drawn():
    def kinds(drawn):
        x = per_channel(drawn.x, drawn)
        yield from ["one value"] * (drawn.count == 1) + ["two values"] * (drawn.count == 2)
        yield from ["no variance"] * bool((np.ptp(x, axis=1) == 0).any())
        yield from ["constant cotangent"] * bool(np.ptp(drawn.cotangent) == 0)

    seen = counted(tgst.degenerate_batch_norm_inputs(), kinds, examples=800)
    assert all(
        seen[k] > 3 for k in ("one value", "two values", "no variance", "constant cotangent")
    )


# --- arrays --------------------------------------------------------------------------------------


@given(st.data(), tgst.shapes(max_dims=3), tgst.dtypes())
def test_float_arrays_have_shape_dtype_and_range(data, shape, dtype):
    x = data.draw(tgst.float_arrays(shape, dtype, low=-1.0, high=3.0))
    assert (x.shape, x.dtype) == (shape, dtype)
    assert np.all((x >= -1) & (x <= 3))


@given(st.data(), st.sampled_from([(3,), (10, 10)]))
def test_values_stay_clear_of_kinks(data, shape):
    x = data.draw(tgst.away_from_kinks(shape, low=-2.0, high=2.0, kinks=(-1.0, 0.0), margin=0.1))
    for kink in (-1.0, 0.0):
        assert np.all(np.abs(x - kink) >= 0.1 - 1e-12)


def test_no_room_beside_the_kinks_is_an_error():
    with pytest.raises(ValueError, match="no room"):
        find(
            tgst.away_from_kinks((2,), low=-1.0, high=1.0, kinks=(0.0,), margin=2.0), lambda x: True
        )


@given(st.data(), tgst.dtypes())
def test_distinct_arrays_have_no_ties(data, dtype):
    arrays = data.draw(tgst.distinct_arrays([(2, 3), (4,), ()], dtype))
    values = np.concatenate([a.reshape(-1) for a in arrays])
    assert values.dtype == dtype
    assert len(np.unique(values)) == 11


@given(st.data(), tgst.shapes(min_dims=1, min_side=2))
def test_cotangents_are_never_constant_and_never_small(data, shape):
    g = data.draw(tgst.cotangents(shape))
    assert g.shape == shape
    assert np.ptp(g) > 0
    assert np.abs(g).min() >= 0.5


def test_large_arrays_shrink_to_the_first_seed():
    first = find(tgst.float_arrays((1000,)), lambda x: True)
    assert np.array_equal(first, find(tgst.float_arrays((1000,)), lambda x: x.size == 1000))
    assert len(np.unique(first)) > 990


def test_small_arrays_shrink_entry_by_entry():
    x = find(tgst.float_arrays((4,)), lambda x: (x > 1).any())
    assert sorted(x)[:3] == [0, 0, 0]


# --- shapes ------------------------------------------------------------------------------------


@given(tgst.broadcastable_shapes(3))
def test_broadcastable_shapes_broadcast(shapes):
    assert len(shapes) == 3
    np.broadcast_shapes(*shapes)


@given(st.data(), tgst.shapes(max_dims=4))
def test_axes_are_axes(data, shape):
    axis = data.draw(tgst.axes(len(shape)))
    np.zeros(shape).sum(axis=axis)


@given(tgst.layouts())
def test_layouts_are_layouts(layout):
    assert layout(np.ones((2, 3))).shape == (2, 3)


# --- ops ---------------------------------------------------------------------------------------


def op_with(domain, variadic=False):
    forward = (lambda *xs: xs[0]) if variadic else (lambda x, y=None, *, flag=False: x)
    return Op(forward, "planted", domain)


@given(
    tgst.op_inputs(
        op_with(
            Domain(
                (Real(0.5, 1.0), Integer(2, 5)),
                (case((2, 3), (4,), flag=True), case((3,), None)),
            )
        ),
        "float32",
    )
)
def test_op_inputs_follow_the_domain(drawn):
    x, y = drawn.arrays
    assert x.dtype == np.float32
    assert np.all((x >= 0.5) & (x <= 1))
    if y is None:
        assert (x.shape, drawn.options) == ((3,), {})
    else:
        assert (x.shape, y.shape, drawn.options) == ((2, 3), (4,), {"flag": True})
        assert y.dtype.kind == "i"
        assert np.all((y >= 2) & (y < 5))


@given(
    tgst.op_inputs(op_with(Domain((Boolean(), Real()), (case((3,), (3,), (3,)),)), variadic=True))
)
def test_last_entry_of_a_domain_repeats(drawn):
    assert [a.dtype.kind for a in drawn.arrays] == ["b", "f", "f"]


@given(tgst.op_inputs(op_with(Domain((Real(), Real()), distinct=True))))
def test_distinct_inputs_have_no_ties(drawn):
    values = np.concatenate([a.reshape(-1) for a in drawn.arrays])
    assert len(np.unique(values)) == values.size == sum(math.prod(a.shape) for a in drawn.arrays)


def test_op_without_domain_is_an_error():
    with pytest.raises(ValueError, match="no sample domain"):
        find(tgst.op_inputs(op_with(None)), lambda drawn: True)
