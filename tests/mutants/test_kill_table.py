"""The mutation score with one seed: every mutant is found out, and nothing that is right is.

Five seeds, and the table, are the business of `make mutants`; 10,000 examples of `make soak`.
"""

import pytest

from tests.mutants.controls import CONTROLS
from tests.mutants.mutant import Mutant
from tests.mutants.verdicts import EXAMPLES, FAMILIES, verdict
from tinygrad_bn import testing
from tinygrad_bn.functional import batch_norm

SEED = 0


def cases():
    for family, mutants in FAMILIES.items():
        for mutant in mutants:
            yield pytest.param(mutant, id=f"{family}: {mutant}")


def test_there_are_at_least_forty_batch_norms_and_ops_and_no_two_are_alike():
    for mutants in FAMILIES.values():
        assert len({mutant.name for mutant in mutants}) == len(mutants)
    assert min(len(FAMILIES[name]) for name in ("batch norm", "ops")) >= 40


@pytest.mark.parametrize("mutant", list(cases()))
def test_mutant_is_killed(mutant):
    found = verdict(mutant, SEED)
    assert found.check, f"{mutant} survived {EXAMPLES} examples"
    assert found.examples <= EXAMPLES


def test_a_mutant_that_does_not_run_is_not_taken_for_one_that_is_found_out():
    def stale(*args, **options):
        return batch_norm(*args, **options, renamed=True)

    with pytest.raises(testing.GradCheckError, match="TypeError"):
        verdict(Mutant("called by other arguments than it takes", stale), SEED)


@pytest.mark.parametrize("right", CONTROLS, ids=str)
def test_what_the_mutants_are_made_of_is_right(right):
    found = verdict(right, SEED)
    assert not found.check, f"false alarm by {found.check} after {found.examples} examples"
