"""Every CPU kernel under every checker that its op passes, on inputs small enough to be drawn.

Kernels leave small arrays to the generic form, so what `tests/ops/test_registry.py` draws hardly
reaches them. Here all of them serve any size, in blocks to match, several to an array and cut by
several threads; and each must have answered, not declined.
"""

import pkgutil
from collections import Counter
from importlib import import_module

import pytest

import tinygrad_bn.kernels.cpu as cpu
from tests.ops.test_registry import (
    DIFFERENTIABLE,
    FLOAT64,
    LIBRARY,
    TWICE,
    by_its_rules_in_longdouble,
    on_drawn_inputs,
)
from tinygrad_bn import testing
from tinygrad_bn.backend import kernels
from tinygrad_bn.testing import strategies as tgst

#: What the modules that have such a constant are to take it for. (A row that several periods make
#: up is shorter than twice SHORTEST_ROW, and must not exceed WIDEST.)
SMALL = {
    "SMALLEST": 1,
    "SMALLEST_SHARE": 1,
    "FEWEST_CHANNELS": 1,
    "BLOCK": 16,
    "PIECE": 5,
    "WIDEST": 8,
    "SHORTEST_RUN": 3,
    "SHORTEST_ROW": 4,
    "CHUNK_BYTES": 256,
    "MOST_WINDOWS": 100,
}
#: Not sizes: `numpy_layer_norm` compares shares of a variance with it.
NOT_SIZES = {("numpy_layer_norm", "SMALLEST_SHARE")}

SERVED = [
    (name, family)
    for name in DIFFERENTIABLE
    for family in ("numpy", "numba")
    if family in LIBRARY[name].kernels
]
EACH = pytest.mark.parametrize(("name", "family"), SERVED)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Let every kernel serve any size."""
    with pytest.MonkeyPatch.context() as patch:
        for found in pkgutil.iter_modules(cpu.__path__):
            module = import_module(f"{cpu.__name__}.{found.name}")
            for constant in SMALL.keys() & vars(module).keys():
                if (found.name, constant) not in NOT_SIZES:
                    patch.setattr(module, constant, SMALL[constant])
        patch.setattr(import_module(f"{cpu.__name__}.threads"), "_count", 3)
        yield


@pytest.fixture
def answers(monkeypatch, name, family):
    """Choose the family, and count what its kernels of this op answer, by "forward" and "vjp"."""
    reason = kernels.unusable_because(family)
    if reason is not None:
        pytest.skip(f"{family}: {reason}")
    count = Counter()
    load = kernels._load

    def counting(module, kind):
        kernel = load(module, kind)
        if kernel is None or module != LIBRARY[name].kernels[family]:
            return kernel

        def counted(*args, **options):
            result = kernel(*args, **options)
            count[kind] += result is not NotImplemented
            return result

        return counted

    monkeypatch.setattr(kernels, "_load", counting)
    with kernels.use_kernels(family):
        yield count
    for kind in ("forward", "vjp"):
        assert count[kind] or load(LIBRARY[name].kernels[family], kind) is None, (
            f"the {family} kernel of {name} declined every {kind}: nothing was tested"
        )


@EACH
def test_agrees_with_the_generic_form(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_backends, tgst.dtypes())


@EACH
def test_gradient_agrees_with_differences(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_grad)


@pytest.mark.parametrize(("name", "family"), [pair for pair in SERVED if pair[0] in TWICE])
def test_gradient_of_gradient_agrees_with_differences(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_double_grad)


@EACH
def test_raw_arrays_and_tensors_agree(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_raw, tgst.dtypes())


@EACH
def test_dtypes_are_kept(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_dtypes, FLOAT64)


@EACH
def test_memory_layout_does_not_matter(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_layouts, tgst.dtypes())


@pytest.mark.parametrize(("name", "family"), SERVED)
def test_float32_and_float16_agree_with_longdouble(name, answers):
    on_drawn_inputs(LIBRARY[name], by_its_rules_in_longdouble, tgst.dtypes())


@EACH
def test_two_uses_add_up(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_accumulation, tgst.dtypes())


@EACH
def test_nothing_is_changed_or_shared(name, answers):
    on_drawn_inputs(LIBRARY[name], testing.check_pure, tgst.dtypes())
