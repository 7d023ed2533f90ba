"""Ten thousand examples of everything that is right: the kit must not find a single fault.

python -m tests.mutants.soak
python -m tests.mutants.soak --examples 1000 --seed 7
"""

import argparse
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.mutants.controls import CONTROLS
from tests.mutants.mutant import Mutant
from tests.mutants.verdicts import EXAMPLES
from tests.mutants.verifiers import as_op
from tinygrad_bn import testing
from tinygrad_bn.op import REGISTRY

#: The ops with a derivative and a domain to draw inputs from.
OPS = tuple(
    name
    for name, op in REGISTRY.items()
    if op.__module__.startswith("tinygrad_bn.") and op.differentiable and op.domain
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--examples", type=int, default=10_000, help="of F.batch_norm, and of the ops together"
    )
    parser.add_argument("--seed", type=int, help="of the first run (default: a random one)")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    runs = range(seed, seed + -(-arguments.examples // EXAMPLES))
    tasks = [(0, run, EXAMPLES) for run in runs]
    # The others are the same code in part, or small: a tenth each.
    few = runs[: max(1, len(runs) // 10)]
    tasks += [(i, run, EXAMPLES) for i in range(1, len(CONTROLS)) for run in few]
    each = -(-arguments.examples // len(OPS))
    tasks += [(len(CONTROLS) + i, seed, each) for i in range(len(OPS))]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    failures, tried, start = [], {}, time.perf_counter()
    with ProcessPoolExecutor(cpus) as pool:
        for (name, count), failure in pool.map(_soaked, *zip(*tasks, strict=True)):
            tried[name] = tried.get(name, 0) + count
            failures += [failure] if failure else []
    for name, count in tried.items():
        print(f"{name}: {count} examples")
    print(*failures, sep="\n")
    print(f"{sum(tried.values())} examples, {time.perf_counter() - start:.0f} s")
    print(f"{len(failures)} failures")
    return 1 if failures else 0


def _soaked(number: int, seed: int, examples: int) -> tuple[tuple[str, int], str]:
    """Verify one of the controls or ops; return its name, the examples, and what was found."""
    if number < len(CONTROLS):
        right = CONTROLS[number]
    else:
        name = OPS[number - len(CONTROLS)]
        right = Mutant(name, REGISTRY[name], as_op(name))
    try:
        with right.planted():
            right.verify(right.candidate, examples, seed)
    except testing.GradCheckError as error:
        return (right.name, examples), f"{right.name}: {error}"
    return (right.name, examples), ""


if __name__ == "__main__":
    sys.exit(main())
