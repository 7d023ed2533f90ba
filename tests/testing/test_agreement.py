import itertools
import sys
import types

import numpy as np
import pytest

from tests.testing.planted import RIGHT, SHAPES, WRONG_TWICE, draw, made
from tinygrad_bn.testing import GradCheckError, check_backends, check_layouts, check_raw
from tinygrad_bn.testing.layouts import LAYOUTS


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RIGHT)
def test_right_ops_pass(name, seed):
    inputs = draw(*SHAPES[name], seed=seed)
    check_raw(RIGHT[name], *inputs, seed=seed)
    check_layouts(RIGHT[name], *inputs, seed=seed)
    check_backends(RIGHT[name], *inputs, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_layouts_keep_values_and_own_their_memory(layout, shape):
    (x,) = draw(shape)
    arranged = layout(x)
    assert arranged.shape == x.shape
    assert not np.shares_memory(arranged, x)
    assert not layout.keeps_values or np.array_equal(arranged, x)


def test_layouts_are_what_their_names_say():
    (x,) = draw((2, 3, 4))
    made_of = {layout.name: layout(x) for layout in LAYOUTS}
    assert made_of["Fortran"].flags.f_contiguous
    assert made_of["permuted"].strides == (24, 8, 48)
    assert all(stride < 0 for stride in made_of["negative strides"].strides)
    assert made_of["strided"].strides[-1] == 16
    assert not made_of["read-only"].flags.writeable
    assert made_of["zero strides"].strides[0] == 0
    assert made_of["zero strides, last axis"].strides[-1] == 0


# --- layouts -----------------------------------------------------------------------------------


def caught_by_layouts(op, match, *shapes):
    with pytest.raises(GradCheckError, match=match):
        check_layouts(op, *draw(*shapes))


def test_forward_that_reads_memory_order_is_caught():
    def forward(x):
        return x.ravel(order="K") * 1.0

    op = made(forward, x=lambda g, x_shape: g.reshape(x_shape))
    caught_by_layouts(op, "inputs in layout 'Fortran'", (3, 4))


def test_rule_that_reads_memory_order_of_its_cotangent_is_caught():
    def rule(g):
        return g.ravel(order="K").reshape(g.shape) * 2.0

    caught_by_layouts(made(lambda x: x * 2.0, x=rule), "cotangents in layout 'Fortran'", (3, 4))


def test_rule_that_ignores_strides_is_caught():
    def rule(g):
        flat = np.lib.stride_tricks.as_strided(g, (g.size,), (g.itemsize,))
        return flat.reshape(g.shape) * 2.0

    caught_by_layouts(made(lambda x: x * 2.0, x=rule), "cotangents in layout", (6,))


# --- raw against Tensors -------------------------------------------------------------------------


def test_rule_that_differs_on_tensors_is_caught():
    op = made(lambda x: x * 2.0, x=lambda g: g * (2.0 if isinstance(g, np.ndarray) else 3.0))
    with pytest.raises(GradCheckError, match=r"rules on Tensors .* against rules on raw arrays"):
        check_raw(op, *draw((3,)))


def test_frozen_rules_have_the_same_first_derivative_and_pass():
    # What catches them is check_double_grad: a division of labour, stated.
    for op in WRONG_TWICE.values():
        check_raw(op, *draw(*SHAPES[op.name]))


def test_function_that_wraps_raw_arrays_is_caught():
    from tinygrad_bn import Tensor

    with pytest.raises(GradCheckError, match="arrays in, arrays out"):
        check_raw(lambda x: Tensor(x) * 2.0, *draw((3,)))


# --- kernels -----------------------------------------------------------------------------------


_numbers = itertools.count()


@pytest.fixture
def kernel_module(monkeypatch):
    """Return a function that makes an op with these fused kernels, in the `numpy` family."""

    def make(op, **kernels):
        # A new name each time: loaded kernels are remembered by their module's name.
        module = types.ModuleType(f"planted_kernels_{next(_numbers)}")
        vars(module).update(kernels)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        op.use_kernels(numpy=module.__name__)
        return op

    return make


def test_right_kernel_passes(kernel_module):
    op = made(lambda x: x * 2.0, lambda g, x: (g * 2.0,))
    kernel_module(op, forward=lambda x: x + x, vjp=lambda g, x: (g + g,))
    report = check_backends(op, *draw((3,)))
    assert "numpy" in report.notes[0]


def test_wrong_forward_of_a_kernel_is_caught(kernel_module):
    op = made(lambda x: x * 2.0, lambda g, x: (g * 2.0,))
    kernel_module(op, forward=lambda x: x * 2.0 + 1e-6)
    with pytest.raises(GradCheckError, match="kernels 'numpy' on cpu: output 0"):
        check_backends(op, *draw((3,)))


def test_wrong_rule_of_a_kernel_is_caught(kernel_module):
    op = made(lambda x: x * 2.0, lambda g, x: (g * 2.0,))
    kernel_module(op, vjp=lambda g, x: (g * 3.0,))
    with pytest.raises(GradCheckError, match="kernels 'numpy' on cpu: gradient of input 0"):
        check_backends(op, *draw((3,)))
