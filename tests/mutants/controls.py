"""What is right, and what the mutants are made of.

A kit that objects to one of these with some seed would "kill" every mutant with it.
"""

from tests.mutants import (
    batch_renorm,
    bfloat16,
    compiled_kernels,
    folding,
    layer_norm_kernels,
    loss_kernels,
    ops_normalization,
    orders,
    per_sample,
    pooling_kernels,
    population,
    saving,
    updates,
)
from tests.mutants.batch_norm_kernels import small_blocks
from tests.mutants.mutant import Mutant
from tests.mutants.textbook import textbook
from tests.mutants.textbook_samples import textbook_of_samples
from tests.mutants.verifiers import as_layer
from tinygrad_bn import functional as F
from tinygrad_bn import nn

CONTROLS = (
    Mutant("F.batch_norm", F.batch_norm),
    Mutant("the kernels in small blocks", F.batch_norm, planted=small_blocks),
    Mutant("the textbook", textbook()),
    Mutant("the textbook with masks and ghost batches", textbook_of_samples()),
    Mutant("nn.BatchNorm", nn.BatchNorm, as_layer),
    *batch_renorm.RIGHT,
    *ops_normalization.RIGHT,
    *per_sample.RIGHT,
    *compiled_kernels.RIGHT,
    *layer_norm_kernels.RIGHT,
    *updates.RIGHT,
    *bfloat16.RIGHT,
    *orders.RIGHT,
    *folding.RIGHT,
    *population.RIGHT,
    *saving.RIGHT,
    *pooling_kernels.RIGHT,
    *loss_kernels.RIGHT,
)
