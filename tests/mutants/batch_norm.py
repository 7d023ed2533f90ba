"""Every batch norm that is wrong on purpose; the kit must find each of them out."""

from tests.mutants.batch_norm_forward import FORWARD
from tests.mutants.batch_norm_gradients import GRADIENTS
from tests.mutants.batch_norm_kernels import KERNELS
from tests.mutants.batch_norm_state import STATES
from tests.mutants.compiled_kernels import NORM
from tests.mutants.masked_kernels import MASKED

MUTANTS = [*GRADIENTS, *FORWARD, *STATES, *KERNELS, *NORM, *MASKED]
