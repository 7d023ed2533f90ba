"""`verify_batch_norm` on right and wrong ones; the long table of wrong ones is in tests/mutants."""

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.testing import (
    GradCheckError,
    batch_norm_checks,
    batch_norm_reference,
    batch_norm_samples,
    verify_batch_norm,
)
from tinygrad_bn.testing import batch_norm_verification as verification


@pytest.mark.parametrize("seed", range(5))
def test_the_library_passes(seed):
    report = verify_batch_norm(F.batch_norm, seed=seed)
    assert report.examples == 200 and report.seed == seed
    assert {name for name, _ in report.checks} == {c.name for c in verification.CHECKS}
    assert all(count >= 2 for _, count in report.checks)


def by_the_tape(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *, axis=1, frozen=False
):
    """A batch norm of ordinary ops, whose gradients the tape finds; it knows no masks or groups."""
    if not training and running_mean is not None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps, axis=axis)
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    m = x.size // max(x.shape[axis], 1)
    if m == 1:
        raise ValueError("one value per channel")
    wide = x.astype("float64")
    if m:
        wide = (
            wide
            - wide.detach()[tuple(slice(1) if a in others else slice(None) for a in range(x.ndim))]
        )
    mean = wide.sum(axis=others, keepdims=True) / max(m, 1)
    var = ((wide - mean) ** 2).sum(axis=others, keepdims=True) / max(m, 1)
    if frozen:
        mean, var = mean.detach(), var.detach()
    shape = tuple(n if a == axis % x.ndim else 1 for a, n in enumerate(x.shape))
    y = (wide - mean) / (var + eps).sqrt()
    y = y if weight is None else y * weight.reshape(shape)
    y = y if bias is None else y + bias.reshape(shape)
    if running_mean is not None and m:
        with tg.no_grad():
            F.batch_norm(x, running_mean, running_var, None, None, True, momentum, eps, axis=axis)
    return y.astype(x.dtype)


def test_somebody_elses_passes_and_is_not_asked_for_what_it_does_not_take():
    checks = dict(verify_batch_norm(by_the_tape, seed=0).checks)
    assert not {"mask", "groups", "too few values", "several axes"} & set(checks)
    checks = dict(verify_batch_norm(without_axis, seed=0, max_examples=60).checks)
    assert sum(checks.values()) == 60


def without_axis(x, rm, rv, w, b, training, momentum, eps):
    return F.batch_norm(x, rm, rv, w, b, training, momentum, eps)


def wrong(change):
    """Return F.batch_norm with its arguments changed by `change`."""

    def batch_norm(x, rm, rv, w, b, training, momentum, eps, *, axis=1):
        names = ("x", "rm", "rv", "w", "b", "training", "momentum", "eps")
        given = dict(zip(names, (x, rm, rv, w, b, training, momentum, eps), strict=True))
        given.update(change(given))
        return F.batch_norm(*(given[n] for n in names), axis=axis)

    return batch_norm


def gamma_forgotten_backward(x, rm, rv, w, b, training, momentum, eps, *, axis=1):
    y = F.batch_norm(x, rm, rv, w, b, training, momentum, eps, axis=axis)
    if w is None:
        return y
    plain = F.batch_norm(x, None, None, None, None, True, momentum, eps, axis=axis)
    return y.detach() + (plain - plain.detach())


def frozen_statistics(*args, **options):
    return by_the_tape(*args, frozen=True, **{k: v for k, v in options.items() if k == "axis"})


def statistics_of_the_last_call(x, rm, rv, w, b, training, momentum, eps, *, axis=1):
    y = F.batch_norm(x, rm, rv, w, b, training, momentum, eps, axis=axis)
    if rm is not None and not training:
        array = rm.data if isinstance(rm, tg.Tensor) else rm
        array *= 1.001
    return y


def in_place_on_x(x, *args, **options):
    y = F.batch_norm(x, *args, **options)
    x.data[...] = x.data * 1.0000001
    return y


def half_statistics(x, *args, **options):
    return F.batch_norm(x.astype("float32").astype(x.dtype), *args, **options)


KILLED = {
    "eps doubled": (wrong(lambda a: {"eps": 2 * a["eps"]}), {"forward"}),
    "eps squared": (wrong(lambda a: {"eps": a["eps"] ** 2}), {"forward"}),
    "gamma forgotten": (wrong(lambda a: {"w": None}), {"forward", "gradients"}),
    "statistics in float32": (half_statistics, {"forward", "gradients", "state", "large batches"}),
    "gamma forgotten backward": (gamma_forgotten_backward, {"gradients", "state"}),
    "statistics frozen": (frozen_statistics, {"gradients"}),
    "momentum swapped": (wrong(lambda a: {"momentum": 1 - a["momentum"]}), {"state"}),
    "state not moved": (
        wrong(lambda a: {"rm": None, "rv": None} if a["training"] else {}),
        {"state"},
    ),
    "modes swapped": (wrong(lambda a: {"training": not a["training"]}), {"state", "evaluation"}),
    "batch statistics always": (wrong(lambda a: {"rm": None, "rv": None}), {"state", "evaluation"}),
    "evaluation moves the state": (statistics_of_the_last_call, {"evaluation"}),
    "x changed": (in_place_on_x, {"purity", "used twice", "gradients", "state", "pending passes"}),
    "float64 returned": (lambda *a, **k: F.batch_norm(*a, **k).astype("float64"), {"forward"}),
    "array returned": (lambda *a, **k: F.batch_norm(*a, **k).data, {"forward"}),
    "raises": (lambda *a, **k: 1 / 0, {"forward"}),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", KILLED)
def test_wrong_ones_are_killed_by_a_check_that_says_what_is_wrong(name, seed):
    candidate, checks = KILLED[name]
    with pytest.raises(GradCheckError) as caught:
        verify_batch_norm(candidate, seed=seed, shrink=False)
    error = caught.value
    assert error.check in checks
    assert 1 <= error.examples <= 200 and error.seed == seed
    assert f"check {error.check!r}"[6:] in str(error) and "inputs: BatchNormInputs" in str(error)


def test_the_same_seed_gives_the_same_verdict():
    candidate, _ = KILLED["gamma forgotten backward"]
    verdicts = []
    for _ in range(2):
        with pytest.raises(GradCheckError) as caught:
            verify_batch_norm(candidate, seed=3)
        verdicts.append((caught.value.check, caught.value.examples, str(caught.value)))
    assert verdicts[0] == verdicts[1]


def test_shrinking_finds_a_small_batch():
    with pytest.raises(GradCheckError) as caught:
        verify_batch_norm(KILLED["momentum swapped"][0], seed=0)
    assert "x=array([[" in str(caught.value)


def test_a_function_with_other_arguments_is_refused():
    with pytest.raises(TypeError, match=r"cannot be called as F\.batch_norm"):
        verify_batch_norm(lambda x, training: x)
    with pytest.raises(ValueError, match="at least 1"):
        verify_batch_norm(F.batch_norm, max_examples=0)


# --- the kit against itself: blinded, it must be noticed -----------------------------------------


def sees():
    # A momentum that is off in the ninth digit shows in the running statistics alone.
    slightly = wrong(lambda a: {"momentum": a["momentum"] * (1 - 1e-9)})
    for candidate in (slightly, KILLED["gamma forgotten backward"][0]):
        with pytest.raises(GradCheckError):
            verify_batch_norm(candidate, seed=0, shrink=False)


def test_the_kit_sees():
    sees()


def loosened(monkeypatch):
    shares = {dtype: 1e6 * share for dtype, share in batch_norm_reference._SHARE.items()}
    monkeypatch.setattr(batch_norm_reference, "_SHARE", shares)


def without_state(monkeypatch):
    monkeypatch.setattr(batch_norm_checks, "_require_state", lambda *args: None)
    monkeypatch.setattr(batch_norm_samples.Step, "require", lambda *args: None)


def without_comparison(monkeypatch):
    monkeypatch.setattr(batch_norm_checks, "excess", lambda *args: (0.0, ""))
    monkeypatch.setattr(batch_norm_checks, "statistic_excess", lambda *args: (0.0, ""))
    monkeypatch.setattr(batch_norm_samples, "statistic_excess", lambda *args: (0.0, ""))


def with_one_check(monkeypatch):
    monkeypatch.setattr(verification, "CHECKS", verification.CHECKS[:1])


@pytest.mark.parametrize(
    "blind",
    [loosened, without_state, without_comparison, with_one_check],
    ids=lambda blind: blind.__name__,
)
def test_a_blinded_kit_is_caught(blind, monkeypatch):
    blind(monkeypatch)
    with pytest.raises(pytest.fail.Exception):
        sees()


def test_constant_cotangents_would_see_nothing_and_are_not_drawn():
    seen = []

    def spying(x, rm, rv, w, b, training, momentum, eps, *, axis=1):
        y = F.batch_norm(x, rm, rv, w, b, training, momentum, eps, axis=axis)
        seen.append(y)
        return y

    verify_batch_norm(spying, seed=0, max_examples=40)
    assert len(seen) > 40
    assert np.isfinite(sum(float(np.nan_to_num(y.numpy(), posinf=0, neginf=0).sum()) for y in seen))
