"""Is a derivative right? Checkers with derived tolerances, and Hypothesis strategies for inputs.

`testing.strategies` and `testing.machines` need Hypothesis (`pip install 'tinygrad_bn[test]'`); the
checkers do not. Each name is imported at its first use: the pytest plugin lives in this package and
is loaded at the start of every pytest in an environment, mostly for nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygrad_bn.testing.accumulation import check_accumulation
    from tinygrad_bn.testing.agreement import check_backends, check_layouts, check_raw
    from tinygrad_bn.testing.batch_norm_verification import verify_batch_norm
    from tinygrad_bn.testing.errors import BlindCheckWarning, GradCheckError, Inconclusive
    from tinygrad_bn.testing.gradients import check_double_grad, check_grad
    from tinygrad_bn.testing.graphs import Graph, check_graph
    from tinygrad_bn.testing.invariants import check_dtypes, check_pure
    from tinygrad_bn.testing.law_verification import verify_laws
    from tinygrad_bn.testing.laws import Law, assert_law
    from tinygrad_bn.testing.modules import check_module
    from tinygrad_bn.testing.reference import check_reference
    from tinygrad_bn.testing.report import Comparison, Report, Tolerance
    from tinygrad_bn.testing.verification import verify

#: Which names are in which module.
_NAMES = {
    "accumulation": ["check_accumulation"],
    "agreement": ["check_backends", "check_layouts", "check_raw"],
    "batch_norm_verification": ["verify_batch_norm"],
    "errors": ["BlindCheckWarning", "GradCheckError", "Inconclusive"],
    "gradients": ["check_double_grad", "check_grad"],
    "graphs": ["Graph", "check_graph"],
    "invariants": ["check_dtypes", "check_pure"],
    "law_verification": ["verify_laws"],
    "laws": ["Law", "assert_law"],
    "modules": ["check_module"],
    "reference": ["check_reference"],
    "report": ["Comparison", "Report", "Tolerance"],
    "verification": ["verify"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BlindCheckWarning",
    "Comparison",
    "GradCheckError",
    "Graph",
    "Inconclusive",
    "Law",
    "Report",
    "Tolerance",
    "assert_law",
    "check_accumulation",
    "check_backends",
    "check_double_grad",
    "check_dtypes",
    "check_grad",
    "check_graph",
    "check_layouts",
    "check_module",
    "check_pure",
    "check_raw",
    "check_reference",
    "verify",
    "verify_batch_norm",
    "verify_laws",
]


def __getattr__(name: str) -> Any:
    if name in ("machines", "strategies"):
        return importlib.import_module(f"tinygrad_bn.testing.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"tinygrad_bn.testing.{_HOMES[name]}"), name)
    globals()[name] = found  # from now on without coming here
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "machines", "strategies"})
