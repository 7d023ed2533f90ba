"""What the kit makes of a mutant: which check finds it out, and after how many examples."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tests.mutants import batch_norm, ops
from tests.mutants.batch_norm_kernels import small_blocks
from tests.mutants.mutant import Mutant, OpMutant
from tests.mutants.textbook import textbook
from tinygrad_bn import functional as F
from tinygrad_bn import testing
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing.strategies import op_inputs

#: Within so many examples every mutant must be found out.
EXAMPLES = 200

FAMILIES: dict[str, Sequence[Mutant]] = {"batch norm": batch_norm.MUTANTS, "ops": ops.MUTANTS}

#: What is right, and what the batch norm mutants are made of. A kit that objects to these with some
#: seed would "kill" every mutant with it.
CONTROLS = (
    Mutant("the textbook", textbook()),
    Mutant("the kernels in small blocks", F.batch_norm, small_blocks),
)


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
            if isinstance(mutant, OpMutant):
                verify_op(mutant.candidate, mutant.op, max_examples, seed)
            else:
                testing.verify_batch_norm(
                    mutant.candidate, max_examples=max_examples, seed=seed, shrink=False
                )
    except testing.GradCheckError as error:
        check, examples = error.check or "", error.examples or 0
    return Verdict(mutant.name, seed, check, examples, time.perf_counter() - start)


def verify_op(candidate, name: str, max_examples: int, seed: int) -> testing.Report:
    """Verify an op, right or wrong, against the library's op of that name, in its domain."""
    return testing.verify(
        candidate,
        op_inputs(candidate),
        reference=REGISTRY[name],
        max_examples=max_examples,
        seed=seed,
        shrink=False,
    )


def false_alarms(seeds: Iterable[int]) -> list[Verdict]:
    """Return the verdicts against right batch norms; there should be none."""
    found = [verdict(control, seed) for seed in seeds for control in CONTROLS]
    return [v for v in found if v.check]


def verdicts(family: str, seeds: Iterable[int]) -> list[Verdict]:
    """Return the verdict on every mutant of a family with every seed, worked out in parallel."""
    tasks = [(family, i, seed) for i in range(len(FAMILIES[family])) for seed in seeds]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cpus) as pool:
        # By number: a mutant is made of functions that do not travel between processes.
        return list(pool.map(_numbered, *zip(*tasks, strict=True), chunksize=5))


def _numbered(family: str, index: int, seed: int) -> Verdict:
    return verdict(FAMILIES[family][index], seed)
