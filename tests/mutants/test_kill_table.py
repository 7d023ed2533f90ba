"""The mutation score with one seed: every mutant is found out, and nothing that is right is.

Five seeds, and the table, are the business of `make mutants`; 10,000 examples of `make soak`.
"""

import pytest

from tests.mutants.batch_norm_kernels import batch_norm, small_blocks
from tests.mutants.textbook import textbook
from tests.mutants.verdicts import EXAMPLES, FAMILIES, verdict
from tinygrad_bn import testing

SEED = 0


def cases():
    for family, mutants in FAMILIES.items():
        for mutant in mutants:
            yield pytest.param(mutant, id=f"{family}: {mutant}")


def test_there_are_at_least_forty_of_each_family_and_no_two_alike():
    for mutants in FAMILIES.values():
        assert len({mutant.name for mutant in mutants}) == len(mutants) >= 40


@pytest.mark.parametrize("mutant", cases())
def test_mutant_is_killed(mutant):
    found = verdict(mutant, SEED)
    assert found.check, f"{mutant} survived {EXAMPLES} examples"
    assert found.examples <= EXAMPLES


def test_the_batch_norm_that_the_mutants_are_made_of_is_right():
    testing.verify_batch_norm(textbook(), max_examples=EXAMPLES, seed=SEED)


def test_the_kernels_are_right_in_small_blocks():
    with small_blocks():
        testing.verify_batch_norm(batch_norm, max_examples=EXAMPLES, seed=SEED)
