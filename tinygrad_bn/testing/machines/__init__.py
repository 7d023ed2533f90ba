"""State machines: Hypothesis calls methods in every order it can think of, a model says what for.

Subclass one, give it your own, and run it as a test:

    class TestMyBatchNorm(BatchNormMachine.TestCase): ...      # the library's own, or

    class MyMachine(BatchNormMachine):
        def make_module(self, num_features, eps, momentum):
            return MyBatchNorm(num_features, eps, momentum)

    TestMyBatchNorm = MyMachine.TestCase

A failure prints the calls that led to it, shrunk to the fewest.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401  (the one loader: the files below import it freely)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "tinygrad_bn.testing.machines needs Hypothesis: pip install 'tinygrad_bn[test]'",
        name="hypothesis",
    ) from error

from tinygrad_bn.testing.machines.batch_norm import BatchNormMachine
from tinygrad_bn.testing.machines.batch_norm_layer import BatchNormLayerMachine
from tinygrad_bn.testing.machines.grad_mode import GradModeMachine
from tinygrad_bn.testing.machines.graph_lifetime import GraphLifetimeMachine
from tinygrad_bn.testing.machines.running import run_machine

__all__ = [
    "BatchNormLayerMachine",
    "BatchNormMachine",
    "GradModeMachine",
    "GraphLifetimeMachine",
    "run_machine",
]
