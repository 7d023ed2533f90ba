"""The backends that a test can run on: a device, and a family of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tinygrad_bn import backend
from tinygrad_bn.backend import cuda, kernels
from tinygrad_bn.tensor import Tensor


@dataclass(frozen=True)
class RunsOn:
    """Where a test runs; what the fixture `tg_backend` gives.

    device: "cpu" or "cuda". family: the kernels that serve ops, "generic" for none.

    >>> RunsOn("cpu", "generic").tensor([1.0, 2.0]).device
    'cpu'
    """

    device: str
    family: str

    @property
    def name(self) -> str:
        """What tests are called by, as "cpu-numpy"."""
        return f"{self.device}-{self.family}"

    def array(self, data: Any, dtype: Any = None) -> Any:
        """Return a raw array on the device, of this dtype."""
        return backend.to_device(Tensor(data, dtype=dtype, device="cpu").data, self.device)

    def tensor(self, data: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
        """Return a Tensor on the device."""
        return Tensor(self.array(data, dtype), requires_grad=requires_grad)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Make this the default device and the only kernel family inside the `with` block."""
        with backend.default_device(self.device), kernels.use_kernels(self.family):
            yield


def available() -> list[RunsOn]:
    """Return the CPU with every kernel family that can be used, and a GPU whether or not there.

    >>> [on.name for on in available()][:2]
    ['cpu-generic', 'cpu-numpy']
    """
    families = ["generic", *(f for f in kernels.CHOICES if f not in ("generic", "cuda"))]
    usable = [f for f in families if f == "generic" or kernels.unusable_because(f) is None]
    return [
        *(RunsOn("cpu", family) for family in usable),
        *(RunsOn("cuda", family) for family in ("generic", "cuda")),
    ]


def no_gpu_because() -> str | None:
    """Return why no GPU can be used, or None if one can."""
    return cuda.unavailable_because()
