import numpy as np
import pytest

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.backend import kernels, saving
from tinygrad_bn.kernels.cpu import numpy_batch_norm, numpy_masked_batch_norm
from tinygrad_bn.testing import GradCheckError, check_module

X = np.random.default_rng(0).normal(size=(4, 3, 5, 5))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(5, 2), X),
        (nn.BatchNorm2d(3), X),
        (nn.BatchNorm2d(3, affine=False, track_running_stats=False), X),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)), X),
        (nn.Dropout(0.5), X),
    ],
    ids=lambda v: type(v).__name__,
)
def test_right_modules_pass_and_are_left_as_they_were(module, x):
    before = {key: t.numpy().copy() for key, t in module.state_dict().items()}
    check_module(module, x)
    assert module.training
    for key, value in module.state_dict().items():
        assert np.array_equal(value.numpy(), before[key])


def test_a_module_that_draws_is_not_compared_between_backends_and_the_report_says_so():
    notes = check_module(nn.Dropout(0.5), X).notes
    assert "backends not compared in train: random numbers differ there" in notes
    assert not any("eval:" in note for note in notes)


def test_a_wrong_kernel_within_a_module_is_caught(monkeypatch):
    monkeypatch.setattr(numpy_batch_norm, "SMALLEST", 1)
    right = numpy_masked_batch_norm.forward

    def wrong(x, *args, **options):
        found = right(x, *args, **options)
        return saving(found.out * 1.001, **found.residuals)

    monkeypatch.setattr(kernels, "_load", lambda module, kind: wrong if kind == "forward" else None)
    with kernels.use_kernels("generic"), pytest.raises(GradCheckError, match="kernels 'numpy'"):
        check_module(nn.BatchNorm2d(3), X)


def test_a_shared_layer_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            self.inner = nn.Linear(3, 3)
            self.same = self.inner

        def forward(self, x):
            return self.same(self.inner(x))

    check_module(Twice(), X[0, :, 0, :3])


class Scale(nn.Module):
    """A layer that is right, for its subclasses to spoil."""

    def __init__(self):
        self.weight = nn.Parameter(np.full(5, 2.0))
        self.register_buffer("calls", tg.tensor(np.zeros(1)))

    def forward(self, x):
        if self.training:
            self.calls[...] = self.calls + 1
        return x * self.weight


class MovesInEvaluation(Scale):
    def forward(self, x):
        self.calls[...] = self.calls + 1
        return x * self.weight


class FrozenWeight(Scale):
    def forward(self, x):
        return x * self.weight.detach() ** 2 + self.weight * 0.0


class WrongGradient(Scale):
    def forward(self, x):
        # The value of w² with the gradient of w² at a frozen w: half of what it should be.
        return x * self.weight * self.weight.detach()


class ForgetsState(Scale):
    def __init__(self):
        super().__init__()
        self.hidden = np.ones(5)

    def forward(self, x):
        return x * self.weight * tg.tensor(self.hidden)

    def load_state_dict(self, state, strict=True):
        self.hidden = self.hidden * 2
        return super().load_state_dict(state, strict)


class DeafToEval(Scale):
    def eval(self):
        return self


class ForgetsToReturn(Scale):
    def train(self, mode=True):
        super().train(mode)


class SharesOnCopy(Scale):
    def __deepcopy__(self, memo):
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin


class KeepsGradients(Scale):
    def zero_grad(self):
        pass


class LeaksDtype(nn.Module):
    def forward(self, x):
        return x.astype("float64") * 2.0


def test_the_layer_that_is_spoilt_below_is_right():
    check_module(Scale(), X)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (MovesInEvaluation, "evaluation moved 'calls'"),
        (FrozenWeight, "check_grad"),
        (WrongGradient, "check_grad"),
        (ForgetsState, "round trip"),
        (DeafToEval, "eval.. leaves"),
        (ForgetsToReturn, "must return the module"),
        (SharesOnCopy, "shares parameter"),
        (KeepsGradients, "zero_grad"),
        (LeaksDtype, "check_dtypes"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_wrong_modules_are_caught(module, match):
    with pytest.raises((GradCheckError, AttributeError), match=match):
        check_module(module(), X)


def test_a_module_with_a_wrong_batch_norm_is_caught():
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            y = super().forward(x)
            return y + (y.detach() - y).detach() + y.detach() * 0.1

    with pytest.raises(GradCheckError):
        check_module(Shifted(3), X)
    assert F is not None
