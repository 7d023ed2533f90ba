"""`verify`: every checker that applies, over drawn inputs, for any function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from tinygrad_bn.op import Op
from tinygrad_bn.testing.accumulation import check_accumulation
from tinygrad_bn.testing.agreement import check_backends, check_layouts, check_raw
from tinygrad_bn.testing.errors import GradCheckError, Inconclusive, blind_by_chance
from tinygrad_bn.testing.functions import is_floating, name_of, raw_inputs
from tinygrad_bn.testing.gradients import check_double_grad, check_grad
from tinygrad_bn.testing.invariants import Run, check_dtypes, check_pure
from tinygrad_bn.testing.laws import Law
from tinygrad_bn.testing.reference import check_reference, gradient_by_rules, wideness
from tinygrad_bn.testing.report import Report
from tinygrad_bn.testing.search import fresh_seed, search

#: A check: its name, and what it does with one drawn input.
Named = tuple[str, Callable[[Any], object]]


def verify(
    candidate: Callable[..., Any],
    strategy: Any,
    *,
    reference: Callable[..., Any] | None = None,
    laws: Sequence[Law | Callable[..., object]] = (),
    max_examples: int = 200,
    seed: int | None = None,
    shrink: bool = True,
) -> Report:
    """Return a report that `candidate` passes every checker that applies, on drawn inputs.

    candidate: takes Tensors and returns a Tensor or a tuple of them; an op may be given itself.
    strategy: a Hypothesis strategy for its inputs: an array, a tuple of arrays (or None), or what
        `strategies.op_inputs` draws.
    reference: what it should compute, of NumPy arrays in longdouble; or an op that is known to be
        right, whose gradients are then compared too.
    laws: `Law`s, or functions, of the candidate and its inputs; they raise GradCheckError.
    max_examples: over all checks. seed: draws the same inputs again; None draws others each time.
    shrink: look for a simpler failing input.

    Inputs that a checker cannot judge (a kink, too much noise) are rejected; a check that all
    inputs are rejected by fails.

    Raises GradCheckError whose `check` names the checker, `examples` says after how many inputs
    and `seed` with which seed; ModuleNotFoundError without Hypothesis.

    >>> from tinygrad_bn import testing
    >>> arrays = testing.strategies.float_arrays((3,))
    >>> testing.verify(lambda x: x.tanh(), arrays, reference=np.tanh, max_examples=20, seed=0).seed
    0
    """
    if max_examples < 1:
        raise ValueError(f"verify: max_examples is {max_examples}, expected at least 1")
    seed = fresh_seed(seed)
    name = name_of(candidate)
    checks = list(_checks(candidate, reference, laws))
    tried = {check: 0 for check, _ in checks}
    judged = dict(tried)
    reasons: dict[str, str] = {}
    for part, counts in enumerate(rounds(len(checks), max_examples)):
        for number, ((check, run), count) in enumerate(zip(checks, counts, strict=True)):
            if not count:
                continue
            try:
                done = search(
                    partial(tested, run),
                    strategy,
                    max_examples=count,
                    # Every check draws its own inputs, and the second round others again.
                    seed=seed * 256 + 128 * part + number,
                    shrink=shrink,
                )
            except GradCheckError as error:
                examples = sum(tried.values()) + (error.examples or 0)
                raise failure("verify", name, check, error, examples, seed) from error
            tried[check] += done.tried
            judged[check] += done.tried - done.rejected
            if done.reason:
                reasons[check] = done.reason
    for check, count in judged.items():
        if tried[check] and not count:
            unseen = Inconclusive(
                f"all {tried[check]} inputs were rejected, so nothing was checked. The last: "
                f"{reasons[check]}"
            )
            raise failure("verify", name, check, unseen, sum(tried.values()), seed)
    rejected = sum(tried.values()) - sum(judged.values())
    notes = [f"{rejected} rejected"] if rejected else []
    if tried.get("check_reference"):
        notes += wideness()
    return Report(
        "verify",
        name,
        notes=tuple(notes),
        examples=sum(tried.values()),
        checks=tuple(tried.items()),
        seed=seed,
    )


def _checks(candidate: Callable[..., Any], reference: Any, laws: Sequence[Any]) -> Iterator[Named]:
    """Yield the checks, cheap and telling ones first."""

    def on(checker: Callable[..., Any]) -> Callable[[Any], object]:
        def run(drawn: Any) -> object:
            fn, arrays = _call_of(candidate, drawn)
            return checker(fn, *arrays)

        return run

    def on_floats(checker: Callable[..., Any]) -> Callable[[Any], object]:
        # Of integers and booleans alone there is no derivative.
        check = on(checker)
        return lambda drawn: (
            check(drawn)
            if any(map(is_floating, raw_inputs(_call_of(candidate, drawn)[1])))
            else None
        )

    def dtypes(drawn: Any) -> object:
        fn, arrays = _call_of(candidate, drawn)
        # Who asks for a dtype gets that one, not the inputs'.
        return check_dtypes(fn, *arrays, outputs="dtype" not in getattr(drawn, "options", ()))

    if reference is None and isinstance(candidate, Op):
        reference = candidate  # itself in longdouble says what float32 should give

    def by_reference(drawn: Any) -> object:
        fn, arrays = _call_of(candidate, drawn)
        right, _ = _call_of(reference, drawn)
        gradient = gradient_by_rules(right) if isinstance(reference, Op) else None
        narrow = [a.astype(np.float32) if is_floating(a) else a for a in raw_inputs(arrays)]
        check_reference(fn, *arrays, reference=right, gradient=gradient)
        return check_reference(fn, *narrow, reference=right, gradient=gradient)

    if reference is not None:
        yield "check_reference", by_reference
    yield "check_grad", on_floats(check_grad)
    yield "check_pure", on(check_pure)
    yield "check_dtypes", dtypes
    for law in laws:
        run = law.check if isinstance(law, Law) else law
        yield (
            getattr(law, "name", name_of(run)),
            lambda drawn, run=run: run(*_with_candidate(candidate, drawn)),
        )
    yield "check_layouts", on(check_layouts)
    yield "check_accumulation", on(check_accumulation)
    yield "check_double_grad", on_floats(check_double_grad)
    if isinstance(reference, Op):
        yield "NaN", lambda drawn: _check_nan(candidate, reference, drawn)
    if isinstance(candidate, Op):
        yield "check_raw", on(check_raw)
        if not candidate.view:
            yield "memory", lambda drawn: _check_memory(candidate, drawn)
    yield "check_backends", on(check_backends)


def _check_nan(candidate: Callable[..., Any], reference: Op, drawn: Any) -> None:
    """Raise GradCheckError where a NaN in an input is hidden that the reference passes on."""
    fn, arrays = _call_of(candidate, drawn)
    right, _ = _call_of(reference, drawn)
    arrays = raw_inputs(arrays)
    for i, array in enumerate(arrays):
        if array is None or not is_floating(array) or not array.size:
            continue
        spoilt = list(arrays)
        spoilt[i] = with_nan = array.copy()
        with_nan.flat[array.size // 2] = np.nan
        got, want = Run(fn, spoilt).outputs, Run(right, spoilt).outputs
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            if is_floating(b) and not np.array_equal(np.isnan(a), np.isnan(b)):
                raise GradCheckError(
                    f"NaN in input {i} becomes {a.tolist()!r:.60} in output {k}, expected "
                    f"{b.tolist()!r:.60}: what is not a number must not look like one"
                )


def _check_memory(candidate: Op, drawn: Any) -> None:
    """Raise GradCheckError where the output of an op that is no view shares an input's memory."""
    fn, arrays = _call_of(candidate, drawn)
    inputs = [a for a in raw_inputs(arrays) if a is not None]
    for k, out in enumerate(Run(fn, raw_inputs(arrays)).outputs):
        if any(np.shares_memory(out, a) for a in inputs):
            raise GradCheckError(
                f"output {k} shares memory with an input, so writing to one changes the other; "
                f"copy, or declare the op with view=True"
            )


def _with_candidate(candidate: Callable[..., Any], drawn: Any) -> tuple[Any, ...]:
    fn, arrays = _call_of(candidate, drawn)
    return (fn, *arrays)


def _call_of(function: Callable[..., Any], drawn: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Return the function of arrays alone, and the arrays that were drawn for it."""
    options = getattr(drawn, "options", None)
    if options is None:
        listed = drawn if isinstance(drawn, (tuple, list)) else (drawn,)
        return function, list(listed)
    if not options:
        return function, list(drawn.arrays)

    return partial(function, **options), list(drawn.arrays)


def rounds(checks: int, max_examples: int) -> list[list[int]]:
    """Return how many inputs each check gets: first three each, then all the rest."""
    counts = [max_examples // checks + (i < max_examples % checks) for i in range(checks)]
    first = [min(count, 3) for count in counts]
    return [first, [count - early for count, early in zip(counts, first, strict=True)]]


def tested(run: Callable[[Any], object], drawn: Any) -> None:
    """Run one check on one input; whatever the function under test raises fails the check."""
    try:
        with np.errstate(all="ignore"), blind_by_chance():
            run(drawn)
    except GradCheckError as error:
        if not isinstance(error, Inconclusive):
            error.add_note(f"inputs: {drawn!r}")
        raise
    except Exception as error:
        wrong = GradCheckError(f"it raised {type(error).__name__}: {error}")
        wrong.add_note(f"inputs: {drawn!r}")
        raise wrong from error


def failure(
    by: str, name: str, check: str, error: GradCheckError, examples: int, seed: int
) -> GradCheckError:
    """Return the error to raise for a check that failed, with what it found."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith("inputs:"))
    lines = [
        f"{by}: {name}: {check!r} failed at example {examples} (seed={seed})",
        f"  {error}",
        *(f"  {note}" for note in notes),
    ]
    found = type(error)("\n".join(lines))
    found.check, found.examples, found.seed = check, examples, seed
    return found
