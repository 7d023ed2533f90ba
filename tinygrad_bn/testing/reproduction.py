"""A failure as code: lines that, run by themselves, fail in the same way.

Small inputs are written out. Large ones would be pages of numbers, so random ones of their shapes,
means and deviations stand in for them, once it was seen that these fail too; where they do not, the
inputs are on the error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tinygrad_bn import backend
from tinygrad_bn.op import REGISTRY, Op
from tinygrad_bn.testing.functions import is_floating

#: Inputs with more entries than this are not written out.
_WRITTEN = 64


def snippet(
    check: str,
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    still_fails: Callable[[Sequence[Any]], bool],
) -> str:
    """Return Python code that calls the checker again on inputs that fail.

    check: the checker's name in `testing`. options: its keyword arguments that matter.
    still_fails: whether the check fails at other inputs too; called at most once.
    """
    imports, call = reference_to(fn)
    host = [None if a is None else backend.to_numpy(a) for a in inputs]
    written = ", ".join(f"{name}={_as_code(value)}" for name, value in options.items())
    arguments = None
    if sum(a.size for a in host if a is not None) <= _WRITTEN:
        arguments = [_as_code(a) for a in host]
    else:
        texts = [_random_code(a) for a in host]
        made = [eval(text, _names()) for text in texts]
        if still_fails([_like(new, old) for new, old in zip(made, inputs, strict=True)]):
            imports = [*imports, "rng = np.random.default_rng(0)"]
            arguments = texts
    if arguments is None:
        return f"testing.{check}({call}, *error.inputs, {written})  # of the GradCheckError"
    places = [None if a is None else backend.device_of(a) for a in inputs]
    if any(place not in (None, "cpu") for place in places):
        imports = ["import tinygrad_bn as tg", *imports]
        arguments = [
            text if place in (None, "cpu") else f"tg.Tensor({text}, device={place!r})"
            for text, place in zip(arguments, places, strict=True)
        ]
    lines = ["import numpy as np", "from tinygrad_bn import testing", *imports]
    return "\n".join([*lines, f"testing.{check}({', '.join((call, *arguments))}, {written})"])


def reference_to(fn: Callable[..., Any]) -> tuple[list[str], str]:
    """Return the lines that make a function known, and the expression that it is then.

    >>> reference_to(np.linalg.norm)
    (['from numpy.linalg import norm'], 'norm')
    """
    if isinstance(fn, partial):
        lines, inner = reference_to(fn.func)
        given = [*map(repr, fn.args), *(f"{k}={v!r}" for k, v in fn.keywords.items())]
        return ["from functools import partial", *lines], f"partial({', '.join((inner, *given))})"
    name = fn.name if isinstance(fn, Op) else getattr(fn, "__name__", type(fn).__name__)
    module = getattr(fn, "__module__", None) or ""
    if getattr(sys.modules.get(module), name, None) is fn:
        return ([] if module == "__main__" else [f"from {module} import {name}"]), name
    key = next((key for key, op in REGISTRY.items() if op is fn), None)
    if key is not None:
        return ["from tinygrad_bn.op import REGISTRY"], f"REGISTRY[{key!r}]"
    code = getattr(fn, "__code__", None)
    where = f", line {code.co_firstlineno} of {code.co_filename}" if code else ""
    return [f"fn = ...  # {name}{where}"], "fn"


def _as_code(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_code, value))}]"
    if not backend.is_array(value):
        return repr(value)
    array = backend.to_numpy(value)
    text = f"np.array({array.tolist()!r}, {array.dtype.name!r})"
    return text.replace("nan", "np.nan").replace("inf", "np.inf")


def _random_code(array: np.ndarray | None) -> str:
    """Return code that draws an array much like this one from a generator `rng`."""
    if array is None or array.size <= 1:
        return _as_code(array)
    if array.dtype.kind == "b":
        return f"rng.random({array.shape}) < 0.5"
    if not is_floating(array):
        return f"rng.integers({array.min()}, {array.max() + 1}, {array.shape})"
    return f"rng.normal({array.mean():.3g}, {array.std():.3g}, {array.shape})"


def _names() -> dict[str, Any]:
    return {"np": np, "rng": np.random.default_rng(0)}


def _like(new: Any, old: Any) -> Any:
    return new if old is None else backend.to_device(new.astype(old.dtype), backend.device_of(old))
