"""Devices are strings, and a device that cannot be used says what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.backend.strict_array import StrictArray, strict
from tinygrad_bn import backend
from tinygrad_bn.backend import devices

ROOT = Path(__file__).parents[2]

# A stand-in for the package `cupy`, with as much as is asked of it before the first array.
FAKE_CUPY = """
import sys, types
cupy = types.ModuleType("cupy")
class CUDARuntimeError(RuntimeError): pass
def getDeviceCount():
    {count}
runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=getDeviceCount)
cupy.cuda = types.SimpleNamespace(runtime=runtime)
cupy.ndarray = type("ndarray", (), {{}})
sys.modules["cupy"] = cupy
"""
NO_CUPY = "import sys; sys.modules['cupy'] = None"  # `import cupy` raises ImportError
USE = """
import tinygrad_bn as tg
from tinygrad_bn import backend
print(backend.cuda_is_available())
for use in (
    lambda: tg.Tensor([1.0], device={device!r}),
    lambda: tg.Tensor([1.0]).to({device!r}),
    lambda: backend.default_device({device!r}).__enter__(),
):
    try:
        use()
    except RuntimeError as error:
        print(error)
"""


def messages(setup, device="cuda"):
    """Return what a fresh Python says of the availability, and of three uses of `device`."""
    done = subprocess.run(
        [sys.executable, "-c", setup + USE.format(device=device)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_cuda_without_cupy_says_that_cupy_is_missing():
    available, *errors = messages(NO_CUPY)
    assert available == "False"
    assert len(errors) == 3
    assert all(
        "'cuda'" in e and "CuPy is not installed" in e and "pip install" in e for e in errors
    )


@pytest.mark.parametrize(
    ("count", "missing"),
    [
        ("return 0", "finds no GPU"),
        ("raise CUDARuntimeError('cudaErrorNoDevice: no CUDA-capable device')", "finds no GPU"),
        ("raise CUDARuntimeError('cudaErrorInsufficientDriver: too old')", "no CUDA driver"),
    ],
    ids=["none counted", "no device", "no driver"],
)
def test_cuda_without_a_driver_or_a_gpu_says_which_is_missing(count, missing):
    available, *errors = messages(FAKE_CUPY.format(count=count))
    assert available == "False"
    assert len(errors) == 3
    assert all("CuPy is installed but" in e and missing in e for e in errors)


def test_cuda_index_beyond_the_last_gpu_says_how_many_there_are():
    available, *errors = messages(FAKE_CUPY.format(count="return 2"), "cuda:2")
    assert available == "True"
    assert len(errors) == 3
    assert all("cuda:2" in e and "2 GPU" in e for e in errors)


@pytest.mark.parametrize("device", ["tpu", "gpu", "cpu:0", "cuda:", "cuda:x", "CPU", "", 0])
def test_unknown_device_is_named_with_what_is_expected(device):
    uses = [
        lambda: tg.Tensor([1.0], device=device),
        lambda: tg.Tensor(np.ones(1), device=device),
        lambda: tg.Tensor([1.0]).to(device),
        lambda: backend.default_device(device).__enter__(),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="unknown device") as caught:
            use()
        assert repr(device) in str(caught.value)
        assert "'cuda:<index>'" in str(caught.value)


def test_to_the_same_device_is_the_same_tensor(strict_gpu):
    t = tg.Tensor([1.0])
    assert t.to("cpu") is t
    assert t.cpu() is t
    gpu = t.cuda()
    assert gpu.device == "cuda:0"
    assert gpu.to("cuda:0") is gpu


def test_gradients_flow_back_across_devices(strict_gpu):
    x = tg.tensor([1.0, 2.0], requires_grad=True)
    y = x.cuda() * 3
    assert type(y.data) is StrictArray
    y.cpu().sum().backward()
    assert type(x.grad.data) is np.ndarray
    assert x.grad.tolist() == [3.0, 3.0]


def test_to_a_gpu_it_is_on_already_shares_the_version(strict_gpu):
    x = tg.Tensor(strict(np.ones(2)))
    w = tg.Tensor(strict(np.ones(2)), requires_grad=True)
    y = x.cuda()
    product = (w * x).sum()
    y[0] = 7.0
    assert x.tolist() == [7.0, 1.0]  # the memory is shared ...
    with pytest.raises(RuntimeError, match="in place"):  # ... so the write must be noticed
        product.backward()


def test_numpy_of_a_gpu_tensor_is_a_copy_and_implicit_conversion_is_refused(strict_gpu):
    gpu = tg.Tensor(strict(np.ones(2)))
    copy = gpu.numpy()
    copy[0] = 5
    assert gpu.tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match=r"cuda:0.*\.numpy\(\)"):
        np.asarray(gpu)


def test_default_device_is_used_for_python_data_and_restored_after_an_error(strict_gpu):
    with pytest.raises(KeyError), backend.default_device("cuda"):
        assert type(tg.Tensor([1.0]).data) is StrictArray
        assert type(tg.Tensor(np.ones(1)).data) is np.ndarray  # arrays stay where they are
        with backend.default_device("cpu"):
            assert type(tg.Tensor([1.0]).data) is np.ndarray
        assert backend.get_default_device() == "cuda"
        raise KeyError
    assert backend.get_default_device() == "cpu"


def test_repr_names_the_device_of_a_gpu_tensor(strict_gpu):
    assert repr(tg.Tensor(strict(np.ones(1)))) == "Tensor([1.], dtype=float64, device='cuda:0')"


@pytest.mark.parametrize(
    ("device", "parsed"),
    [("cpu", ("cpu", None)), ("cuda", ("cuda", None)), ("cuda:12", ("cuda", 12))],
)
def test_parse(device, parsed):
    assert devices.parse(device) == parsed
