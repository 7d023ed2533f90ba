"""Every op of the registry on the GPU, by the checkers that run on its CPU form."""

import pytest
from hypothesis import given, reject

import tinygrad_bn as tg
import tinygrad_bn.functional
from tests.ops.test_registry import DIFFERENTIABLE, FLOAT64, LIBRARY, TWICE
from tinygrad_bn import testing
from tinygrad_bn.testing import Inconclusive
from tinygrad_bn.testing import strategies as tgst

# It goes from the device of its input to another, so its two sides cannot be on one.
NAMES = [name for name in DIFFERENTIABLE if name != "to_device"]


def on_drawn_inputs(on_gpu, name, check, dtypes=FLOAT64, **options):
    """Run `check` on calls of an op that Hypothesis draws, with arrays on the GPU."""
    op = LIBRARY[name]

    @given(dtypes.flatmap(lambda dtype: tgst.op_inputs(op, dtype)))
    def run(drawn):
        arrays = [None if a is None else on_gpu.array(a) for a in drawn.arrays]
        try:
            check(drawn.fn, *arrays, **options)
        except Inconclusive:
            reject()

    run()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_agrees_with_differences(on_gpu, name):
    on_drawn_inputs(on_gpu, name, testing.check_grad)


@pytest.mark.parametrize("name", [name for name in TWICE if name in NAMES])
def test_gradient_of_gradient_agrees_with_differences(on_gpu, name):
    on_drawn_inputs(on_gpu, name, testing.check_double_grad)


@pytest.mark.parametrize("name", NAMES)
def test_raw_arrays_and_tensors_agree(on_gpu, name):
    on_drawn_inputs(on_gpu, name, testing.check_raw, tgst.dtypes())


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_kept(on_gpu, name):
    outputs = "dtype" not in LIBRARY[name].defaults
    on_drawn_inputs(on_gpu, name, testing.check_dtypes, outputs=outputs)


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_does_not_matter(on_gpu, name):
    on_drawn_inputs(on_gpu, name, testing.check_layouts, tgst.dtypes())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_changed_or_shared(on_gpu, name):
    on_drawn_inputs(on_gpu, name, testing.check_pure, tgst.dtypes())


@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_agrees_with_the_generic_form_on_the_cpu(name):
    """With its kernels and without; inputs are NumPy's, and the checker moves them."""

    @given(tgst.dtypes().flatmap(lambda dtype: tgst.op_inputs(LIBRARY[name], dtype)))
    def run(drawn):
        try:
            report = testing.check_backends(drawn.fn, *drawn.arrays)
        except Inconclusive:
            reject()
        assert "cuda" in report.notes[0]

    with tg.default_device("cpu"):
        run()
