"""Saving and loading parameters as safetensors: a format without code in it, which PyTorch reads.

Names and layouts are those of `state_dict()`, which are PyTorch's, so a file written here loads
into the same network there, and the other way round.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from typing import Any

from tinygrad_bn import backend
from tinygrad_bn.backend.creation import from_bytes
from tinygrad_bn.nn.module import Module
from tinygrad_bn.tape import TensorBase
from tinygrad_bn.tensor import Tensor

#: The format's names of dtypes, and ours.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

Path = str | os.PathLike[str]


def save(model_or_state: Module | Mapping[str, Any], path: Path) -> None:
    """Write a state to `path`.

    model_or_state: a Module, whose state is written, or a mapping of names to Tensors or arrays.

    The file is written under another name in the same folder and renamed when complete: whoever
    reads `path` finds the old file or the new one, also when the writer was killed.

    Raises TypeError for what is neither; ImportError without the package safetensors.

    >>> import tempfile, os
    >>> from tinygrad_bn import nn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "layer.safetensors")
    ...     nn.save(nn.Linear(3, 2), path)
    ...     sorted(nn.load(path))
    ['bias', 'weight']
    """
    if isinstance(model_or_state, Module):
        state: Mapping[str, Any] = model_or_state.state_dict()
    elif isinstance(model_or_state, Mapping):
        state = model_or_state
    else:
        raise TypeError(
            f"save: got a {type(model_or_state).__name__}, expected a Module or a mapping of names "
            f"to Tensors, such as model.state_dict()"
        )
    package = _package("safetensors.numpy")
    content = package.save({name: _host(name, value) for name, value in state.items()})
    target = os.fspath(path)
    folder, name = os.path.split(target)
    part = os.path.join(folder, f".{name}.{os.urandom(6).hex()}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a crash could leave the new name on an empty file
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def load(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Return the Tensors in the file at `path` by name, for `model.load_state_dict(load(path))`.

    device: where to put them.

    Raises FileNotFoundError, ValueError for a file that is no whole safetensors file, ImportError
    without the package safetensors.

    >>> import tempfile, os
    >>> import tinygrad_bn as tg
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "two.safetensors")
    ...     tg.nn.save({"two": tg.ones(2)}, path)
    ...     tg.nn.load(path)
    {'two': Tensor([1., 1.], dtype=float32)}
    """
    with open(path, "rb") as file:
        content = file.read()
    package = _package("safetensors")
    try:
        entries = package.deserialize(content)
    except Exception as error:  # safetensors' own error class has no stable home
        raise ValueError(
            f"load: {os.fspath(path)!r} ({len(content):,} bytes) cannot be read as a safetensors "
            f"file: {error}. It may be truncated, or of another format; save it again"
        ) from error
    # Not safetensors.numpy.load: that one does not know bfloat16, although it writes it.
    return {name: Tensor(_array(path, name, entry), device=device) for name, entry in entries}


def _array(path: Path, name: str, entry: Mapping[str, Any]) -> Any:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"load: {name!r} in {os.fspath(path)!r} is of type {entry['dtype']}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    return from_bytes(entry["data"], DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _host(name: str, value: Any) -> Any:
    """Return `value` as a NumPy array in C order: safetensors writes any other order wrongly."""
    raw = value.data if isinstance(value, TensorBase) else value
    if not backend.is_array(raw):
        raise TypeError(f"save: {name!r} is a {type(raw).__name__}, expected an array or a Tensor")
    array = backend.to_numpy(backend.as_array(raw))
    return array if array.flags.c_contiguous else array.copy()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "saving and loading needs the package safetensors: pip install safetensors"
        ) from error
