"""no_grad and enable_grad: restored by value, however a block, a generator or a task ends."""

import asyncio
import contextvars
import inspect
import threading

import pytest

import tinygrad_bn as tg


@pytest.fixture(autouse=True)
def enabled_before_and_after():
    assert tg.is_grad_enabled()
    yield
    assert tg.is_grad_enabled()


def test_nothing_is_recorded_under_no_grad():
    x = tg.tensor([1.0], requires_grad=True)
    with tg.no_grad():
        y = x * 2
        assert tg.tensor([1.0], requires_grad=True).requires_grad
    assert not y.requires_grad
    assert (x * 2).requires_grad


def test_modes_nest():
    modes = []
    with tg.no_grad():
        modes.append(tg.is_grad_enabled())
        with tg.enable_grad():
            modes.append(tg.is_grad_enabled())
            with tg.no_grad(), tg.no_grad():
                modes.append(tg.is_grad_enabled())
            modes.append(tg.is_grad_enabled())
        modes.append(tg.is_grad_enabled())
    assert modes == [False, True, False, True, False]


def test_an_exception_restores_every_mode():
    with tg.no_grad():
        with pytest.raises(KeyError), tg.enable_grad(), tg.no_grad():
            raise KeyError
        assert not tg.is_grad_enabled()


def test_one_instance_may_be_entered_again_inside_itself():
    mode = tg.no_grad()
    with mode:
        with tg.enable_grad(), mode:
            assert not tg.is_grad_enabled()
        assert not tg.is_grad_enabled()


def test_threads_that_share_an_instance_each_get_their_own_mode_back():
    shared, meet, found = tg.no_grad(), threading.Barrier(2, timeout=20), []

    def with_grad():
        meet.wait()  # the first is inside, without grad
        with shared:
            meet.wait()
        meet.wait()  # the other has left last
        found.append(tg.is_grad_enabled())

    def without_grad():
        with tg.no_grad():
            with shared:
                meet.wait()
                meet.wait()
            found.append(not tg.is_grad_enabled())
            meet.wait()

    runs = [threading.Thread(target=run) for run in (with_grad, without_grad)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(20)
    assert found == [True, True]


def test_a_generator_closed_in_another_thread_leaves_that_ones_mode_alone():
    def steps():
        with tg.no_grad():
            yield

    opened = steps()
    opener = threading.Thread(target=next, args=(opened,))
    opener.start()
    opener.join(20)
    with tg.no_grad():
        opened.close()
        assert not tg.is_grad_enabled()


def test_a_decorated_function_keeps_its_name_result_and_callers_mode():
    @tg.no_grad()
    def function(a, *, b):
        """Doc."""
        return tg.is_grad_enabled(), a, b

    assert function(1, b=2) == (False, 1, 2)
    assert (function.__name__, function.__doc__) == ("function", "Doc.")
    with tg.no_grad():
        assert tg.enable_grad()(tg.is_grad_enabled)() is True
        assert not tg.is_grad_enabled()


def test_a_decorated_function_that_raises_restores_the_mode():
    @tg.no_grad()
    def function():
        raise KeyError

    with pytest.raises(KeyError):
        function()


@pytest.mark.usefixtures("own_ops")
def test_backward_restores_the_mode_also_when_a_rule_raises():
    @tg.op
    def failing(x):
        return x * 1

    @failing.def_vjp
    def _(g):
        raise KeyError

    x = tg.tensor([1.0], requires_grad=True)
    for create_graph in (False, True):
        with tg.no_grad(), pytest.raises(KeyError):
            with tg.enable_grad():
                y = failing(x)
            y.backward(create_graph=create_graph)
    assert tg.is_grad_enabled()


# --- generators -------------------------------------------------------------------------------


def test_a_decorated_generator_switches_at_each_step():
    seen = []

    @tg.no_grad()
    def generator():
        seen.append(tg.is_grad_enabled())
        got = yield 1
        seen.append((got, tg.is_grad_enabled()))
        try:
            yield 2
        except KeyError:
            seen.append(("caught", tg.is_grad_enabled()))
        got = yield 3
        seen.append((got, tg.is_grad_enabled()))
        return "returned"

    steps = generator()
    assert tg.is_grad_enabled()
    assert next(steps) == 1
    assert tg.is_grad_enabled()
    assert steps.send("sent") == 2
    assert tg.is_grad_enabled()
    assert steps.throw(KeyError()) == 3
    assert tg.is_grad_enabled()
    with pytest.raises(StopIteration) as stopped:
        steps.send("again")
    assert stopped.value.value == "returned"
    assert seen == [False, ("sent", False), ("caught", False), ("again", False)]


def test_a_decorated_generator_steps_under_its_mode_whoever_calls():
    @tg.enable_grad()
    def generator():
        while True:
            yield tg.is_grad_enabled()

    steps = generator()
    with tg.no_grad():
        assert next(steps)
        assert not tg.is_grad_enabled()
    assert next(steps)
    steps.close()


def test_closing_a_decorated_generator_runs_its_cleanup_under_its_mode():
    seen = []

    @tg.no_grad()
    def generator():
        try:
            yield
        finally:
            seen.append(tg.is_grad_enabled())

    steps = generator()
    next(steps)
    steps.close()
    assert seen == [False]
    steps = generator()
    next(steps)
    del steps  # closed when it is freed
    assert seen == [False, False]


def test_an_error_in_a_decorated_generator_reaches_the_caller():
    @tg.no_grad()
    def generator():
        yield 1
        raise KeyError("inside")

    steps = generator()
    next(steps)
    with pytest.raises(KeyError, match="inside"):
        next(steps)
    unhandled = generator()
    next(unhandled)
    with pytest.raises(ZeroDivisionError):
        unhandled.throw(ZeroDivisionError())


def test_a_decorated_generator_can_be_delegated_to():
    @tg.no_grad()
    def inner():
        got = yield tg.is_grad_enabled()
        return got

    def outer():
        result = yield from inner()
        yield result, tg.is_grad_enabled()

    steps = outer()
    assert next(steps) is False
    assert steps.send("sent") == ("sent", True)


def test_a_generator_may_be_closed_in_another_context_than_it_was_started_in():
    @tg.no_grad()
    def generator():
        yield 1
        yield 2

    steps = generator()
    contextvars.copy_context().run(next, steps)
    assert next(steps) == 2
    contextvars.copy_context().run(steps.close)


# --- threads and tasks ------------------------------------------------------------------------


def test_a_thread_has_its_own_mode():
    seen = []
    with tg.no_grad():
        thread = threading.Thread(target=lambda: seen.append(tg.is_grad_enabled()))
        thread.start()
        thread.join()
        assert not tg.is_grad_enabled()
    assert seen == [True]


def test_tasks_that_take_turns_keep_their_own_modes():
    async def task(mode, expected, barrier):
        seen = []
        with mode():
            for _ in range(5):
                await barrier()
                seen.append(tg.is_grad_enabled())
        return seen == [expected] * 5

    async def main():
        async def turn():
            await asyncio.sleep(0)

        return await asyncio.gather(
            task(tg.no_grad, False, turn),
            task(tg.enable_grad, True, turn),
            task(tg.no_grad, False, turn),
        )

    assert asyncio.run(main()) == [True, True, True]


def test_a_decorated_coroutine_runs_under_its_mode():
    @tg.no_grad()
    async def coroutine():
        before = tg.is_grad_enabled()
        await asyncio.sleep(0)
        return before, tg.is_grad_enabled()

    async def main():
        result = await coroutine()
        return (*result, tg.is_grad_enabled())

    assert inspect.iscoroutinefunction(coroutine)
    assert asyncio.run(main()) == (False, False, True)


def test_a_decorated_async_generator_runs_under_its_mode():
    @tg.no_grad()
    async def generator():
        for _ in range(2):
            yield tg.is_grad_enabled()
            await asyncio.sleep(0)

    async def main():
        return [(inside, tg.is_grad_enabled()) async for inside in generator()]

    assert asyncio.run(main()) == [(False, True), (False, True)]
