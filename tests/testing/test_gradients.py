import warnings
from contextlib import suppress

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.testing.planted import RIGHT, SHAPES, WRONG, WRONG_TWICE, draw, made
from tinygrad_bn.ops.elementwise import sign
from tinygrad_bn.testing import (
    BlindCheckWarning,
    GradCheckError,
    Inconclusive,
    check_double_grad,
    check_grad,
)

SEEDS = range(5)


def inputs_of(op, seed):
    return draw(*SHAPES[op.name], seed=seed)


def assert_caught(check, op, seed, match="", **options):
    """It must be found wrong: a verdict of "cannot tell" does not count."""
    with pytest.raises(GradCheckError) as caught:
        check(op, *inputs_of(op, seed), seed=seed, **options)
    assert not isinstance(caught.value, Inconclusive), str(caught.value)
    assert match in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_rules_pass(name, seed):
    inputs = draw(*SHAPES[name], seed=seed)
    # 1e-6: a thousand times finer than the limit, so the checks see as much as they claim.
    assert check_grad(RIGHT[name], *inputs, seed=seed).resolution < 1e-6
    assert check_double_grad(RIGHT[name], *inputs, seed=seed).resolution < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_caught(name, seed):
    op, match = WRONG[name]
    assert_caught(check_grad, op, seed, match)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG_TWICE)
def test_rules_that_freeze_are_right_once_and_caught_at_second_order(name, seed):
    op = WRONG_TWICE[name]
    check_grad(op, *inputs_of(op, seed), seed=seed)
    assert_caught(check_double_grad, op, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["sign", "missing term", "transposed", "nan"])
def test_full_mode_catches_them_too(name, seed):
    assert_caught(check_grad, WRONG[name][0], seed, mode="full")


def test_full_mode_compares_every_coordinate():
    report = check_grad(RIGHT["matmul"], *inputs_of(RIGHT["matmul"], 0), mode="full")
    assert report.directions == 18


def test_one_wrong_entry_of_a_thousand_is_caught_and_named():
    def forward(x):
        return x * x

    def rule(g, x):
        gx = g * x * 2.0
        gx[4, 123] *= 1.001
        return gx

    with pytest.raises(GradCheckError) as caught:
        check_grad(made(forward, x=rule), *draw((5, 200)))
    assert "at [4, 123]" in str(caught.value)


def test_message_says_what_where_and_how_much():
    message = assert_caught(check_grad, WRONG["sign"][0], 0)
    for part in ("check_grad: tanh", "input 0 ('x')", "analytic", "numeric", "times the tolerance"):
        assert part in message
    for part in ("truncation", "resolution", "wrong sign", "at [", "np.array([[", "seed=0"):
        assert part in message


def test_complex_step_agrees_to_the_last_digits():
    report = check_grad(RIGHT["tanh"], *draw((3, 4)), mode="complex-step")
    assert report.resolution < 1e-13


def test_complex_step_catches_a_wrong_rule():
    with pytest.raises(GradCheckError, match="wrong sign"):
        check_grad(WRONG["sign"][0], *draw((3, 4)), mode="complex-step")


def test_complex_step_says_when_a_function_is_not_for_it():
    with pytest.raises(TypeError, match="use another mode"):
        check_grad(lambda x: abs(x), *draw((3,)), mode="complex-step")


# --- what cannot be told -----------------------------------------------------------------------


def test_kink_is_rejected_although_central_differences_agree():
    # |x| at 0: slope -1 from the left and 1 from the right, their mean is the 0 that the rule says.
    with pytest.raises(Inconclusive, match="kink"):
        check_grad(lambda x: abs(x), np.array([0.0, 1.0]))


def test_tie_of_a_maximum_is_rejected():
    with pytest.raises(Inconclusive, match="kink"):
        check_grad(lambda x: x.max(), np.array([1.0, 1.0, 0.5]))


def test_one_kink_among_a_thousand_entries_is_noticed():
    (x,) = draw((1000,))
    x[333] = 0.0
    with pytest.raises(Inconclusive, match="kink"):
        check_grad(lambda t: t.relu(), x)


def test_near_a_kink_a_right_gradient_is_never_found_wrong():
    for distance in 10.0 ** -np.arange(1, 13):
        with suppress(Inconclusive):
            check_grad(lambda x: x.relu(), np.array([distance, 1.0, -1.0]))


def test_noise_that_hides_the_derivative_is_rejected():
    def forward(x):
        # Rounded to float32 on the way: a staircase.
        return (x.astype("float32") * 1.0).astype("float64") * 1e-4 + 1.0

    op = made(forward, x=lambda g: g * 1e-4)
    with pytest.raises(Inconclusive, match="coarse"):
        check_grad(op, np.array([1.0, 2.0, 3.0]), max_resolution=1e-6)


def test_outside_the_domain_is_rejected():
    with pytest.raises(Inconclusive, match="not finite"):
        check_grad(lambda x: x.log(), np.array([-1.0]))


# --- cotangents --------------------------------------------------------------------------------


def test_constant_cotangent_draws_a_warning():
    with pytest.warns(BlindCheckWarning, match="constant"):
        check_grad(RIGHT["tanh"], *draw((3, 4)), cotangents=np.ones((3, 4)))


def test_output_as_cotangent_draws_a_warning():
    (x,) = draw((3, 4))
    with pytest.warns(BlindCheckWarning, match="the output itself"):
        check_grad(RIGHT["tanh"], x, cotangents=np.tanh(x))


def test_random_cotangent_given_draws_none():
    x, g = draw((3, 4), (3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_grad(RIGHT["tanh"], x, cotangents=g)


def test_an_output_of_zeros_draws_none():
    x, g = draw((3, 4), (3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_grad(lambda t: t * 0.0, x, cotangents=g)


def test_zero_gradient_passes_and_is_reported():
    report = check_grad(lambda x, y: x * 2 + sign(y), *draw((3,), (3,)))
    assert report.vacuous == ("input 1 ('y')",)


# --- inputs ------------------------------------------------------------------------------------


def test_float32_and_tensors_are_differenced_in_float64():
    x = tg.tensor(np.array([0.5, -1.0], dtype="float32"))
    seen = []
    check_grad(lambda t: (seen.append(t.dtype), t.exp())[1], x)
    assert set(map(str, seen)) == {"float64"}


def test_none_integers_and_several_outputs():
    def fn(x, absent, index):
        assert absent is None
        return x[index], x * 2

    report = check_grad(fn, np.array([1.0, 2.0, 3.0]), None, np.array([0, 2]))
    assert report.directions == 1


def test_large_offset_leaves_digits():
    (x,) = draw((8, 4, 6, 6))
    assert check_grad(RIGHT["normalize"], x + 1e6).resolution < 1e-4


@pytest.mark.parametrize(
    ("fn", "inputs", "options", "match"),
    [
        (lambda x: x, (np.arange(3),), {}, "no input is floating"),
        (lambda x: x.data, (np.ones(3),), {}, "expected a Tensor"),
        (lambda x: x > 0, (np.ones(3),), {}, "no floating output"),
        (lambda x: x, (np.ones(3),), {"mode": "fast"}, "unknown mode"),
        (lambda x: x, (np.ones(3),), {"directions": 0}, "at least 1"),
        (lambda x: x, (np.ones(3),), {"cotangents": np.ones(2)}, "cotangents of shapes"),
    ],
)
def test_misuse_is_explained(fn, inputs, options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        check_grad(fn, *inputs, **options)


def test_asymmetric_hessian_is_caught():
    # A "gradient" field (y, 0) that belongs to no function; its own derivative is taken rightly.
    def forward(x):
        return (x * x).sum()

    def rule(g, x):
        return (g * (x @ _SHEAR),)

    op = made(forward, rule)
    with pytest.raises(GradCheckError, match="not symmetric"):
        check_double_grad(op, *draw((2,)))


_SHEAR = np.array([[0.0, 0.0], [1.0, 0.0]])


# --- several inputs together ---------------------------------------------------------------------


def affine(rule_of_w=lambda g, x: g * x, size=1.0):
    def forward(x, w, b):
        return np.tanh(x) * size + x * w + b

    return made(
        forward,
        x=lambda g, x, w: g * (size * (1 - np.tanh(x) ** 2) + w),
        w=rule_of_w,
        b=lambda g: g,
    )


def test_inputs_of_a_kind_are_varied_together():
    report = check_grad(affine(), *draw((5,), (5,), (5,)))
    (only,) = report.comparisons
    assert only.input == "input 0 ('x'), input 1 ('w'), input 2 ('b')"
    assert report.resolution < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e9])
def test_a_fault_does_not_hide_behind_a_larger_gradient(size, seed):
    inputs = draw((5,), (5,), (5,), seed=seed)
    check_grad(affine(size=size), *inputs, seed=seed)
    wrong = affine(lambda g, x: g * x * 1.01, size)
    with pytest.raises(GradCheckError, match=r"input 1 \('w'\) is wrong") as caught:
        check_grad(wrong, *inputs, seed=seed)
    assert not isinstance(caught.value, Inconclusive)
    # Of a sum that is a billion times larger, too few digits are left to tell of what kind it is.
    assert size == 1e9 or "missing factor 0.990099" in str(caught.value)


def test_a_kink_in_one_of_several_inputs_is_noticed():
    x, w, b = draw((50,), (50,), (50,))
    w[17] = 0.0
    with pytest.raises(Inconclusive, match="kink"):
        check_grad(lambda x, w, b: x + abs(w) + b, x, w, b)


def test_a_gradient_of_zeros_among_others_is_reported_and_a_lost_one_is_found():
    x, w, b = draw((5,), (5,), (5,))
    assert check_grad(lambda x, w, b: x * b + sign(w), x, w, b).vacuous == ("input 1 ('w')",)
    with pytest.raises(GradCheckError, match="zero or was never propagated"):
        check_grad(affine(lambda g, x: g * 0), x, w, b)


# --- inputs at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_grad, check_double_grad])
def test_empty_inputs_pass(check):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(lambda x, y: (x * x).sum() + y, np.zeros((0, 3)), np.ones(2))


@pytest.mark.parametrize("size", [1e150, 1e-150])
def test_numbers_whose_squares_leave_float64_are_judged_or_rejected(size):
    x = size * np.array([1.0, -2.0])
    with suppress(Inconclusive):
        check_grad(lambda t: t * t, x)


def test_a_last_bit_that_seldom_flips_is_no_asymmetry():
    # Nearly all of this softmax is one entry, whose last bit flips in one nudge of ten.
    x = np.array([-5.77734375, 4.2421875, 0.0, -3.09375, 0.01171875])
    for seed in range(10):
        check_double_grad(tg.functional.softmax, x, seed=seed)


def test_rounding_that_does_not_move_with_the_last_bits_is_no_asymmetry():
    # One entry is nearly all: last bits of x leave its rounding as it is, which a product of two
    # directions magnifies.
    for seed in range(40):
        x = np.random.default_rng(seed).uniform(-1, 1, 5)
        x[0] += 8
        check_double_grad(tg.functional.softmax, x, seed=seed)


def one_leads(lead, seed):
    """Return four logits, the second larger than the others by about `lead`."""
    x = np.random.default_rng(seed).uniform(-3, 3, (1, 4))
    x[0, 1] += lead
    return x


@pytest.mark.parametrize("lead", [20.0, 36.0, 50.0, 90.0])
@pytest.mark.parametrize(
    "right",
    [
        tg.functional.softmax,
        tg.functional.log_softmax,
        lambda x: tg.functional.cross_entropy(x, np.array([1])),
        lambda x: x.exp() / x.exp().sum(axis=-1, keepdims=True),
    ],
    ids=["softmax", "log_softmax", "cross_entropy", "by hand"],
)
def test_the_rest_of_a_near_certainty_is_rounding_and_is_not_called_wrong(right, lead):
    # 1 - 1e-20 is 1 however the logits are nudged: only where that 1 is rounded anew does it show
    # that no digit of 1 - p is right.
    for seed in range(10):
        with suppress(Inconclusive):
            check_double_grad(right, one_leads(lead, seed), seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fault_is_found_while_a_near_certainty_leaves_digits(seed):
    def softmax(x):
        return tg.functional.softmax(x)

    def frozen(g, out):
        kept = out.detach() if isinstance(out, tg.Tensor) else out
        return (kept * (g - (g * kept).sum(axis=-1, keepdims=True)),)

    x = one_leads(8.0, seed)
    check_grad(made(softmax, frozen), x, seed=seed)
    with pytest.raises(GradCheckError) as caught:
        check_double_grad(made(softmax, frozen), x, seed=seed)
    assert not isinstance(caught.value, Inconclusive)


def test_rounding_anew_leaves_the_graph_outside_of_the_function_as_it_is():
    w = tg.tensor(np.array([0.3, -0.7]), requires_grad=True)
    scale = w.exp()  # its rule keeps the output
    before = scale.numpy().copy()
    x = np.array([40.0, 41.0])
    with suppress(Inconclusive):
        check_double_grad(lambda x: tg.functional.softmax(x * 60) * scale, x)
    np.testing.assert_array_equal(scale.numpy(), before)
    (found,) = tg.grad(scale.sum(), w)
    np.testing.assert_array_equal(found.numpy(), before)


@pytest.mark.parametrize("mode", ["auto", "full", "complex-step"])
@pytest.mark.parametrize(
    "size", [1e-320, 1e-300, 1e-200, 1e-155, 1e-100, 1e100, 1e150, 1e200, 1e300]
)
def test_squares_that_leave_the_range_are_neither_wrong_nor_right_by_it(size, mode):
    x = size * np.array([1.0, -0.7, 0.3])
    triple = made(lambda x: 3 * x, lambda g, x: (g * 2,))
    square = made(lambda x: x * x, lambda g, x: (g * x,))
    for right, wrong in ((lambda x: 3 * x, triple), (lambda x: x * x, square)):
        with np.errstate(over="ignore", invalid="ignore"), suppress(Inconclusive):
            check_grad(right, x, mode=mode)
        with np.errstate(over="ignore", invalid="ignore"), pytest.raises(GradCheckError):
            check_grad(wrong, x, mode=mode)
    if 1e-300 < size < 1e300 and mode != "complex-step":  # nothing is lost: this must be seen
        check_grad(lambda x: 3 * x, x, mode=mode)


def test_a_complex_step_that_is_too_coarse_is_rejected():
    with pytest.raises(Inconclusive, match="too coarse"):
        check_grad(lambda x: 3 * x, np.array([1e-300]), mode="complex-step")
