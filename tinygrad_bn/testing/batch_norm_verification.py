"""`verify_batch_norm`: is somebody's batch norm right, in everything that a user relies on?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tinygrad_bn.testing import batch_norm_checks as checks
from tinygrad_bn.testing import batch_norm_mode_checks as modes
from tinygrad_bn.testing import batch_norm_sample_checks as samples
from tinygrad_bn.testing.batch_norm_candidate import Candidate
from tinygrad_bn.testing.errors import GradCheckError, Inconclusive
from tinygrad_bn.testing.reference import wideness
from tinygrad_bn.testing.report import Report
from tinygrad_bn.testing.search import fresh_seed, search
from tinygrad_bn.testing.verification import failure, tested

BY = "verify_batch_norm"


@dataclass(frozen=True)
class Check:
    """One check of `verify_batch_norm`: what it runs, on what, and how often.

    share: its part of all examples, relative to the other checks.
    drawn: options of the strategy `verified_inputs`.
    needs: the features that the candidate must take for it.
    """

    name: str
    run: Callable[[Candidate, Any], None]
    share: int
    drawn: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


_TAME = {"dtypes": ("float64",), "max_ratio": 10.0, "max_spread": 10.0}
_WIDE = {"dtypes": ("float32",), "large": True}
_SECOND = {**_TAME, "small": True, "max_eps": 10.0}
#: The second of two ghost batches is shifted and stretched: float16 must stay in its range.
_SAMPLED = {"training": True, "max_ratio": 1e3, "max_spread": 10.0}
_BOTH = ("mask", "groups")
#: Channels that can be cut in two axes of different sizes.
_CUT = {**_TAME, "training": True, "affine": True, "shape": (4, 6, 3)}

#: Cheap and telling ones first: most mistakes show in a single forward and backward pass.
CHECKS = (
    Check("forward", checks.forward, 20, {"training": True}),
    Check("gradients", checks.gradients, 20, {"training": True}),
    Check("state", checks.state, 16, {"training": True}),
    Check("evaluation", modes.evaluation, 20, {"training": False}),
    Check("mask", samples.masks, 8, _SAMPLED, ("mask",)),
    Check("masked layouts", samples.masked_layouts, 14, _TAME, ("mask",)),
    Check("without state", checks.without_state, 4, {"training": True}),
    Check("constant channels", checks.constant, 16, {"degenerate": True}),
    Check("mixed dtypes", checks.mixed_dtypes, 8, {"training": True, "dtypes": ("float16",)}),
    Check("large batches", checks.large, 14, {"training": True, "large": True}),
    Check("magnitudes", checks.magnitudes, 8, {**_TAME, **_WIDE, "training": True}),
    Check("used twice", modes.twice, 5, {"training": True}),
    Check("pending passes", modes.pending, 8, {**_TAME, "training": True}),
    Check("NaN", checks.nan, 8, {**_TAME, "training": True}),
    Check("empty batch", checks.empty, 4, {"training": True}),
    Check("groups", samples.groups, 6, _SAMPLED, ("groups",)),
    Check("masked groups", samples.masked_groups, 6, _SAMPLED, _BOTH),
    Check("too few values", samples.too_few, 4, _SAMPLED, ("mask",)),
    Check("large parts", samples.masked_groups, 3, {**_SAMPLED, **_WIDE}, _BOTH),
    Check("several axes", samples.several_axes, 6, _CUT, ("axes",)),
    Check("dtypes", modes.dtypes, 4, _TAME),
    Check("purity", modes.purity, 8, _TAME),
    Check("laws", modes.laws, 10, _TAME),
    Check("differences", modes.differences, 8, _TAME),
    Check("second order", modes.second_order, 14, _SECOND),
    Check("masked second order", samples.second_order, 6, _SECOND, ("mask",)),
    Check("layouts", modes.layouts, 14, _TAME),
)

#: Examples of each check in the first round, so that each has its say early.
_FIRST_ROUND = 3


def verify_batch_norm(
    candidate: Callable[..., Any],
    *,
    max_examples: int = 200,
    seed: int | None = None,
    shrink: bool = True,
) -> Report:
    """Return a report that `candidate` is a right batch norm; raise GradCheckError if it is not.

    candidate: takes Tensors as `F.batch_norm` does: (x, running_mean, running_var, weight, bias,
        training, momentum, eps, *, axis, mask, groups, correction). Which of the last four it
        takes is read from its signature, and the others are not asked for.
    max_examples: over all checks.
    seed: draws the same examples again; None draws others each time.
    shrink: look for a simpler failing input, which takes a moment.

    Checked are forward and gradients against longdouble, for magnitudes, offsets and eps far apart,
    in float64, float32 and float16; derivatives of the gradients; the running statistics; training
    and evaluation; constant channels, NaN, empty batches; laws; side effects, aliasing, dtypes and
    layouts; masks and ghost batches.

    Raises GradCheckError whose `check` names the check that failed, `examples` says after how many
    examples and `seed` with which seed; TypeError for a function that takes other arguments;
    ModuleNotFoundError without Hypothesis.

    >>> from tinygrad_bn import functional as F, testing
    >>> testing.verify_batch_norm(F.batch_norm, max_examples=20, seed=0).examples
    20
    """
    if max_examples < 1:
        raise ValueError(f"verify_batch_norm: max_examples is {max_examples}, expected at least 1")
    seed = fresh_seed(seed)
    subject = Candidate(candidate)
    asked = [c for c in CHECKS if subject.takes.issuperset(c.needs)]
    tried = dict.fromkeys((c.name for c in asked), 0)
    rejected: dict[str, str] = {}
    for number, part in enumerate(_rounds(asked, max_examples)):
        for check, count in part:
            done = _run(subject, check, count, seed, number, sum(tried.values()), shrink)
            tried[check.name] += done.tried
            if done.rejected == done.tried:
                rejected.setdefault(check.name, done.reason)
            else:
                rejected[check.name] = ""
    for name, reason in rejected.items():
        if reason:
            unseen = Inconclusive(
                f"every input was rejected, so nothing was checked. The last: {reason}"
            )
            raise failure(BY, subject.name, name, unseen, sum(tried.values()), seed)
    return Report(
        BY,
        subject.name,
        notes=wideness(),
        examples=sum(tried.values()),
        checks=tuple(tried.items()),
        seed=seed,
    )


def _rounds(asked: list[Check], max_examples: int) -> list[list[tuple[Check, int]]]:
    """Return how many examples each check has in the first round and in the second."""
    total = sum(c.share for c in asked)
    first: list[tuple[Check, int]] = []
    second: list[tuple[Check, int]] = []
    left, shares = max_examples, total
    for check in asked:
        # What is left is divided by the shares that are left, so the sum comes out right.
        count = round(left * check.share / shares)
        left, shares = left - count, shares - check.share
        early = min(count, _FIRST_ROUND)
        first += [(check, early)] * (early > 0)
        second += [(check, count - early)] * (count > early)
    return [first, second]


def _run(
    subject: Candidate, check: Check, count: int, seed: int, number: int, before: int, shrink: bool
) -> Any:
    from tinygrad_bn.testing.strategies.batch_norm import verified_inputs

    axes = (1, -1) if "axis" in subject.takes else (1,)
    strategy = verified_inputs(axes=axes, **check.drawn)
    try:
        return search(
            partial(tested, partial(check.run, subject)),
            strategy,
            max_examples=count,
            # Each check has draws of its own, and the second round goes on from other ones.
            seed=seed * 256 + 128 * number + CHECKS.index(check),
            shrink=shrink,
        )
    except GradCheckError as error:
        examples = before + (error.examples or 0)
        raise failure(BY, subject.name, check.name, error, examples, seed) from error
