"""The state machines pass on the library, and find faults that are planted in what they drive."""

import sys
from collections import Counter
from threading import get_ident

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import tinygrad_bn as tg
from tinygrad_bn import autograd, grad_mode, nn
from tinygrad_bn import functional as F
from tinygrad_bn.op import Op
from tinygrad_bn.tape import Node, new_tensor
from tinygrad_bn.testing import GradCheckError
from tinygrad_bn.testing.machines import (
    BatchNormLayerMachine,
    BatchNormMachine,
    GradModeMachine,
    GraphLifetimeMachine,
    run_machine,
)

#: The same runs every time, and none of them shrunk: whether a fault is found is the question.
FIXED = settings(
    max_examples=1000,
    stateful_step_count=25,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
)


def caught(machine, match=None):
    with pytest.raises(GradCheckError, match=match):
        run_state_machine_as_test(machine, settings=FIXED)


@pytest.mark.parametrize(
    "machine",
    [BatchNormMachine, BatchNormLayerMachine, GraphLifetimeMachine, GradModeMachine],
    ids=lambda m: m.__name__,
)
def test_the_library_passes(machine):
    run_state_machine_as_test(machine, settings=settings(FIXED, max_examples=30))


# --- batch norm ----------------------------------------------------------------------------------


def machine_of(module_class):
    """Return the machine for a class of modules with the library's constructor."""

    class Machine(BatchNormMachine):
        dtypes = ("float32",)

        def make_module(self, num_features, eps, momentum):
            return module_class(num_features, eps, momentum)

    return Machine


class Planted(nn.BatchNorm):
    """The library's module written out, with places to make mistakes in."""

    def forward(self, x):
        training = self.training
        if not training:
            return self.evaluate(x)
        before = self.num_batches_tracked.item()
        self.move(x.detach(), before)
        self.num_batches_tracked += self.step()
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    def evaluate(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    def step(self):
        return 1

    def weight_of_new(self, before):
        return 1 / (before + 1) if self.momentum is None else self.momentum

    def statistics(self, x):
        axes = tuple(a for a in range(x.ndim) if a != 1)
        return x.mean(axis=axes), x.var(axis=axes, correction=1)

    def move(self, x, before):
        w = self.weight_of_new(before)
        wide = x.astype("float64")
        for running, new in zip(
            (self.running_mean, self.running_var), self.statistics(wide), strict=True
        ):
            old = running.astype("float64")
            running[...] = (old + w * (new - old)).astype(running.dtype)


class MomentumSwapped(Planted):
    def weight_of_new(self, before):
        return 1 / (before + 1) if self.momentum is None else 1 - self.momentum


class CounterNotMoved(Planted):
    def step(self):
        return 0


class CounterMovedInEvaluation(Planted):
    def evaluate(self, x):
        self.num_batches_tracked += 1
        return super().evaluate(x)


class BiasedRunningVariance(Planted):
    def statistics(self, x):
        axes = tuple(a for a in range(x.ndim) if a != 1)
        return x.mean(axis=axes), x.var(axis=axes)


class EvaluationUpdatesStatistics(Planted):
    def evaluate(self, x):
        out = super().evaluate(x)
        self.move(x.detach(), self.num_batches_tracked.item())
        return out


class EvaluationUsesTheBatch(Planted):
    def evaluate(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class TrainingUsesRunningStatistics(Planted):
    def forward(self, x):
        super().forward(x)
        return self.evaluate(x)


class CumulativeAverageOffByOne(Planted):
    def weight_of_new(self, before):
        return 1 / (before + 2) if self.momentum is None else self.momentum


class CumulativeAverageOfTheLastTwo(Planted):
    def weight_of_new(self, before):
        return (0.5 if before else 1.0) if self.momentum is None else self.momentum


class LoadingLosesTheVariance(Planted):
    def load_state_dict(self, state, strict=True):
        kept = {name: value for name, value in state.items() if name != "running_var"}
        return super().load_state_dict(kept, strict=False)


class LoadingLosesTheCounter(Planted):
    def load_state_dict(self, state, strict=True):
        kept = {name: value for name, value in state.items() if name != "num_batches_tracked"}
        return super().load_state_dict(kept, strict=False)


class LoadingSharesMemory(Planted):
    """The new module's buffers are the old one's, and the saved ones go on changing."""

    def load_state_dict(self, state, strict=True):
        super().load_state_dict(state, strict)
        if not isinstance(state["running_mean"], tg.Tensor):
            self.running_mean.data = state["running_mean"]


class EvaluationKeepsTraining(Planted):
    def eval(self):
        return self


class StatisticsWrittenBehindTheTape(Planted):
    """Running statistics written without the version counter: a pending pass uses the new ones."""

    def move(self, x, before):
        versions = self.running_mean.version, self.running_var.version
        seen = [list(v) for v in versions]
        super().move(x, before)
        for version, old in zip(versions, seen, strict=True):
            version[:] = old


class FrozenStatistics(Planted):
    """The batch statistics as constants: the mean and x-hat terms of dx are missing."""

    def forward(self, x):
        super().forward(x)
        if not self.training:
            return self.evaluate(x)
        axes = tuple(a for a in range(x.ndim) if a != 1)
        mean, var = x.detach().mean(axis=axes), x.detach().var(axis=axes)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


class EpsOutsideTheRoot(Planted):
    def forward(self, x):
        out = super().forward(x)
        if not self.training:
            return out
        axes = tuple(a for a in range(x.ndim) if a != 1)
        mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
        rest = (1, -1, *[1] * (x.ndim - 2))
        out = (x - mean) / (var**0.5 + self.eps)
        return (out * self.weight.reshape(rest) + self.bias.reshape(rest)).astype(x.dtype)


PLANTED_MODULES = [
    MomentumSwapped,
    CounterNotMoved,
    CounterMovedInEvaluation,
    BiasedRunningVariance,
    EvaluationUpdatesStatistics,
    EvaluationUsesTheBatch,
    TrainingUsesRunningStatistics,
    CumulativeAverageOffByOne,
    CumulativeAverageOfTheLastTwo,
    LoadingLosesTheVariance,
    LoadingLosesTheCounter,
    LoadingSharesMemory,
    EvaluationKeepsTraining,
    StatisticsWrittenBehindTheTape,
    FrozenStatistics,
    EpsOutsideTheRoot,
]


def test_the_module_that_mistakes_are_planted_in_passes():
    run_state_machine_as_test(machine_of(Planted), settings=settings(FIXED, max_examples=30))


@pytest.mark.parametrize("module_class", PLANTED_MODULES, ids=lambda c: c.__name__)
def test_a_planted_fault_of_a_batch_norm_module_is_found(module_class):
    caught(machine_of(module_class))


def test_another_correction_is_for_the_machine_to_be_told():
    class Keras(BatchNormMachine):
        correction = 0

        def make_module(self, num_features, eps, momentum):
            return nn.BatchNorm(num_features, eps, momentum, correction=0)

    run_state_machine_as_test(Keras, settings=settings(FIXED, max_examples=10))


# --- the life of a graph -------------------------------------------------------------------------

_walk = autograd._walk


def retain_graph_ignored(monkeypatch):
    monkeypatch.setattr(autograd, "_walk", lambda *args: _walk(*args[:-1], False))


def graph_never_freed(monkeypatch):
    monkeypatch.setattr(autograd, "_walk", lambda *args: _walk(*args[:-1], True))


def writes_not_seen(monkeypatch):
    def check(self):
        self.guards = []
        _check(self)

    _check = Node.check
    monkeypatch.setattr(Node, "check", check)


def writes_not_seen_in_inputs(monkeypatch):
    def check(self):
        of = self.plan.guarded(outputs=1)  # longer, if the guards were freed
        self.guards = [v if i < 0 else [0, 0] for i, v in zip(of, self.guards, strict=False)]
        _check(self)

    _check = Node.check
    monkeypatch.setattr(Node, "check", check)


def views_count_writes_by_themselves(monkeypatch):
    def noting(self, result, args):
        result.view_of = 0
        return result

    monkeypatch.setattr(Op, "_noting_view", noting)


def recorded_write_forgets_its_history(monkeypatch):
    monkeypatch.setattr(sys.modules["tinygrad_bn.tensor"], "rebase", lambda tensor, node: None)


def leaf_gets_the_last_gradient_alone(monkeypatch):
    def walk(roots, targets, found, *rest):
        _walk(roots, targets, found, *rest)
        for leaf in found:
            leaf.grad = None

    monkeypatch.setattr(autograd, "_walk", walk)


def grad_shares_the_cotangent(monkeypatch):
    monkeypatch.setattr(autograd, "_own", lambda g, references: new_tensor(g))


def gradient_added_twice(monkeypatch):
    def add(pending, place, g, source=None):
        _add(pending, place, g, source)
        if getattr(place, "node", 0) is None and place.grad is not None:
            pending[place] = pending[place] + g

    _add = autograd._add
    monkeypatch.setattr(autograd, "_add", add)


def failed_pass_leaves_gradients_behind(monkeypatch):
    def walk(roots, targets, found, *rest):
        leaves = {p for node in autograd.newest_first([r for r, _ in roots]) for p in node.parents}
        try:
            _walk(roots, targets, found, *rest)
        except RuntimeError:
            for leaf in leaves:
                if getattr(leaf, "node", 0) is None and leaf.grad is not None:
                    leaf.grad.data += 1.0
            raise

    monkeypatch.setattr(autograd, "_walk", walk)


def written_results_refused(monkeypatch):
    """Cautious beyond need: no pass from what was written in place, although it was recorded."""

    def backward(self, *args, **options):
        if self.node is not None and self.version[0]:
            raise RuntimeError("it was written to")
        return _backward(self, *args, **options)

    _backward = tg.Tensor.backward
    monkeypatch.setattr(tg.Tensor, "backward", backward)


PLANTED_IN_THE_TAPE = [
    retain_graph_ignored,
    graph_never_freed,
    writes_not_seen,
    writes_not_seen_in_inputs,
    views_count_writes_by_themselves,
    recorded_write_forgets_its_history,
    leaf_gets_the_last_gradient_alone,
    grad_shares_the_cotangent,
    gradient_added_twice,
    failed_pass_leaves_gradients_behind,
    written_results_refused,
]


@pytest.mark.parametrize("plant", PLANTED_IN_THE_TAPE, ids=lambda plant: plant.__name__)
def test_a_planted_fault_of_the_tape_is_found(plant, monkeypatch):
    plant(monkeypatch)
    caught(GraphLifetimeMachine)


def test_a_users_op_takes_part():
    class Machine(GraphLifetimeMachine):
        ops = {**GraphLifetimeMachine.ops, "wrong": (lambda a: -a, lambda a: (1.0,))}  # noqa: RUF012

    caught(Machine, r"\.grad of leaf")


def test_the_lifetime_machine_comes_to_every_kind_of_situation():
    seen = Counter()

    class Machine(GraphLifetimeMachine):
        def _backward(self, value, retain):
            nodes = list(value.node.behind()) if value.node is not None else []
            kinds = ["freed"] * any(n.freed for n in nodes)
            kinds += ["written"] * any(m.writes != w for n in nodes for m, w in n.kept)
            kinds += ["deep"] * (len(nodes) > 2) + ["no grad"] * (not value.slopes)
            seen.update(kinds or ["clean"])
            super()._backward(value, retain)

    run_state_machine_as_test(Machine, settings=settings(FIXED, max_examples=100))
    # At least every tenth run.
    assert all(seen[kind] >= 10 for kind in ("freed", "written", "deep", "no grad", "clean")), seen


# --- grad mode -----------------------------------------------------------------------------------


def not_restored_after_an_exception(monkeypatch):
    leave = grad_mode._GradMode.__exit__

    def stay(self, kind, error, traceback):
        inside = grad_mode._grad_enabled.get()
        leave(self, kind, error, traceback)
        if kind is not None:
            grad_mode._grad_enabled.set(inside)

    monkeypatch.setattr(grad_mode._GradMode, "__exit__", stay)


def always_restored_to_enabled(monkeypatch):
    leave = grad_mode._GradMode.__exit__

    def enable(self, kind, error, traceback):
        leave(self, kind, error, traceback)
        grad_mode._grad_enabled.set(True)

    monkeypatch.setattr(grad_mode._GradMode, "__exit__", enable)


def one_memory_for_nested_entries(monkeypatch):
    def enter(self):
        self._before = {get_ident(): [grad_mode._grad_enabled.get()] * 9}
        grad_mode._grad_enabled.set(self.enabled)

    monkeypatch.setattr(grad_mode._GradMode, "__enter__", enter)


def leaks_between_generator_steps(monkeypatch):
    def stepwise(mode, generator):
        with mode():
            yield from generator

    monkeypatch.setattr(grad_mode, "_stepwise", stepwise)


def generators_body_left_alone(monkeypatch):
    """The mode is set while the generator is made, and gone when it runs."""

    def stepwise(mode, generator):
        with mode():
            pass
        yield from generator

    monkeypatch.setattr(grad_mode, "_stepwise", stepwise)


def mode_lost_when_a_generator_is_thrown_into(monkeypatch):
    def stepwise(mode, generator):
        step, value = generator.send, None
        while True:
            if step == generator.send:
                with mode():
                    result = step(value)
            else:
                result = step(value)
            try:
                step, value = generator.send, (yield result)
            except GeneratorExit:
                with mode():
                    generator.close()
                raise
            except BaseException as error:
                step, value = generator.throw, error

    monkeypatch.setattr(grad_mode, "_stepwise", stepwise)


def recorded_all_the_same(monkeypatch):
    monkeypatch.setattr(sys.modules["tinygrad_bn.op"], "grad_enabled", lambda: True)


def enable_grad_does_nothing_inside_no_grad(monkeypatch):
    _enter = grad_mode._GradMode.__enter__

    def enter(self):
        before = grad_mode._grad_enabled.get()
        _enter(self)
        grad_mode._grad_enabled.set(before and self.enabled)

    monkeypatch.setattr(grad_mode._GradMode, "__enter__", enter)


def exceptions_swallowed(monkeypatch):
    _leave = grad_mode._GradMode.__exit__
    monkeypatch.setattr(
        grad_mode._GradMode, "__exit__", lambda self, *error: _leave(self, *error) or True
    )


PLANTED_IN_GRAD_MODE = [
    not_restored_after_an_exception,
    always_restored_to_enabled,
    one_memory_for_nested_entries,
    leaks_between_generator_steps,
    generators_body_left_alone,
    mode_lost_when_a_generator_is_thrown_into,
    recorded_all_the_same,
    enable_grad_does_nothing_inside_no_grad,
    exceptions_swallowed,
]


@pytest.mark.parametrize("plant", PLANTED_IN_GRAD_MODE, ids=lambda plant: plant.__name__)
def test_a_planted_fault_of_grad_mode_is_found(plant, monkeypatch):
    plant(monkeypatch)
    caught(GradModeMachine)
    assert tg.is_grad_enabled()


def test_the_machine_starts_from_the_mode_there_is():
    with tg.no_grad():
        run_state_machine_as_test(GradModeMachine, settings=settings(FIXED, max_examples=5))
        assert not tg.is_grad_enabled()


# --- running a machine ---------------------------------------------------------------------------


def test_a_run_says_which_machine_failed_after_how_many_runs_and_by_which_steps():
    with pytest.raises(GradCheckError) as caught:
        run_machine(machine_of(CounterNotMoved), seed=0)
    error = caught.value
    assert error.check == "Machine" and 1 <= error.examples <= 200 and error.seed == 0
    assert "num_batches_tracked is 0, expected 1" in str(error)
    assert any("state.forward(" in note for note in error.__notes__)


def test_the_same_seed_makes_the_same_runs():
    found = []
    for _ in range(2):
        with pytest.raises(GradCheckError) as caught:
            run_machine(machine_of(MomentumSwapped), seed=4, shrink=False)
        found.append((caught.value.examples, str(caught.value)))
    assert found[0] == found[1]
