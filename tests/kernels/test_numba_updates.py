"""Compiled updates of optimizers: the same bits as the array operations that define them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinygrad_bn as tg
from tests.optim.updates import MAKERS, draw, trained
from tinygrad_bn import optim
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cpu import numba_adam, numba_sgd, threads, updates
from tinygrad_bn.kernels.cpu.compiled import Compiled

pytest.importorskip("numba")

makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
SHAPES = st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), max_size=8)
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-38, 1e38, 3.0]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(updates, "SMALLEST", 1)
    monkeypatch.setattr(updates, "PIECE", 16)
    monkeypatch.setattr(threads, "_count", 3)


def check_bits(make, starts, gradients):
    ours, right = (trained(family, make, starts, gradients) for family in ("numba", "generic"))
    for got, want in zip(ours, right, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(want[want == 0]))


@makers
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_updates_are_those_of_the_array_operations_to_the_bit(make, dtype):
    @given(shapes=SHAPES, seed=st.integers(0, 2**32))
    def check(shapes, seed):
        check_bits(make, *draw([*shapes, (3, 37)], dtype, seed=seed))

    check()


@makers
def test_what_is_not_a_number_comes_out_where_it_would(make):
    values = np.array(SPECIAL * len(SPECIAL), np.float32)
    gradient = np.repeat(np.array(SPECIAL, np.float32), len(SPECIAL))
    with np.errstate(all="ignore"):
        check_bits(make, [values], [[gradient], [gradient[::-1].copy()]])


@makers
def test_a_parameter_whose_gradient_comes_late_begins_its_own_state(make):
    starts, gradients = draw([(40,), (5,), (7,)], np.float32)
    gradients[0][1] = None
    gradients[1][0] = None
    check_bits(make, starts, gradients)


@makers
def test_every_step_is_served(make, monkeypatch):
    served = []
    for module in (numba_sgd, numba_adam):
        step = module.step
        monkeypatch.setattr(
            module, "step", lambda p, *a, step=step, **k: served.append(len(p)) or step(p, *a, **k)
        )
    trained("numba", make, *draw([(40,), (5,), ()], np.float32))
    assert served == [3, 3, 3]


def test_parameters_that_share_memory_are_updated_one_after_another():
    rng = np.random.default_rng(0)
    start, g = rng.normal(size=(2, 200)).astype(np.float32)
    found = {}
    for family in ("numba", "generic"):
        memory = start.copy()
        with use_kernels(family):
            some = [tg.Tensor(part, requires_grad=True) for part in (memory[:150], memory[50:])]
            for p in some:
                p.grad = tg.tensor(g[:150])
            optim.SGD(some, 0.1, 0.9, weight_decay=0.1).step()
        found[family] = memory
    np.testing.assert_array_equal(found["numba"], found["generic"])


@makers
@pytest.mark.parametrize("start", [0, 99, 100, 101])
def test_a_gradient_in_the_parameters_own_memory_gives_the_same_bits(make, start):
    results = []
    for family in ("numba", "generic"):
        memory = np.random.default_rng(0).normal(size=300).astype("f")
        p = tg.tensor(np.zeros(100, "f"), requires_grad=True)
        p.data, p.grad = memory[100:200], tg.Tensor(memory[start : start + 100])
        with use_kernels(family):
            make([p]).step()
        results.append(memory)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("module", [numba_sgd, numba_adam])
def test_what_it_is_not_made_for_is_declined(module, monkeypatch):
    p = np.ones((4, 6), np.float32)
    assert module.served(p, p.copy()) is True
    assert module.served(p, p) is False
    for wrong in (p.astype(np.float16), p.astype(">f4"), p.astype(np.int32), p[:, ::2], p.T):
        assert module.served(wrong, wrong.copy("A")) is False
    assert module.served(p, p.astype(np.float64)) is False
    assert module.served(p, np.ones((4, 12), np.float32)[:, ::2]) is False
    fixed = p.copy()
    fixed.flags.writeable = False
    assert module.served(fixed, p) is False
    assert module.served(p, fixed) is True  # a gradient is read only


@pytest.mark.parametrize("module", [numba_sgd, numba_adam])
def test_small_parameters_alone_compile_nothing(module, monkeypatch):
    monkeypatch.setattr(updates, "SMALLEST", 1 << 12)
    small, large = np.ones(5, np.float32), np.ones(1 << 12, np.float32)
    monkeypatch.setattr(Compiled, "made", lambda self, *dtypes: False)
    assert not module.served(small, small.copy())
    assert module.served(large, large.copy())
    monkeypatch.setattr(Compiled, "made", lambda self, *dtypes: True)
    assert module.served(small, small.copy())
