"""Grad mode: nested blocks, exceptions, decorated functions and generators, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tinygrad_bn import grad_mode
from tinygrad_bn.tensor import Tensor
from tinygrad_bn.testing.errors import GradCheckError

_MODES = st.booleans()


class _Planned(Exception):  # noqa: N818  (thrown on purpose, and always caught)
    """What the machine throws through blocks and into generators."""


class GradModeMachine(RuleBasedStateMachine):
    """Blocks and decorators of grad mode; the model is a stack of booleans.

    modes: what is under test: for False and True, something that sets that mode as a context
        manager and as a decorator. is_enabled: what tells the mode.

    After every step the mode must be that of the innermost open block (outside of all, what it was
    at first), and ops must be recorded, or not, accordingly. A generator must run under its
    decorator's mode at each step, and its caller under its own between the steps.

    >>> from hypothesis import settings
    >>> from hypothesis.stateful import run_state_machine_as_test
    >>> short = settings(max_examples=3, stateful_step_count=5, deadline=None, derandomize=True)
    >>> run_state_machine_as_test(GradModeMachine, settings=short)
    """

    modes: dict[bool, Any] = {False: grad_mode.no_grad, True: grad_mode.enable_grad}  # noqa: RUF012
    is_enabled: Callable[[], bool] = staticmethod(grad_mode.is_grad_enabled)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[bool, Any]] = []
        self.generators: list[tuple[bool, Any]] = []
        self.outside = self.is_enabled()
        self.x = Tensor([1.0], requires_grad=True)

    @property
    def expected(self) -> bool:
        """The mode that must hold now."""
        return self.open[-1][0] if self.open else self.outside

    # --- blocks ----------------------------------------------------------------------------------

    @rule(mode=_MODES)
    def enter(self, mode: bool) -> None:
        """Open a block."""
        block = self.modes[mode]()
        block.__enter__()
        self.open.append((mode, block))

    @precondition(lambda self: self.open)
    @rule()
    def leave(self) -> None:
        """Close the innermost block."""
        self.open.pop()[1].__exit__(None, None, None)

    @precondition(lambda self: self.open)
    @rule()
    def leave_by_an_exception(self) -> None:
        """Close the innermost block as an exception does that goes through it."""
        error = _Planned()
        if self.open.pop()[1].__exit__(_Planned, error, None):
            raise GradCheckError("grad mode: the block swallowed an exception")

    @rule(modes=st.lists(_MODES, min_size=1, max_size=4), raises=st.booleans())
    def nest(self, modes: list[bool], raises: bool) -> None:
        """Open blocks inside one another, all left at the end, by an exception or not."""

        def inside(depth: int) -> None:
            if depth == len(modes):
                if raises:
                    raise _Planned
                return
            with self.modes[modes[depth]]():
                self._require(modes[depth], f"inside block {depth + 1} of {modes}")
                inside(depth + 1)
                self._require(modes[depth], f"back in block {depth + 1} of {modes}")

        try:
            inside(0)
        except _Planned:
            if not raises:
                raise

    @rule(mode=_MODES, times=st.integers(1, 3))
    def enter_one_instance_again(self, mode: bool, times: int) -> None:
        """Open one context manager inside itself."""
        block = self.modes[mode]()
        for _ in range(times):
            block.__enter__()
        for left in reversed(range(times)):
            block.__exit__(None, None, None)
            self._require(mode if left else self.expected, f"{left} of {times} entries left")

    # --- decorators ------------------------------------------------------------------------------

    @rule(mode=_MODES, raises=st.booleans(), depth=st.integers(0, 3))
    def call_decorated(self, mode: bool, raises: bool, depth: int) -> None:
        """Call a decorated function that calls itself, and at last returns or raises."""

        @self.modes[mode]()
        def function(depth: int) -> None:
            self._require(mode, "in a decorated function")
            if depth:
                function(depth - 1)
                self._require(mode, "in a decorated function, after it called itself")
            elif raises:
                raise _Planned

        try:
            function(depth)
        except _Planned:
            if not raises:
                raise

    @rule(mode=_MODES)
    def make_generator(self, mode: bool) -> None:
        """Make a decorated generator; `step` runs it."""

        @self.modes[mode]()
        def generator() -> Iterator[Any]:
            try:
                while True:
                    self._require(mode, "in a decorated generator")
                    try:
                        yield
                    except _Planned:
                        self._require(mode, "in a decorated generator that caught an exception")
            finally:
                self._require(mode, "in a decorated generator that is being closed")

        started = generator()
        next(started)
        self.generators.append((mode, started))

    @precondition(lambda self: self.generators)
    @rule(data=st.data(), how=st.sampled_from(["next", "send", "throw", "close"]))
    def step(self, data: Any, how: str) -> None:
        """Resume any of the generators."""
        i = data.draw(st.integers(0, len(self.generators) - 1))
        _, generator = self.generators[i]
        if how == "close":
            self.generators.pop(i)
            generator.close()
        elif how == "throw":
            generator.throw(_Planned())
        elif how == "send":
            generator.send(1)
        else:
            next(generator)

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def mode_is_that_of_the_innermost_block(self) -> None:
        """Raise GradCheckError unless the mode is as it must be, and ops are recorded so."""
        self._require(self.expected, "between two steps")
        recorded = (self.x * 2.0).requires_grad
        if recorded != self.expected:
            raise GradCheckError(
                f"grad mode: an op was {'' if recorded else 'not '}recorded, with the mode "
                f"{self.expected}"
            )

    def teardown(self) -> None:
        """Close what is open, whatever had happened."""
        found: list[GradCheckError] = []
        for _, generator in self.generators:
            try:
                generator.close()
            except GradCheckError as error:
                found.append(error)
        while self.open:
            self.open.pop()[1].__exit__(None, None, None)
        if self.is_enabled() != self.outside:  # a fault was found; it ends with this example
            self.modes[self.outside]().__enter__()
        if found:
            raise found[0]

    def _require(self, mode: bool, where: str) -> None:
        if self.is_enabled() != mode:
            raise GradCheckError(f"grad mode: it is {not mode} {where}, expected {mode}")
