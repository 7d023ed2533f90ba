"""Population statistics: those of one array of all values, whatever the batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinygrad_bn as tg
from tinygrad_bn import data, nn
from tinygrad_bn.nn.population import Population
from tinygrad_bn.normalization import BatchStatistics


def values(bn):
    return bn.running_mean.numpy(), bn.running_var.numpy(), bn.num_batches_tracked.item()


@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    correction=st.sampled_from([0, 1]),
    offset=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_they_are_those_of_all_values_together(sizes, correction, offset, seed):
    rng = np.random.default_rng(seed)
    # Batches whose means differ: averaged variances would be too small.
    drawn = [offset + rng.normal(rng.normal() * 3, 1 + rng.random(), (n, 3, 2)) for n in sizes]
    bn = nn.BatchNorm1d(3, correction=correction, dtype="float64")
    bn(drawn[0])  # what was there before plays no part
    nn.update_batch_norm(bn, (x for x in drawn))
    whole = np.concatenate(drawn).astype(np.longdouble)
    mean, var, counter = values(bn)
    np.testing.assert_allclose(mean, whole.mean(axis=(0, 2)).astype(float), rtol=1e-14, atol=1e-14)
    expected = whole.var(axis=(0, 2), ddof=correction).astype(float)
    # A mean of 1e6 is known to 1e-10, so differences of means are; Σx² - (Σx)²/n is off by 1e-4.
    np.testing.assert_allclose(var, expected, rtol=1e-8 if offset else 1e-12)
    assert counter == len(sizes)


@given(seed=st.integers(0, 2**31), parts=st.integers(1, 5))
def test_merging_loses_nothing_where_the_mean_is_far_larger_than_the_spread(seed, parts):
    rng = np.random.default_rng(seed)
    x = 1e8 + rng.standard_normal((parts, 50, 2))
    population = Population()
    for part in x:
        population.add(BatchStatistics(part.mean(axis=0), part.var(axis=0), 50))
    whole = x.reshape(-1, 2).astype(np.longdouble)
    # A mean of 1e8 is known to 1e-8, which is what δ² can be off by, relative to a variance of 1.
    np.testing.assert_allclose(population.var(0), whole.var(axis=0).astype(float), rtol=1e-7)


def test_layers_before_it_are_in_training_mode():
    first, second = nn.BatchNorm1d(3, correction=0), nn.BatchNorm1d(3, correction=0)
    model = nn.Sequential(first, nn.Tanh(), second).astype("float64").eval()
    drawn = np.random.default_rng(0).normal(5, 3, (4, 6, 3))
    nn.update_batch_norm(model, drawn)
    normalized = (drawn - drawn.mean(axis=1, keepdims=True)) / np.sqrt(
        drawn.var(axis=1, keepdims=True) + 1e-5
    )
    passed_on = np.tanh(normalized).reshape(-1, 3)
    np.testing.assert_allclose(first.running_mean.numpy(), drawn.mean(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(first.running_var.numpy(), drawn.var(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(second.running_mean.numpy(), passed_on.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(second.running_var.numpy(), passed_on.var(axis=0), rtol=1e-12)


def test_groups_masks_and_layers_called_twice_are_merged_too():
    class Twice(nn.Module):
        def __init__(self):
            self.bn = nn.BatchNorm1d(2, groups=2, correction=0, dtype="float64")

        def forward(self, pair):
            return self.bn(pair[0], mask), self.bn(pair[1]), self.bn(pair[0], 0 * mask)

    model = Twice()
    # Of the last group of the first call one value counts, which is too few.
    mask = np.array([1, 1, 1, 1, 0, 0])[:, None]
    x = np.random.default_rng(0).normal(2, 1, (2, 6, 2))
    nn.update_batch_norm(model, [[x]])
    counting = np.concatenate([x[0, :3], x[1]])
    mean, var, counter = values(model.bn)
    np.testing.assert_allclose(mean, counting.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(var, counting.var(axis=0), rtol=1e-12)
    assert counter == 2


def test_modes_momentum_and_what_trains_are_put_back():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(), nn.Linear(3, 2))
    model.eval()[2].train()
    nn.update_batch_norm(model, [np.random.default_rng(0).normal(size=(8, 3))])
    assert [m.training for m in model.modules()] == [False, False, False, True]
    assert model[0].momentum == 0.3 and tg.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    before = model[0].running_mean.numpy().copy()
    model.train()(np.ones((4, 3)))  # training goes on from there
    np.testing.assert_allclose(model[0].running_mean.numpy(), 0.7 * before + 0.3, rtol=1e-6)
    assert model[0].num_batches_tracked.item() == 2


def test_a_cumulative_average_goes_on_from_the_batches_it_was_given():
    bn = nn.BatchNorm1d(1, momentum=None, dtype="float64")
    nn.update_batch_norm(bn, np.array([[[0.0], [2.0]], [[4.0], [6.0]]]))  # means 1 and 5
    bn(np.array([[8.0], [10.0]]))
    np.testing.assert_allclose(bn.running_mean.numpy(), 5.0)


def test_other_layers_keep_their_statistics():
    x = np.random.default_rng(0).normal(3, 2, (6, 3, 4))
    model = nn.Sequential(
        nn.BatchNorm1d(3).freeze(),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.BatchRenorm(3),
        nn.BatchNorm1d(3),
    )
    nn.update_batch_norm(model, [x, x])
    for untouched in (model[0], model[2]):
        assert untouched.running_mean.tolist() == [0, 0, 0]
        assert untouched.num_batches_tracked.item() == 0
    assert [model[i].num_batches_tracked.item() for i in (3, 4)] == [2, 2]


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].aside = nn.BatchNorm1d(3)
    model[0].aside(np.random.default_rng(0).normal(size=(5, 3)))
    before = values(model[0].aside)
    nn.update_batch_norm(model, [np.random.default_rng(1).normal(size=(5, 3))])
    for a, b in zip(values(model[0].aside), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_loader_of_images_and_labels_gives_the_images():
    x = np.random.default_rng(0).normal(3, 2, (10, 3)).astype("float32")
    bn = nn.BatchNorm1d(3, correction=0)
    nn.update_batch_norm(bn, data.DataLoader((x, np.arange(10)), 4, shuffle=True, seed=0))
    np.testing.assert_allclose(bn.running_mean.numpy(), x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var.numpy(), x.var(axis=0), rtol=1e-6)


def test_a_lazy_layer_is_sized_on_the_way():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(None))
    nn.update_batch_norm(model, [np.random.default_rng(0).normal(size=(5, 2)).astype("float32")])
    assert model[1].running_mean.shape == (3,)


def test_the_write_is_seen_by_a_pending_backward():
    bn = nn.BatchNorm1d(3)
    loss = bn.eval()(tg.randn(4, 3, requires_grad=True)).sum()
    nn.update_batch_norm(bn, [np.eye(3)])
    with pytest.raises(RuntimeError, match="in place"):
        loss.backward()


def test_an_error_on_the_way_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()

    def some_then_wrong():
        yield np.random.default_rng(0).normal(size=(5, 3))
        yield np.ones((5, 4))

    with pytest.raises(ValueError, match="4 channels"):
        nn.update_batch_norm(model, some_then_wrong())
    for bn in model:
        assert values(bn)[2] == 0 and (values(bn)[0] == 0).all() and not bn.training
    model.train()(np.eye(3))  # and the layers keep their own statistics again
    assert values(model[0])[2] == 1


def test_after_an_error_a_lazy_layer_is_lazy_again():
    model = nn.Sequential(nn.InstanceNorm1d(None, affine=True), nn.BatchNorm1d(None))
    weights = [layer.weight for layer in model if layer.weight is not None]
    for batches in ([np.ones((2, 3, 4)), np.ones((2, 5, 4))], [np.ones((0, 3, 4))]):
        with pytest.raises(ValueError):
            nn.update_batch_norm(model, batches)
        assert [layer.num_features for layer in model] == [None, None]
        assert [w.shape for w in weights] == [(0,), (0,)]
    nn.update_batch_norm(model, [np.random.default_rng(0).normal(size=(2, 5, 4))])
    assert model[1].running_mean.shape == weights[1].shape == (5,)


def test_a_variance_beyond_its_dtype_is_the_largest_there_is():
    bn = nn.BatchNorm1d(2)
    x = np.random.default_rng(0).normal(size=(2, 8, 2)) * np.array([1e30, 1.0])
    nn.update_batch_norm(bn, x)
    mean, var, _ = values(bn)
    assert var[0] == np.finfo(np.float32).max
    np.testing.assert_allclose(mean, x.mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(var[1], x[..., 1].var(ddof=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "batches", "words"),
    [
        (nn.BatchNorm1d(3), [], "got 0 batches.*used before is empty"),
        (nn.BatchNorm1d(3), [np.ones((0, 3))], "got 1 batches and no values in them$"),
        (nn.Linear(3, 3), [np.ones((2, 3))], "no batch norm with running statistics"),
        (nn.BatchNorm1d(3).freeze(), [np.ones((2, 3))], "that are not frozen"),
        (nn.BatchNorm1d(3, track_running_stats=False), [np.ones((2, 3))], "no batch norm with"),
    ],
)
def test_nothing_to_do_is_an_error(model, batches, words):
    with pytest.raises(ValueError, match=f"update_batch_norm: .*{words}"):
        nn.update_batch_norm(model, batches)
