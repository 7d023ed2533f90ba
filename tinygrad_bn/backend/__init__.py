"""Floor 0: arrays, their modules and devices. Nothing here knows what a Tensor is."""

from tinygrad_bn.backend.arrays import (
    ARRAY_TYPES,
    Backend,
    array_module,
    array_repr,
    as_array,
    backend_of,
    check_numbers,
    converted,
    is_array,
    register_backend,
    same_memory,
    to_numpy,
)
from tinygrad_bn.backend.devices import (
    cuda_is_available,
    default_device,
    device_of,
    from_dlpack,
    from_python,
    get_default_device,
    to_device,
)
from tinygrad_bn.backend.dtypes import (
    accumulation_dtype,
    as_dtype,
    float32,
    float64,
    int64,
    is_floating,
    machine_epsilon,
)
from tinygrad_bn.backend.placement import cast, copied, placed, several_devices
from tinygrad_bn.backend.random import generator, manual_seed
from tinygrad_bn.backend.residuals import saving

__all__ = [
    "ARRAY_TYPES",
    "Backend",
    "accumulation_dtype",
    "array_module",
    "array_repr",
    "as_array",
    "as_dtype",
    "backend_of",
    "cast",
    "check_numbers",
    "converted",
    "copied",
    "cuda_is_available",
    "default_device",
    "device_of",
    "float32",
    "float64",
    "from_dlpack",
    "from_python",
    "generator",
    "get_default_device",
    "int64",
    "is_array",
    "is_floating",
    "machine_epsilon",
    "manual_seed",
    "placed",
    "register_backend",
    "same_memory",
    "saving",
    "several_devices",
    "to_device",
    "to_numpy",
]
