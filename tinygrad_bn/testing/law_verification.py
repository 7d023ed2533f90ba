"""`verify_laws`: laws about anything, a layer class or a function of models, over drawn inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tinygrad_bn.testing.errors import GradCheckError, Inconclusive
from tinygrad_bn.testing.functions import name_of
from tinygrad_bn.testing.laws import Law
from tinygrad_bn.testing.report import Report
from tinygrad_bn.testing.search import fresh_seed, search
from tinygrad_bn.testing.verification import failure, rounds, tested

BY = "verify_laws"


def verify_laws(
    subject: Any,
    strategy: Any,
    laws: Sequence[Law | Callable[..., object]],
    *,
    max_examples: int = 200,
    seed: int | None = None,
    shrink: bool = True,
) -> Report:
    """Return a report that `laws` hold for `subject` at inputs drawn from `strategy`.

    subject: what the laws speak of and are given first: a function, a class, a pair of functions.
    laws: `Law`s, or functions of (subject, drawn input) that raise GradCheckError.
    max_examples: over all laws, each of which draws its own. The rest as in `verify`.

    Raises GradCheckError whose `check` names the law, `examples` says after how many inputs and
    `seed` with which seed; ModuleNotFoundError without Hypothesis.

    >>> import numpy as np
    >>> from tinygrad_bn.testing import strategies
    >>> def odd(f, x):
    ...     assert_law(f(-x), -f(x), law="f(-x) = -f(x)")
    >>> from tinygrad_bn.testing import assert_law
    >>> verify_laws(np.sin, strategies.float_arrays((3,)), [odd], max_examples=10, seed=0).checks
    (('odd', 10),)
    """
    if max_examples < 1:
        raise ValueError(f"{BY}: max_examples is {max_examples}, expected at least 1")
    seed = fresh_seed(seed)
    title = getattr(subject, "__name__", type(subject).__name__)
    named = [(_name(law), law.check if isinstance(law, Law) else law) for law in laws]
    tried = dict.fromkeys((name for name, _ in named), 0)
    judged = dict(tried)
    for part, counts in enumerate(rounds(len(named), max_examples)):
        for number, ((name, check), count) in enumerate(zip(named, counts, strict=True)):
            if not count:
                continue
            try:
                done = search(
                    partial(tested, partial(check, subject)),
                    strategy,
                    max_examples=count,
                    seed=seed * 256 + 128 * part + number,
                    shrink=shrink,
                )
            except GradCheckError as error:
                examples = sum(tried.values()) + (error.examples or 0)
                raise failure(BY, title, name, error, examples, seed) from error
            tried[name] += done.tried
            judged[name] += done.tried - done.rejected
    for name, count in judged.items():
        if tried[name] and not count:
            unseen = Inconclusive("all inputs were rejected, so nothing was checked")
            raise failure(BY, title, name, unseen, sum(tried.values()), seed)
    return Report(BY, title, examples=sum(tried.values()), checks=tuple(tried.items()), seed=seed)


def _name(law: Law | Callable[..., object]) -> str:
    return law.name if isinstance(law, Law) else name_of(law).replace("_", " ")
