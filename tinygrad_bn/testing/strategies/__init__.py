"""Hypothesis strategies for arrays, for the inputs of an op, and for batch norm.

They are non-vacuous by construction: values stay clear of kinks, cotangents are never constant, and
no channel of a batch norm has zero variance, unless one asks for the degenerate cases by name.
Arrays of more than 64 entries are expanded from one drawn seed, which is fast and shrinks to 0.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401  (the one loader: everything below imports it freely)
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "tinygrad_bn.testing.strategies needs Hypothesis: pip install 'tinygrad_bn[test]'",
        name="hypothesis",
    ) from error

from tinygrad_bn.testing.strategies.arrays import (
    away_from_kinks,
    cotangents,
    distinct_arrays,
    dtypes,
    float_arrays,
)
from tinygrad_bn.testing.strategies.batch_norm import (
    BatchNormInputs,
    batch_norm_inputs,
    degenerate_batch_norm_inputs,
)
from tinygrad_bn.testing.strategies.op_graphs import graphs
from tinygrad_bn.testing.strategies.op_inputs import OpInputs, op_inputs
from tinygrad_bn.testing.strategies.shapes import axes, broadcastable_shapes, layouts, shapes

__all__ = [
    "BatchNormInputs",
    "OpInputs",
    "away_from_kinks",
    "axes",
    "batch_norm_inputs",
    "broadcastable_shapes",
    "cotangents",
    "degenerate_batch_norm_inputs",
    "distinct_arrays",
    "dtypes",
    "float_arrays",
    "graphs",
    "layouts",
    "op_inputs",
    "shapes",
]
