"""Learning rates over the steps: start, peak, end, and resuming."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import nn, optim


def sgd(*rates):
    groups = [{"params": nn.Parameter([0.0]), "lr": lr} for lr in rates]
    return optim.SGD(groups, lr=0.0)


def rates(schedule, steps):
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.lr)
        schedule.step()
    return found


@given(st.integers(1, 60), st.data())
def test_cosine_rises_in_a_line_and_falls_in_half_a_cosine(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    end = data.draw(st.floats(0, 1))
    found = rates(optim.CosineSchedule(sgd(2.0), total, warmup=warmup, end=end), total)
    for k in range(warmup):
        assert found[k] == pytest.approx(2 * (k + 1) / (warmup + 1))
    assert found[warmup] == pytest.approx(2.0)
    if total - warmup > 1:
        assert found[-1] == pytest.approx(2 * end)
    middle = warmup + (total - 1 - warmup) / 2
    if middle == int(middle) and middle > warmup:
        assert found[int(middle)] == pytest.approx(1 + end)
    assert all(a >= b - 1e-12 for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))


@given(st.integers(2, 60), st.floats(0, 0.9))
def test_one_cycle_goes_from_start_to_peak_to_end(total, rise):
    found = rates(optim.OneCycle(sgd(3.0), total, rise=rise, start=0.1, end=0.01), total)
    assert found[0] == pytest.approx(0.3 if rise else 3.0)
    assert found[-1] == pytest.approx(0.03)
    assert max(found) <= 3.0
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_every_group_keeps_its_own_peak():
    optimizer = sgd(1.0, 0.5)
    schedule = optim.CosineSchedule(optimizer, 3)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.25])


def test_after_the_last_step_the_rate_stays():
    schedule = optim.CosineSchedule(sgd(1.0), 3, end=0.1)
    assert rates(schedule, 5)[2:] == pytest.approx([0.1, 0.1, 0.1])


def test_the_rate_is_that_of_the_step():
    (p,) = (nn.Parameter([0.0]),)
    optimizer = optim.SGD([p], lr=1.0)
    schedule = optim.CosineSchedule(optimizer, 2, warmup=1)
    p.grad = tg.ones(1)
    for expected in (-0.5, -1.5):
        optimizer.step()
        schedule.step()
        assert p.item() == expected


def test_a_saved_schedule_resumes():
    whole = rates(optim.OneCycle(sgd(1.0), 10), 10)
    first = optim.OneCycle(sgd(1.0), 10)
    rates(first, 4)
    optimizer = sgd(123.0)
    second = optim.OneCycle(optimizer, 10)
    second.load_state_dict(first.state_dict())
    assert rates(second, 6) == whole[4:]
    with pytest.raises(ValueError, match="state is for 1 parameter groups, expected 2"):
        optim.OneCycle(sgd(1.0, 2.0), 10).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.CosineSchedule(sgd(1.0), 0), "total_steps is 0"),
        (lambda: optim.CosineSchedule(sgd(1.0), 5, warmup=5), "warmup is 5 of 5 steps"),
        (lambda: optim.CosineSchedule(sgd(1.0), 5, warmup=-1), "warmup is -1"),
        (lambda: optim.OneCycle(sgd(1.0), 5, rise=1.0), "rise is 1.0"),
    ],
)
def test_options_are_checked(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_schedule_of_ones_own():
    class Halving(optim.Schedule):
        def factor(self, step):
            return math.ldexp(1.0, -step)

    assert rates(Halving(sgd(8.0), 4), 4) == [8, 4, 2, 1]
