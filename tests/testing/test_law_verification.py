"""`verify_laws`, and the laws of Batch Renorm at work on functions that break them."""

import numpy as np
import pytest

from tinygrad_bn import functional as F
from tinygrad_bn import testing
from tinygrad_bn.testing.batch_renorm_laws import RENORM_LAWS
from tinygrad_bn.testing.strategies import batch_norm_inputs, float_arrays


def odd(f, x):
    testing.assert_law(f(-x), -f(x), law="f(-x) = -f(x)")


def never_judged(f, x):
    raise testing.Inconclusive("nothing to see")


def test_a_law_that_holds_is_reported_with_its_examples():
    report = testing.verify_laws(np.sin, float_arrays((3,)), [odd], max_examples=7, seed=0)
    assert report.checks == (("odd", 7),)


def test_a_law_that_fails_is_named_with_seed_and_examples():
    with pytest.raises(testing.GradCheckError, match=r"f\(-x\) = -f\(x\) does not hold") as caught:
        testing.verify_laws(np.cos, float_arrays((3,)), [odd], seed=3)
    assert (caught.value.check, caught.value.seed, caught.value.examples) == ("odd", 3, 1)


def test_a_law_that_rejects_every_input_fails():
    with pytest.raises(testing.GradCheckError, match="nothing was checked"):
        testing.verify_laws(np.sin, float_arrays((3,)), [odd, never_judged], max_examples=8, seed=0)


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="expected at least 1"):
        testing.verify_laws(np.sin, float_arrays((3,)), [odd], max_examples=0)


def test_batch_norm_is_no_batch_renorm():
    def batch_norm(*args, r_max=3.0, d_max=5.0, **options):
        return F.batch_norm(*args, **options)

    drawn = batch_norm_inputs(max_ratio=10.0)
    with pytest.raises(testing.GradCheckError, match="'values and gradients' failed"):
        testing.verify_laws(batch_norm, drawn, RENORM_LAWS, seed=0)
