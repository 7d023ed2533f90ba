"""Ten thousand examples of everything that is right: the kit must not find a single fault.

python -m tests.mutants.soak
python -m tests.mutants.soak --examples 1000 --seed 7
"""

import argparse
import random
import sys
import time

import tinygrad_bn.functional as F
from tests.mutants.batch_norm_kernels import small_blocks
from tests.mutants.textbook import textbook
from tests.mutants.verdicts import EXAMPLES, verify_op
from tinygrad_bn import testing
from tinygrad_bn.op import REGISTRY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, help="of the first run (default: a random one)")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    runs = range(seed, seed + -(-arguments.examples // EXAMPLES))
    failures = _batch_norms(runs) + _ops(arguments.examples, seed)
    print(*failures, sep="\n")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


def _batch_norms(runs: range) -> list[str]:
    """Verify three right batch norms: the library's, its kernels in small blocks, the textbook."""
    failures = []
    start = time.perf_counter()
    for run in runs:
        try:
            testing.verify_batch_norm(F.batch_norm, max_examples=EXAMPLES, seed=run)
        except testing.GradCheckError as error:
            failures.append(str(error))
    _tell("F.batch_norm", len(runs) * EXAMPLES, start)
    few = runs[: max(1, len(runs) // 10)]
    for run in few:
        try:
            testing.verify_batch_norm(textbook(), max_examples=EXAMPLES, seed=run)
            with small_blocks():
                testing.verify_batch_norm(F.batch_norm, max_examples=EXAMPLES, seed=run)
        except testing.GradCheckError as error:
            failures.append(str(error))
    _tell("textbook, and kernels in small blocks", 2 * len(few) * EXAMPLES, start)
    return failures


def _ops(examples: int, seed: int) -> list[str]:
    """Verify every differentiable op of the library, with an equal part of the examples."""
    names = [
        name
        for name, op in REGISTRY.items()
        if op.__module__.startswith("tinygrad_bn.") and op.differentiable and op.domain
    ]
    each = -(-examples // len(names))
    failures = []
    for name in names:
        start = time.perf_counter()
        try:
            verify_op(REGISTRY[name], name, each, seed)
        except testing.GradCheckError as error:
            failures.append(str(error))
        _tell(name, each, start)
    return failures


def _tell(what: str, examples: int, start: float) -> None:
    print(f"{what}: {examples} examples, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
