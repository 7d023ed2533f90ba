"""Folding: the same function with fewer layers, or a refusal that says why."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import nn

TOLERANCES = {"float64": 1e-12, "float32": 2e-5}  # the stated bars, relative to the largest value


def trained(model, seed=0, dtype="float64"):
    """Return the model with random parameters and statistics, all of them unlike their start."""
    rng = np.random.default_rng(seed)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if "num_batches" in name:
            t.data[...] = 7
        elif name.endswith("running_var"):
            t.data[...] = rng.uniform(0.1, 4, t.shape)
        else:
            t.data[...] = rng.standard_normal(t.shape)
    return model.astype(dtype)


def names(model):
    return [name for name, _ in model.named_modules()]


def assert_folds(model, x, dtype="float64", left=()):
    expected = model.eval()(tg.Tensor(x.astype(dtype))).numpy()
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    folded = nn.fold_batch_norm(model, strict=not left)
    got = folded(tg.Tensor(x.astype(dtype))).numpy()
    assert got.dtype == expected.dtype == np.dtype(dtype)
    assert np.abs(got - expected).max() <= TOLERANCES[dtype] * np.abs(expected).max()
    found = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm)]
    assert tuple(found) == tuple(left)
    # The model itself stays as it was.
    for name, t in model.state_dict().items():
        np.testing.assert_array_equal(t.numpy(), before[name])
    for a in folded.state_dict().values():
        assert not any(np.shares_memory(a.data, b.data) for b in model.state_dict().values())
    return folded


@pytest.mark.parametrize("dtype", sorted(TOLERANCES))
@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    scale=st.booleans(),
    center=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
)
def test_convolutions_of_any_groups_and_layout_take_the_batch_norm_in(
    dtype, seed, groups, bias, layout, scale, center, eps
):
    axis = 1 if layout == "NCHW" else 3
    conv = nn.Conv2d(4, 8, (3, 2), stride=2, padding=1, groups=groups, bias=bias, layout=layout)
    bn = nn.BatchNorm2d(8, eps, axis=axis, scale=scale, center=center)
    model = trained(nn.Sequential(conv, bn, nn.ReLU()), seed, dtype)
    shape = (2, 4, 6, 5) if layout == "NCHW" else (2, 6, 5, 4)
    folded = assert_folds(model, np.random.default_rng(seed).standard_normal(shape), dtype)
    assert names(folded) == ["", "0", "2"]
    assert type(folded[0]) is nn.Conv2d and folded[0].bias is not None
    assert not folded.training and not folded[1].training


@pytest.mark.parametrize("dtype", sorted(TOLERANCES))
@pytest.mark.parametrize("axis", [1, -1])
@given(seed=st.integers(0, 2**31), bias=st.booleans())
def test_linear_layers_take_the_batch_norm_in(dtype, axis, seed, bias):
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.BatchNorm1d(5, axis=axis))
    x = np.random.default_rng(seed).standard_normal((6, 4))
    folded = assert_folds(trained(model, seed, dtype), x, dtype)
    assert repr(folded[0]) == "Linear(in_features=4, out_features=5, bias=True)"


def block(*more, **options):
    return nn.Sequential(nn.Linear(4, 4, **options), nn.BatchNorm1d(4), *more)


def custom_around(*layers):
    class Residual(nn.Module):
        def __init__(self):
            self.inner = nn.Sequential(*layers)

        def forward(self, x):
            return x + self.inner(x)

    return Residual()


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: nn.Sequential(block(nn.ReLU()), block()), 6),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.ReLU()), 4),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())), 4),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4))), 3),
        (lambda: custom_around(*block(nn.ReLU())), 4),
        (lambda: nn.Sequential(custom_around(*block()), *block()), 5),
        (lambda: block(nn.BatchNorm1d(4)), 2),  # two in a row
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Identity(), nn.BatchRenorm(4)), 4),
        (lambda: nn.Sequential({"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4).freeze()}), 2),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm(4, momentum=None, axis=(1,))), 2),
    ],
)
def test_batch_norms_are_found_wherever_order_is_known(make, left):
    folded = assert_folds(trained(make()), np.random.default_rng(0).standard_normal((6, 4)))
    assert len(names(folded)) == left


def test_a_block_that_is_used_twice_is_folded_once_in_both_places():
    shared = block(nn.Tanh())
    model = trained(nn.Sequential(shared, nn.ReLU(), shared))
    folded = assert_folds(model, np.random.default_rng(0).standard_normal((6, 4)))
    assert folded[0] is folded[2] and len(folded[0]) == 2


def test_a_weight_that_two_layers_share_is_folded_for_one_and_kept_for_the_other():
    model = nn.Sequential(*block(bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    folded = assert_folds(trained(model), np.random.default_rng(0).standard_normal((6, 4)))
    np.testing.assert_array_equal(folded[1].weight.numpy(), model[2].weight.numpy())


def test_the_copy_evaluates_whatever_mode_the_model_is_in():
    model = nn.Sequential(block(nn.Dropout())).train()
    assert not any(m.training for m in nn.fold_batch_norm(model).modules())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_weights_are_computed_in_float64_and_rounded_once(dtype):
    model = trained(nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30)), dtype=dtype)
    weight, bias, gamma, beta, mean, var = (
        t.numpy().astype("float64") for t in list(model.state_dict().values())[:6]
    )
    scale = gamma / np.sqrt(var + 1e-5)
    layer = nn.fold_batch_norm(model)[0]
    got, expected = layer.weight.numpy(), (weight * scale[:, None]).astype(dtype)
    # float64 work of another order may fall on the other side of a rounding, once in 1e8 or so.
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(layer.bias.numpy(), ((bias - mean) * scale + beta).astype(dtype))


def test_what_was_not_trained_stays_so():
    model = block().requires_grad_(False)
    assert not any(p.requires_grad for p in nn.fold_batch_norm(model).parameters())


def test_a_model_without_batch_norm_is_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    folded = assert_folds(trained(model), np.random.default_rng(0).standard_normal((6, 4)))
    assert names(folded) == names(model)


class Own(nn.BatchNorm1d):
    def forward(self, x, mask=None):
        return super().forward(x) * 2


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Backwards(nn.Sequential):
    def forward(self, x):
        for module in reversed(list(self.children())):
            x = module(x)
        return x


def holding_twice(name):
    """Return a model in which the first or second layer of a Sequential has another use."""
    model = nn.Sequential(block(), nn.Identity())
    model.other = model[0][name]
    return model


def hooked(model, name):
    """Return the model with a hook that changes what one of its layers returns."""
    model[name].register_forward_hook(lambda module, args, out: out * 2)
    return model


def forward_set_on(model, name):
    """Return the model in which one layer has a forward that its class does not have."""
    own = model[name].forward
    model[name].forward = lambda x: own(x) * 2
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.BatchNorm1d(4), "the model: it is not inside a Sequential"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), "0: nothing comes before it"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)),
            "2: before it comes 1, a ReLU, not a Conv2d or Linear",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            "1: it keeps no running statistics",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(None)), "does not know its channel"),
        (lambda: nn.Sequential(nn.Linear(4, 4), Own(4)), "1: it is a Own, whose forward is its"),
        (lambda: nn.Sequential(OwnLinear(4, 4), nn.BatchNorm1d(4)), "0, a OwnLinear, not"),
        (lambda: hooked(block(), 1), "1: it has a forward hook, which would no longer be called"),
        (lambda: hooked(block(), 0), "1: before it comes 0, a Linear with a forward hook"),
        (
            lambda: hooked(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.BatchNorm1d(4)), 1),
            "2: before it comes 1, a Identity with a forward hook",
        ),
        (
            lambda: hooked(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.BatchNorm1d(4)), 0),
            "1: before it comes 0, a Sequential with a forward hook",
        ),
        (lambda: forward_set_on(block(), 0), "0, a Linear, not"),
        (lambda: forward_set_on(block(), 1), "1: it is a BatchNorm1d, whose forward is its own"),
        (lambda: Backwards(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1: it is not inside a Sequential"),
        (lambda: nn.ModuleList(block()), "0.1|it is not inside a Sequential"),
        (lambda: holding_twice(0), r"0\.1: the layer before it, 0\.0, is used in several places"),
        (lambda: holding_twice(1), r"0\.1: it is used in several places"),
        (
            lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(4)),
            r"it normalizes 4 channels on axis 1, and 0 gives 8 on axis 1",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, axis=-1)),
            r"4 channels on axis -1, and 0 gives 4 on axis 1",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 1, layout="NHWC"), nn.BatchNorm2d(4)),
            r"4 channels on axis 1, and 0 gives 4 on axis 3",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm((4, 3), axis=(1, 2))),
            r"\(4, 3\) channels on axis \(1, 2\)",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(make, words):
    with pytest.raises(ValueError, match=words):
        nn.fold_batch_norm(make())


def test_hooks_go_on_seeing_what_they_saw():
    x = np.random.default_rng(0).standard_normal((6, 4))
    inside = nn.Sequential(hooked(nn.Sequential(block(), nn.ReLU()), 0), nn.BatchNorm1d(4))
    folded = assert_folds(trained(inside), x, left=("1",))  # what is within has none of its own
    assert names(folded) == ["", "0", "0.0", "0.0.0", "0.1", "1"]
    around = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()))
    assert_folds(trained(hooked(around, 1)), x, left=("1.0",))
    assert_folds(trained(hooked(nn.Sequential(block(), nn.Tanh()), 1)), x)


def test_all_reasons_are_given_at_once_and_may_be_passed_over():
    model = nn.Sequential(nn.BatchNorm1d(4), *block(nn.Tanh()), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"(?s)0: nothing.*4: before it comes 3, a Tanh"):
        nn.fold_batch_norm(model)
    x = np.random.default_rng(0).standard_normal((6, 4))
    assert_folds(trained(model), x, left=("0", "4"))
