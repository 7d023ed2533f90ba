"""Questions about dtypes and arrays that the floors above ask instead of importing NumPy."""

import numpy as np
import pytest

from tinygrad_bn import backend


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_floating_dtypes_are_floating(name):
    assert backend.is_floating(np.dtype(name))
    assert backend.accumulation_dtype(np.dtype(name)) == np.float64
    assert backend.machine_epsilon(np.dtype(name)) == float(np.finfo(name).eps)


def test_wide_floats_are_not_narrowed_for_sums():
    assert backend.accumulation_dtype(np.dtype(np.longdouble)) == np.longdouble


@pytest.mark.parametrize("name", ["int64", "uint8", "bool", "complex64"])
def test_other_dtypes_are_not_floating(name):
    assert not backend.is_floating(np.dtype(name))


@pytest.mark.parametrize("given", ["float32", np.float32, np.dtype(np.float32), "<f4"])
def test_as_dtype_understands_what_numpy_does(given):
    assert backend.as_dtype(given) == np.float32


def test_as_dtype_names_what_is_no_dtype():
    with pytest.raises(TypeError, match=r"'float33' names no dtype.*'float32'"):
        backend.as_dtype("float33")


def test_as_array_makes_scalars_zero_dimensional_arrays():
    for value in (np.float32(2), np.ones(3, np.float32).sum()):
        array = backend.as_array(value)
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == ((), np.float32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.ones(1), True), (np.float64(1), True), (1.0, False), ([1.0], False), (None, False)],
)
def test_is_array_tells_numpy_scalars_from_python_numbers(value, expected):
    assert backend.is_array(value) is expected


def test_array_module_is_that_of_the_first_array_and_knows_subclasses(tmp_path):
    mapped = np.memmap(tmp_path / "array", dtype="float32", mode="w+", shape=(2,))
    assert backend.array_module(None, 1.0, mapped) is np
    assert backend.array_module(3) is np


def test_array_module_of_the_other_array_type(strict_gpu):
    array = strict_gpu.from_numpy(np.ones(2), "cuda")
    assert backend.array_module(array) is strict_gpu.xp
    assert backend.array_module(2.0, array) is strict_gpu.xp


def test_same_memory_tells_views_from_copies():
    array = np.arange(6.0)
    assert backend.same_memory(array[1:], array)
    assert backend.same_memory(array[1:], array[:2])
    assert backend.same_memory(array.reshape(2, 3).T, array)
    assert not backend.same_memory(array.copy(), array)
    assert not backend.same_memory(array[[0, 1]], array)


def test_seeded_generators_draw_the_same_numbers():
    draws = []
    for seed in (3, 3, 4):
        backend.manual_seed(seed)
        draws.append(backend.generator().random(4).tolist())
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
