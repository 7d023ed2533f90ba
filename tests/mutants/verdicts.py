"""What the kit makes of a mutant: which check finds it out, and after how many examples."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tests.mutants import batch_norm, ops
from tests.mutants.batch_norm_samples import SAMPLES
from tests.mutants.batch_renorm import RENORM
from tests.mutants.bfloat16 import BFLOAT16
from tests.mutants.controls import CONTROLS
from tests.mutants.folding import FOLDING
from tests.mutants.layers import LAYERS
from tests.mutants.mutant import Mutant
from tests.mutants.orders import ORDERED
from tests.mutants.population import POPULATION
from tests.mutants.saving import SAVING
from tests.mutants.several_axes import SEVERAL_AXES
from tests.mutants.updates import UPDATES
from tinygrad_bn import testing

#: Within so many examples every mutant must be found out.
EXAMPLES = 200

FAMILIES: dict[str, Sequence[Mutant]] = {
    "batch norm": batch_norm.MUTANTS,
    "masks and ghost batches": SAMPLES,
    "several axes": SEVERAL_AXES,
    "higher orders": ORDERED,
    "bfloat16": BFLOAT16,
    "Batch Renorm": RENORM,
    "layers": LAYERS,
    "folding": FOLDING,
    "population statistics": POPULATION,
    "saving and loading": SAVING,
    "ops": ops.MUTANTS,
    "optimizers": UPDATES,
}


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant with one seed; `check` is "" if it survived."""

    mutant: str
    seed: int
    check: str
    examples: int
    seconds: float


def verdict(mutant: Mutant, seed: int, max_examples: int = EXAMPLES) -> Verdict:
    """Return what the kit makes of `mutant`, its failing inputs not shrunk."""
    start = time.perf_counter()
    check, examples = "", max_examples
    try:
        with mutant.planted():
            mutant.verify(mutant.candidate, max_examples, seed)
    except testing.GradCheckError as error:
        if _does_not_run(error):
            raise
        check, examples = error.check or "", error.examples or 0
    return Verdict(mutant.name, seed, check, examples, time.perf_counter() - start)


def _does_not_run(error: BaseException | None) -> bool:
    """Return whether a mutant failed because it is called by arguments that it does not take, as
    when what it replaces has changed: not for its fault."""
    while error is not None:
        if isinstance(error, TypeError) and re.search(r"\bpositional arg|\bkeyword", str(error)):
            return True
        error = error.__cause__
    return False


def false_alarms(seeds: Iterable[int]) -> list[Verdict]:
    """Return the verdicts against what is right, worked out in parallel; there should be none."""
    return [v for v in verdicts(_RIGHT, seeds) if v.check]


def verdicts(family: str, seeds: Iterable[int]) -> list[Verdict]:
    """Return the verdict on every mutant of a family with every seed, worked out in parallel."""
    tasks = [(family, i, seed) for i in range(len(_members(family))) for seed in seeds]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cpus) as pool:
        # By number: a mutant is made of functions that do not travel between processes.
        return list(pool.map(_numbered, *zip(*tasks, strict=True), chunksize=5))


#: What stands for the controls where a family is asked for.
_RIGHT = "what is right"


def _members(family: str) -> Sequence[Mutant]:
    return CONTROLS if family == _RIGHT else FAMILIES[family]


def _numbered(family: str, index: int, seed: int) -> Verdict:
    return verdict(_members(family)[index], seed)
