"""tinygrad_bn: reverse-mode automatic differentiation, and batch normalization done right.

    import tinygrad_bn as tg
    from tinygrad_bn import functional as F, nn, optim, data, testing

Importing this loads NumPy and Python's own library, and nothing else.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import (
    check_data,
    cuda_is_available,
    default_device,
    get_default_device,
    manual_seed,
    saving,
)
from tinygrad_bn.backend import (
    kernels as _kernels,
)
from tinygrad_bn.backend.precision import allow_tf32
from tinygrad_bn.backend.recording import CaptureError
from tinygrad_bn.capture import capture
from tinygrad_bn.creation import (
    arange,
    empty,
    eye,
    from_dlpack,
    full,
    full_like,
    linspace,
    ones,
    ones_like,
    rand,
    randint,
    randn,
    tensor,
    zeros,
    zeros_like,
)
from tinygrad_bn.grad_mode import enable_grad, is_grad_enabled, no_grad
from tinygrad_bn.op import REGISTRY as _REGISTRY
from tinygrad_bn.op import op
from tinygrad_bn.ops.elementwise import maximum, minimum, where
from tinygrad_bn.ops.linalg import matmul
from tinygrad_bn.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_bn import data, functional, nn, optim, testing
    from tinygrad_bn.functional import concatenate, stack

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Tensor",
    "allow_tf32",
    "arange",
    "capture",
    "check_data",
    "concatenate",
    "cuda_is_available",
    "data",
    "default_device",
    "empty",
    "enable_grad",
    "eye",
    "from_dlpack",
    "full",
    "full_like",
    "functional",
    "get_default_device",
    "get_num_threads",
    "grad",
    "is_grad_enabled",
    "kernel_status",
    "linspace",
    "manual_seed",
    "matmul",
    "maximum",
    "minimum",
    "nn",
    "no_grad",
    "ones",
    "ones_like",
    "op",
    "optim",
    "rand",
    "randint",
    "randn",
    "saving",
    "set_num_threads",
    "stack",
    "tensor",
    "testing",
    "where",
    "zeros",
    "zeros_like",
]

# What is loaded at its first use, so that `import tinygrad_bn` stays quick.
_ROOMS = frozenset({"data", "functional", "nn", "optim", "testing"})
_IN_FUNCTIONAL = frozenset({"concatenate", "stack"})


def kernel_status() -> dict[str, dict[str, str]]:
    """Return, for every op, which kernel families may serve it here, and why the others do not.

    `cuda` serves arrays on a GPU, `numba` and then `numpy` those on the CPU. An op without kernels,
    or none of whose families can be used, runs in its generic form; so does a call that its kernels
    decline, because it is small, say.

    >>> import tinygrad_bn as tg
    >>> tg.kernel_status()["tanh"]
    {'generic': 'tanh has no kernels'}
    """
    importlib.import_module("tinygrad_bn.functional")  # it registers the ops not yet loaded
    return {name: _kernels.status(name, op.kernels) for name, op in sorted(_REGISTRY.items())}


def set_num_threads(count: int) -> None:
    """Set how many threads the CPU kernels and NumPy's matrix products use; ValueError below 1.

    The environment variable `TINYGRAD_BN_NUM_THREADS` does the same at the import. Without either
    it is the CPUs that this process may use, by its affinity and its control group's quota.

    >>> import tinygrad_bn as tg
    >>> tg.set_num_threads(tg.get_num_threads())
    """
    importlib.import_module("tinygrad_bn.kernels.cpu.threads").set_num_threads(count)


def get_num_threads() -> int:
    """Return how many threads the CPU kernels use.

    >>> import tinygrad_bn as tg
    >>> tg.get_num_threads() >= 1
    True
    """
    return importlib.import_module("tinygrad_bn.kernels.cpu.threads").num_threads()


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"tinygrad_bn.{name}")
    if name in _IN_FUNCTIONAL:
        found = getattr(importlib.import_module("tinygrad_bn.functional"), name)
        globals()[name] = found  # the next access is a plain one
        return found
    raise AttributeError(f"module 'tinygrad_bn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_IN_FUNCTIONAL})


if os.environ.get("TINYGRAD_BN_NUM_THREADS"):
    get_num_threads()  # now, before NumPy's first product wakes more threads than that
