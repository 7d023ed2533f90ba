"""The kernels on the stand-in for GPU arrays: what wrappers do with arrays is watched.

    with strict_kernels() as runtime:       # tests.backend's StrictArrays, served by the kernels
        ...

The shim runs kernels on host memory, and its other tests hand them NumPy's arrays, which forgive a
wrapper everything: a conversion, a value read back, another device. StrictArrays do not. Under
`capture` a launch is written down and not done, as CUDA has it, and replays do it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.backend import strict_array
from tests.backend.strict_array import StrictArray, strict_backend
from tests.kernels.cuda import shim
from tests.kernels.cuda.fake_blas import FakeBlas
from tinygrad_bn.backend import ARRAY_TYPES, cuda, register_backend
from tinygrad_bn.kernels.cuda import launch


def _do(function, *arguments):
    """Call it now, or have the recording that is being made call it whenever it is replayed."""
    if strict_array.TAPE is None:
        function(*arguments)
    else:
        strict_array.TAPE.launches.append((function, arguments, {}, None))


class RecordedBlas(FakeBlas):
    """BLAS whose products a graph can repeat."""

    def __init__(self, work):
        super().__init__()
        self.work = work

    def multiply(self, *arguments):
        self.work.append("multiply")
        _do(super().multiply, *arguments)


class StrictRuntime(shim.ShimRuntime):
    """A `launch.Runtime` whose arrays are StrictArrays.

    work: the launches of kernels, products and array operations, by name, in order.
    """

    def __init__(self, device: launch.Device):
        super().__init__(device)
        self.work: list[str] = []
        self.blas = RecordedBlas(self.work)

    def current_device(self) -> int:
        return strict_array.current()

    def on_device_of(self, array):
        return strict_array.use(array.index)

    def launch(self, function, blocks, threads, shared, arguments, cooperative) -> None:
        self.work.append(function[0])
        raw = tuple(strict_array._unwrap(argument) for argument in arguments)
        _do(super().launch, function, blocks, threads, shared, raw, cooperative)


#: Array operations that launch nothing on a GPU: they give a view, or memory as it is.
_FREE = {"empty", "empty_like", "result_type"}


@contextmanager
def strict_kernels():
    """Have StrictArrays pose as arrays on a GPU whose kernels run here, inside the `with` block."""
    # As much shared memory as every GPU gives a block that does not ask for more.
    runtime = StrictRuntime(shim.DEVICE._replace(shared=3 * 49152, shared_per_block=49152))
    backend = replace(strict_backend, families=("cuda",))
    operate = strict_array._launch

    def counted(function, args, kwargs, *sources):
        result = operate(function, args, kwargs, *sources)
        view = isinstance(result, StrictArray) and result.base is not None
        if not view and function.__name__ not in _FREE:
            runtime.work.append(function.__name__)
        return result

    register_backend(backend)
    try:
        with launch.use_runtime(runtime), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "unavailable_because", lambda: None)
            patch.setattr(cuda, "_registered", lambda: backend)
            patch.setattr(strict_array, "_launch", counted)
            yield runtime
    finally:
        del ARRAY_TYPES[StrictArray]
