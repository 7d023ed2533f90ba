"""Fused kernels beside an op: asked in order, free to decline, never seen by Tensors."""

import sys
import types

import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn.backend import kernels
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.op import saving
from tinygrad_bn.ops.elementwise import exp

pytestmark = pytest.mark.usefixtures("own_ops")


@pytest.fixture(autouse=True)
def default_choice(monkeypatch):
    """Use the kernels' default choice, and forget a test's kernel modules after it."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._environment.clear()
    yield
    kernels._modules.clear()
    kernels._environment.clear()


@pytest.fixture
def fused(monkeypatch):
    """Return an op eˣ with a kernel for float32 alone, and the list of who was asked to do what."""
    asked = []

    @tg.op
    def fused(x, *, scale=1.0):
        asked.append("generic forward")
        e = np.exp(x)
        return saving(scale * e, e=e)

    @fused.def_vjp
    def _(g, x, e, scale, needs):
        asked.append("generic vjp")
        return (g * scale * (exp(x) if e is None else e),)

    def forward(x, *, scale=1.0):
        asked.append("kernel forward")
        if x.dtype != np.float32:
            return NotImplemented
        e = np.exp(x)
        return saving(scale * e, e=e)

    def vjp(g, x, e, scale, needs):
        asked.append("kernel vjp")
        return (
            (g * scale * e,) if g.dtype == np.float32 and list(needs) == [True] else NotImplemented
        )

    module = types.ModuleType("fake_numpy_kernels")
    module.forward, module.vjp = forward, vjp
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fused.use_kernels(numpy=module.__name__)
    return fused, asked


def leaf(dtype):
    return tg.tensor(np.array([0.5], dtype), requires_grad=True)


def test_a_kernel_serves_what_it_does_not_decline(fused):
    op, asked = fused
    x = leaf("float32")
    op(x, scale=2.0).backward()
    assert asked == ["kernel forward", "kernel vjp"]
    assert x.grad.tolist() == [2 * np.exp(np.float32(0.5))]


def test_the_generic_form_serves_what_a_kernel_declines(fused):
    op, asked = fused
    x = leaf("float64")
    op(x).backward()
    assert asked == ["kernel forward", "generic forward", "kernel vjp", "generic vjp"]
    assert x.grad.tolist() == [np.exp(0.5)]


def test_tensors_take_the_generic_rule(fused):
    op, asked = fused
    x = leaf("float32")
    (first,) = tg.grad(op(x), x, create_graph=True)
    assert asked == ["kernel forward", "generic vjp"]
    assert tg.grad(first, x)[0].tolist() == [np.exp(np.float32(0.5))]


def test_generic_switches_kernels_off_and_is_restored(fused):
    op, asked = fused
    with pytest.raises(KeyError), use_kernels("generic"):
        op(np.ones(1, np.float32))
        raise KeyError
    op(np.ones(1, np.float32))
    assert asked == ["generic forward", "kernel forward"]


def test_the_environment_variable_switches_kernels_off(fused, monkeypatch):
    op, asked = fused
    monkeypatch.setenv(kernels.VARIABLE, "generic")
    op(np.ones(1, np.float32))
    assert asked == ["generic forward"]
    kernels._environment.clear()
    monkeypatch.setenv(kernels.VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"TINYGRAD_BN_KERNELS: unknown.*'fastest'.*'generic'"):
        op(np.ones(1, np.float32))


def test_a_family_that_another_was_chosen_over_is_not_asked(fused):
    op, asked = fused
    with use_kernels("numba"):
        op(np.ones(1, np.float32))
    assert asked == ["generic forward"]


def test_a_family_whose_package_is_missing_is_passed_over(fused, monkeypatch):
    op, asked = fused
    monkeypatch.setattr(kernels, "unusable_because", lambda family: f"no {family}")
    op(np.ones(1, np.float32))
    assert asked == ["generic forward"]
    assert kernels.status("fused", op.kernels) == {"numpy": "not used: no numpy"}


def test_the_status_names_what_a_gpu_lacks(monkeypatch):
    monkeypatch.setattr(kernels.cuda, "unavailable_because", lambda: "there is no GPU")
    modules = {"cuda": "a.module", "numpy": "another"}
    assert kernels.status("fused", modules) == {
        "cuda": "not used: there is no GPU",
        "numpy": "usable",
    }
    monkeypatch.setattr(kernels.cuda, "unavailable_because", lambda: None)
    assert kernels.status("fused", modules) == {"cuda": "usable", "numpy": "usable"}
    with use_kernels("numpy"):
        assert kernels.status("fused", modules)["cuda"] == "not used: 'numpy' was asked for"


def test_a_kernel_module_without_vjp_leaves_the_derivative_to_the_rule(fused):
    op, asked = fused
    del sys.modules["fake_numpy_kernels"].vjp
    x = leaf("float32")
    op(x).backward()
    assert asked == ["kernel forward", "generic vjp"]


def test_the_first_family_of_the_backend_is_asked_first(fused, monkeypatch):
    op, asked = fused
    first = types.ModuleType("fake_numba_kernels")
    first.forward = lambda x, **options: asked.append("numba forward") or NotImplemented
    monkeypatch.setitem(sys.modules, first.__name__, first)
    monkeypatch.setattr(kernels, "unusable_because", lambda family: None)
    op.use_kernels(numpy="fake_numpy_kernels", numba=first.__name__)
    op(np.ones(1, np.float32))
    assert asked == ["numba forward", "kernel forward"]
