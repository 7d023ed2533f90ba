"""Every op of the library, on inputs drawn from its own domain, by every checker that applies.

A new op is tested here as soon as it is registered with a domain; without one, a test fails.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

import tinygrad_bn.functional  # noqa: F401  (registers every op of the library)
from tinygrad_bn.op import REGISTRY, Op
from tinygrad_bn.testing import (
    Inconclusive,
    check_accumulation,
    check_backends,
    check_double_grad,
    check_dtypes,
    check_grad,
    check_layouts,
    check_pure,
    check_raw,
    check_reference,
)
from tinygrad_bn.testing import strategies as tgst
from tinygrad_bn.testing.reference import gradient_by_rules

# Users' ops, also those that other tests define, are registered under their module's name.
LIBRARY = {name: op for name, op in REGISTRY.items() if op.__module__.startswith("tinygrad_bn.")}
DIFFERENTIABLE = [name for name, op in LIBRARY.items() if op.differentiable and op.domain]
TWICE = [name for name in DIFFERENTIABLE if LIBRARY[name].domain.order >= 2]

FLOAT64 = st.just("float64")


def on_drawn_inputs(
    op: Op, check: Callable[..., Any], dtypes: st.SearchStrategy = FLOAT64, **options: Any
) -> None:
    """Run `check` on calls of `op` that Hypothesis draws; a draw that tells nothing is rejected."""

    @given(dtypes.flatmap(lambda dtype: tgst.op_inputs(op, dtype)))
    def run(drawn: tgst.OpInputs) -> None:
        try:
            check(drawn.fn, *drawn.arrays, **options)
        except Inconclusive:
            reject()

    run()


def by_its_rules_in_longdouble(fn: Any, *arrays: Any) -> None:
    """Run check_reference on an op with its options, against itself in longdouble."""
    check_reference(fn, *arrays, reference=fn, gradient=gradient_by_rules(fn))


def test_registry_is_not_empty():
    assert len(DIFFERENTIABLE) >= 40


@pytest.mark.parametrize("name", [name for name, op in LIBRARY.items() if op.differentiable])
def test_every_library_op_has_a_domain_and_a_rule(name):
    op = LIBRARY[name]
    assert op.domain is not None, (
        f"{name} is differentiable but has no sample domain, so nothing here tests it: give it "
        f"one, @op(domain=Domain(...)), in the file that defines it"
    )
    assert op.rules, f"{name} is differentiable but has no rule: define one with @{name}.def_vjp"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_agrees_with_differences(name):
    on_drawn_inputs(LIBRARY[name], check_grad)


@pytest.mark.parametrize("name", TWICE)
def test_gradient_of_gradient_agrees_with_differences(name):
    on_drawn_inputs(LIBRARY[name], check_double_grad)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_raw_arrays_and_tensors_agree(name):
    on_drawn_inputs(LIBRARY[name], check_raw, tgst.dtypes())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_dtypes_are_kept(name):
    # An op with an option `dtype` is asked to convert, so only its gradients must keep it.
    on_drawn_inputs(LIBRARY[name], check_dtypes, outputs="dtype" not in LIBRARY[name].defaults)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_memory_layout_does_not_matter(name):
    on_drawn_inputs(LIBRARY[name], check_layouts, tgst.dtypes())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_float32_and_float16_agree_with_longdouble(name):
    op = LIBRARY[name]
    on_drawn_inputs(op, by_its_rules_in_longdouble, tgst.dtypes())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_two_uses_add_up(name):
    on_drawn_inputs(LIBRARY[name], check_accumulation, tgst.dtypes())


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_nothing_is_changed_or_shared(name):
    on_drawn_inputs(LIBRARY[name], check_pure, tgst.dtypes())


@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if LIBRARY[name].kernels])
def test_kernels_agree_with_the_generic_form(name):
    on_drawn_inputs(LIBRARY[name], check_backends, tgst.dtypes())
