"""How the kit is put to work on a candidate: (candidate, max_examples, seed) -> None, or it raises.

All of them raise GradCheckError, which says by which check and after how many examples; none looks
for a simpler failing input, since only the verdict matters here.
"""

from tinygrad_bn import testing
from tinygrad_bn.op import REGISTRY
from tinygrad_bn.testing.machines import BatchNormLayerMachine, run_machine
from tinygrad_bn.testing.strategies import op_inputs


def as_batch_norm(candidate, max_examples, seed):
    """Verify anything with the signature of `F.batch_norm`."""
    testing.verify_batch_norm(candidate, max_examples=max_examples, seed=seed, shrink=False)


def as_op(name):
    """Return a verifier of ops, right or wrong, against the library's op of that name."""

    def verify(candidate, max_examples, seed):
        testing.verify(
            candidate,
            op_inputs(candidate),
            reference=REGISTRY[name],
            max_examples=max_examples,
            seed=seed,
            shrink=False,
        )

    return verify


def against(reference, drawn_for):
    """Return a verifier of functions of Tensors against `reference`, the same of NumPy arrays.

    drawn_for: an op whose domain says what both are called with.
    """

    def verify(candidate, max_examples, seed):
        testing.verify(
            candidate,
            op_inputs(drawn_for),
            reference=reference,
            max_examples=max_examples,
            seed=seed,
            shrink=False,
        )

    return verify


def as_lawful(laws, strategy):
    """Return a verifier of whatever `laws` speak of, at inputs drawn from `strategy()`."""

    def verify(candidate, max_examples, seed):
        options = {"max_examples": max_examples, "seed": seed, "shrink": False}
        testing.verify_laws(candidate, strategy(), laws, **options)

    return verify


def as_layer(candidate, max_examples, seed):
    """Verify anything that is made and used as `nn.BatchNorm` is, over whole lives of it."""

    class Layer(BatchNormLayerMachine):
        def make_layer(self, num_features, **options):
            return candidate(num_features, **options)

    run_machine(Layer, max_examples=max_examples, seed=seed, shrink=False)
