"""Every other op that is wrong on purpose; the kit must find each of them out."""

from tests.mutants.compiled_kernels import BLOCK, MEMORY, RELU
from tests.mutants.layer_norm_kernels import KERNELS
from tests.mutants.loss_kernels import KERNEL
from tests.mutants.ops_elementwise import ELEMENTWISE
from tests.mutants.ops_networks import NETWORKS
from tests.mutants.ops_normalization import NORMALIZATION
from tests.mutants.ops_shape import SHAPES
from tests.mutants.per_sample import PER_SAMPLE
from tests.mutants.pooling_kernels import POOLS

MUTANTS = [*ELEMENTWISE, *SHAPES, *NETWORKS, *NORMALIZATION, *PER_SAMPLE]
MUTANTS += [*RELU, *BLOCK, *MEMORY, *KERNELS, *POOLS, *KERNEL]
