"""Batch norm layers that keep or use their state wrongly, made from the library's own.

Each is a subclass of `nn.BatchNorm` with one method changed, or that class with a wrong entry in
the table of conventions.
"""

import contextlib
import re
from functools import partial

from tests.mutants.mutant import Mutant
from tests.mutants.planting import with_item
from tests.mutants.verifiers import as_layer
from tinygrad_bn import functional as F
from tinygrad_bn import nn
from tinygrad_bn.nn.conventions import CONVENTIONS, convention_named
from tinygrad_bn.nn.per_channel import PerChannel, ignore
from tinygrad_bn.normalization import plain


def convention(name, **changes):
    """Return a mutant in which a library's convention has another entry."""
    (field,) = changes
    wrong = CONVENTIONS[name]._replace(**changes)
    return Mutant(
        f"convention {name!r}: {field} {changes[field]}, not {getattr(CONVENTIONS[name], field)}",
        nn.BatchNorm,
        as_layer,
        partial(with_item, CONVENTIONS, name, wrong),
    )


def layer(name, *bases, **methods):
    """Return a mutant: `nn.BatchNorm` with other methods."""
    return Mutant(name, type("Mutant", (*bases, nn.BatchNorm), methods), as_layer)


def after(method, act):
    """Return a method that does what it should and then something; what it returns stays."""

    def call(self, *args, **options):
        out = getattr(super(type(self), self), method)(*args, **options)
        act(self, *args, **options)
        return out

    return call


def counting(self, *_):
    if self.num_batches_tracked is not None:
        self.num_batches_tracked += 1


# --- construction --------------------------------------------------------------------------------


def dropping(drop):
    """Return a constructor that takes some of what it is given for not given."""

    def init(self, num_features, **options):
        given = {name: v for name, v in options.items() if not drop(name, v)}
        nn.BatchNorm.__init__(self, num_features, **given)

    return init


def all_or_nothing(self, num_features, *, scale=None, center=None, **options):
    affine = options.pop("affine", True) and scale is not False and center is not False
    nn.BatchNorm.__init__(self, num_features, affine=affine, **options)


def with_statistics(self, num_features, *, track_running_stats=True, **options):
    nn.BatchNorm.__init__(self, num_features, **options)
    self.track_running_stats = track_running_stats


# --- statistics ----------------------------------------------------------------------------------


def moving(weight=None, mean=None, var=None, counted=1):
    """Return a `_move` with another weight of the new value, or other new values."""

    def _move(self, found):
        if self.num_batches_tracked is None:
            return
        w = self._weight_of_new(self.num_batches_tracked) if weight is None else weight(self)
        new = found
        if mean is not None:
            new = new._replace(mean=mean(found))
        if var is not None:
            new = new._replace(var=var(found))
        moved = new.move(self.running_mean, self.running_var, w, self.correction)
        self.num_batches_tracked += (1 if moved is True else moved) * counted

    return _move


def cumulative(weight):
    """Return a `_weight_of_new` with another cumulative average."""

    def _weight_of_new(self, counter):
        if self.momentum is None:
            return weight(counter.data)
        return nn.BatchNorm._weight_of_new(self, counter)

    return _weight_of_new


def whatever_was_counted(self, found):
    nn.BatchNorm._move(self, found)
    if not (isinstance(found.count, int) and found.count > 0) and found.groups == 1:
        counting(self)


def through_float16(self, found):
    nn.BatchNorm._move(self, found)
    for running in (self.running_mean, self.running_var):
        if running is not None:
            running[...] = running.astype("float16").astype(running.dtype)


# --- passes --------------------------------------------------------------------------------------


def by_the_batch(self, x, mask=None):
    self._check(x)
    return self._by_the_batch(x, mask, plain)[0]


def by_the_running(self, x):
    return F.batch_norm(
        x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps,
        axis=self.axis,
    )  # fmt: skip


def frozen_by_the_batch(self, x, mask=None):
    if self.frozen and self.training and x.shape[0] > 1:
        return by_the_batch(self, x, mask)
    return nn.BatchNorm.forward(self, x, mask)


def masked_evaluation(self, x, mask=None):
    y = nn.BatchNorm.forward(self, x, mask)
    if self.running_mean is not None and not self.training and mask is not None:
        y = y * (mask > 0).astype(y.dtype)
    return y


def in_the_layers_dtype(self, x, mask=None):
    y = nn.BatchNorm.forward(self, x, mask)
    return y if self.weight is None else y.astype(self.weight.dtype)


def evaluating_in_groups(self, x, mask=None):
    if not self.training and self.groups > 1 and x.shape[0] % self.groups == 0 and x.size:
        return by_the_batch(self, x)
    return nn.BatchNorm.forward(self, x, mask)


def without_groups(self, x, mask, finish):
    groups, self.groups = self.groups, 1
    try:
        return nn.BatchNorm._by_the_batch(self, x, mask, finish)
    finally:
        self.groups = groups


def counted_before(self, x, mask=None):
    """Count the batch first, also one that is then refused."""
    moves = self.training and not self.frozen and self._sink is None
    if moves and self.num_batches_tracked is not None and x.size:
        self.num_batches_tracked += 1
    y = nn.BatchNorm.forward(self, x, mask)
    if moves and self.num_batches_tracked is not None and x.size:
        self.num_batches_tracked -= 1
    return y


def running_before_the_check(self, x):
    if self.training and self.running_mean is not None and not self.frozen:
        self.running_mean[...] = self.running_mean * 1.5
        nn.BatchNorm._check(self, x)
        self.running_mean[...] = self.running_mean / 1.5
    nn.BatchNorm._check(self, x)


def without(name, other):
    """Return a `_by_the_batch` that leaves a vector out where there is no other one."""

    def _by_the_batch(self, x, mask, finish):
        kept = getattr(self, name)
        if getattr(self, other) is None:
            vars(self)[name] = None
        try:
            return nn.BatchNorm._by_the_batch(self, x, mask, finish)
        finally:
            vars(self)[name] = kept

    return _by_the_batch


# --- recomputing and freezing --------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(self):
    was, self.training = self.training, self.training and self.running_mean is None
    try:
        yield
    finally:
        self.training = was


@contextlib.contextmanager
def for_ever(self):
    self._sink = ignore
    yield


@contextlib.contextmanager
def counting_all_the_same(self):
    moves = self.training and not self.frozen
    with PerChannel.recomputing(self):
        yield
    if moves:
        counting(self)


@contextlib.contextmanager
def statistics_put_back(self):
    """Put the statistics back afterwards, but not the counter."""
    kept = [None if b is None else b.numpy().copy() for b in (self.running_mean, self.running_var)]
    yield
    for buffer, value in zip((self.running_mean, self.running_var), kept, strict=True):
        if buffer is not None and value.shape == buffer.shape:
            buffer[...] = value


def fixing_parameters(self, parameters=False):
    return nn.BatchNorm.freeze(self, True)


def fixing_none(self, parameters=False):
    return nn.BatchNorm.freeze(self, False)


def thawing_statistics_alone(self):
    self.frozen = False
    return self


def train(self, mode=True):
    if mode:
        nn.BatchNorm.unfreeze(self)
    return nn.BatchNorm.train(self, mode)


# --- conventions ---------------------------------------------------------------------------------


def converting(var=None, mean=None, momentum=None, **taken):
    """Return a `convert` after which statistics, momentum or settings are others.

    var, mean: (layer, factor, count) of the running statistics as they were before.
    """

    def convert(self, convention, *, count=None, correction=None):
        target = convention_named("convert", convention)
        old, seen = self.momentum, self.running_mean is not None and self.num_batches_tracked > 0
        m_before, v_before = self.running_mean.numpy().copy(), self.running_var.numpy().copy()
        was = self.correction
        nn.BatchNorm.convert(self, convention, count=count, correction=correction)
        factor = (count - was) / (count - self.correction)
        if var is not None:
            self.running_var[...] = var(v_before, factor if bool(seen) else 1.0, factor, count)
        if mean is not None and bool(seen):
            self.running_mean[...] = mean(m_before, factor)
        if momentum is not None:
            self.momentum = momentum(old, target)
        for name in taken:
            setattr(self, name, was if name == "correction" else getattr(target, name))
        return self

    return convert


# --- sizes, dtypes, copies -----------------------------------------------------------------------


def sizes_from(start):
    """Return a `_set_channels` after which some tensors start with other values."""

    def _set_channels(self, sizes):
        nn.BatchNorm._set_channels(self, sizes)
        for name, value in start.items():
            if getattr(self, name) is not None:
                getattr(self, name).data[...] = value

    return _set_channels


def never_fixed(self, x):
    """Find out the channels again at every call that brings other ones."""
    if self.num_features is not None and x.ndim > 1 and x.shape[self.axis] != self.num_features:
        self._set_channels(None)
    nn.BatchNorm._check(self, x)


def on_axis_one(self, x):
    if self.num_features is None and x.ndim > 1:
        self._set_channels((x.shape[1],))
    nn.BatchNorm._check(self, x)


def first_batch_for_sizes_alone(self, x, mask=None):
    if self.num_features is None and self.training:
        with self.recomputing():
            return nn.BatchNorm.forward(self, x, mask)
    return nn.BatchNorm.forward(self, x, mask)


def kept_as_asked(self, dtype):
    return dtype


def loading_without(*names):
    def load_state_dict(self, state, strict=True):
        kept = {name: v for name, v in state.items() if name not in names}
        return nn.BatchNorm.load_state_dict(self, kept, strict=False)

    return load_state_dict


def saving_without(*names):
    def state_dict(self, *args, **options):
        state = nn.BatchNorm.state_dict(self, *args, **options)
        return {name: v for name, v in state.items() if name not in names}

    return state_dict


def shared(self, memo):
    twin = type(self).__new__(type(self))
    vars(twin).update(vars(self))
    return twin


def reset(self):
    if self.running_mean is not None:
        self.running_mean[...] = 0
        self.running_var[...] = 1


def reset_to_zero(self):
    nn.BatchNorm.reset_running_stats(self)
    if self.running_var is not None:
        self.running_var[...] = 0


def reset_counter(self):
    self.num_batches_tracked[...] = 0


def parameters_too(self):
    nn.BatchNorm.reset_running_stats(self)
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        if getattr(self, name) is not None:
            getattr(self, name).data[...] = value


def never_sink(self):
    return contextlib.nullcontext()


def saying(pattern, words=""):
    """Return an `extra_repr` in which what fits `pattern` is replaced."""
    return lambda self: re.sub(pattern, words, nn.BatchNorm.extra_repr(self))


def in_words_of_pytorch(self):
    try:
        nn.BatchNorm._check_momentum(self)
    except ValueError as error:
        raise ValueError(str(error).replace("old value", "new value")) from None


CONVENTION = [
    convention("torch", weights_new=False),
    convention("keras", weights_new=True),
    convention("flax", weights_new=True),
    convention("chainer", weights_new=True),
    convention("torch", correction=0),
    convention("keras", correction=1),
    convention("flax", correction=1),
    convention("chainer", correction=0),
    convention("torch", momentum=0.9),
    convention("keras", momentum=0.9),
    convention("flax", momentum=0.9),
    convention("chainer", momentum=0.99),
    convention("torch", eps=1e-3),
    convention("keras", eps=1e-5),
    convention("flax", eps=1e-3),
    convention("chainer", eps=1e-5),
    convention("keras", axis=1),
    convention("flax", axis=1),
    convention("chainer", axis=-1),
    layer("convention: what is given loses if it is PyTorch's default", __init__=dropping(
        lambda name, v: (name, v) in {("correction", 1), ("axis", 1)})),
    layer("convention: eps that is given loses", __init__=dropping(lambda name, v: name == "eps")),
    layer("convention: momentum=None taken for not given", __init__=dropping(
        lambda name, v: name == "momentum" and v is None)),
    layer("convention: correction=0 taken for not given", __init__=dropping(
        lambda name, v: name == "correction" and v == 0)),
    layer("convert: running variance as it was", convert=converting(
        var=lambda v, f, factor, m: v)),
    layer("convert: running variance by the inverse factor", convert=converting(
        var=lambda v, f, factor, m: v / f)),
    layer("convert: running variance by m / (m - 1) always", convert=converting(
        var=lambda v, f, factor, m: v * m / (m - 1) if f != 1 else v)),
    layer("convert: running variance by a deviation's factor", convert=converting(
        var=lambda v, f, factor, m: v * f**0.5)),
    layer("convert: start value converted too", convert=converting(
        var=lambda v, f, factor, m: v * factor)),
    layer("convert: running mean converted too", convert=converting(mean=lambda v, f: v * f)),
    layer("convert: momentum as it was", convert=converting(momentum=lambda old, target: old)),
    layer("convert: momentum always turned round", convert=converting(
        momentum=lambda old, target: None if old is None else 1 - old)),
    layer("convert: momentum of the new convention", convert=converting(
        momentum=lambda old, target: target.momentum)),
    layer("convert: eps of the new convention", convert=converting(eps=True)),
    layer("convert: axis of the new convention", convert=converting(axis=True)),
    layer("convert: correction as it was", convert=converting(correction=True)),
]  # fmt: skip

COUNTING = [
    layer("counter: never moved", _move=moving(counted=0)),
    layer("counter: moved by two", _move=moving(counted=2)),
    layer("counter: moved by the number of groups", _move=lambda self, found: (
        moving(counted=found.groups)(self, found))),
    layer("counter: moved in evaluation too", forward=after("forward", lambda self, *_: (
        None if self.training else counting(self)))),
    layer("counter: moved by empty and by masked batches", _move=whatever_was_counted),
    layer("counter: moved by a batch that is refused", forward=counted_before),
    layer("counter: set back by train()", train=after("train", lambda self, *_: (
        None if self.num_batches_tracked is None else reset_counter(self)))),
    layer("cumulative average: 1 / (k + 2)", _weight_of_new=cumulative(lambda k: 1 / (k + 2))),
    layer("cumulative average: 1 / k", _weight_of_new=cumulative(lambda k: 1 / max(int(k), 1))),
    layer("cumulative average: of the last two", _weight_of_new=cumulative(
        lambda k: 1.0 if k == 0 else 0.5)),
    layer("cumulative average: 0.1 for None", _weight_of_new=cumulative(lambda k: 0.1)),
    layer("cumulative average: the first batch again and again", _weight_of_new=cumulative(
        lambda k: 1.0)),
    layer("reset: counter as it was", reset_running_stats=reset),
    layer("reset: variance to 0", reset_running_stats=reset_to_zero),
    layer("reset: parameters too", reset_running_stats=parameters_too),
    layer("running: biased variance whatever is asked", _move=moving(
        var=lambda found: found.var * 0.75)),
    layer("running: rounded to float16", _move=through_float16),
    layer("running: written before x is checked", _check=running_before_the_check),
    layer("running: a step of 0.1 whatever momentum says", _move=moving(weight=lambda self: 0.1)),
]  # fmt: skip


MODES = [
    layer("freeze: training moves the statistics all the same", forward=after(
        "forward", lambda self, x, mask=None: (
            self._move(self._by_the_batch(x, mask, plain)[1])
            if self.frozen and self.training and x.size and x.shape[0] > 2 else None))),
    layer("freeze: training normalizes by the batch", forward=frozen_by_the_batch),
    layer("freeze: undone by train()", train=train),
    layer("freeze: parameters always fixed", freeze=fixing_parameters),
    layer("freeze: parameters never fixed", freeze=fixing_none),
    layer("unfreeze: parameters stay fixed", unfreeze=thawing_statistics_alone),
    layer("recomputing: statistics move", recomputing=never_sink),
    layer("recomputing: evaluates", recomputing=evaluating),
    layer("recomputing: never ends", recomputing=for_ever),
    layer("recomputing: counts", recomputing=counting_all_the_same),
    layer("recomputing: statistics put back, the counter not", recomputing=statistics_put_back),
    layer("without statistics: evaluation by start values", __init__=with_statistics),
    layer("groups: ignored by the layer", _by_the_batch=without_groups),
    layer("groups: in evaluation too", forward=evaluating_in_groups),
    layer("mask: ignored by the layer", _by_the_batch=lambda self, x, mask, finish: (
        nn.BatchNorm._by_the_batch(self, x, None, finish))),
    layer("mask: in evaluation too", forward=masked_evaluation),
    layer("evaluation: by the batch", forward=lambda self, x, mask=None: (
        nn.BatchNorm.forward(self, x, mask) if self.training else by_the_batch(self, x, mask))),
    layer("training: by the running statistics", forward=lambda self, x, mask=None: (
        (nn.BatchNorm.forward(self, x, mask), by_the_running(self, x))[
            self.running_mean is not None])),
    layer("eval() does nothing", eval=lambda self: self),
    layer("output in the dtype of the layer", forward=in_the_layers_dtype),
]  # fmt: skip

PARTS = [
    layer("scale and center: all or nothing", __init__=all_or_nothing),
    layer("scale alone: weight not applied", _by_the_batch=without("weight", other="bias")),
    layer("center alone: bias not applied", _by_the_batch=without("bias", other="weight")),
    layer("lazy: weight starts at 0", _set_channels=sizes_from({"weight": 0.0})),
    layer("lazy: running variance starts at 0", _set_channels=sizes_from({"running_var": 0.0})),
    layer("lazy: channels read off axis 1 always", _check=on_axis_one),
    layer("lazy: any other number of channels accepted later", _check=never_fixed),
    layer("lazy: first batch finds the size and is not counted",
          forward=first_batch_for_sizes_alone),
    layer("lazy: cannot be loaded into", _take_sizes=lambda self, state, prefix: False),
    layer("float16: statistics kept in it", _dtype_for=kept_as_asked),
    layer("load: running variance lost", load_state_dict=loading_without("running_var")),
    layer("load: counter lost", load_state_dict=loading_without("num_batches_tracked")),
    layer("load: bias lost", load_state_dict=loading_without("bias")),
    layer("save: running mean missing", state_dict=saving_without("running_mean")),
    layer("save: counter missing", state_dict=saving_without("num_batches_tracked")),
    layer("deepcopy: shares everything", __deepcopy__=shared),
]  # fmt: skip

WORDS = [
    layer("repr: momentum without words", extra_repr=saying(r" \(weight[^)]*\)")),
    layer("repr: momentum said to weight the new value always", extra_repr=saying(
        "old value", "new value")),
    layer("repr: momentum said to weight the old value always", extra_repr=saying(
        "new value", "old value")),
    layer("repr: a number for the average of all batches", extra_repr=saying(
        "None .average of all batches", "0.1 (weight of the new value")),
    layer("repr: biased variance not said", extra_repr=saying(r", correction=0.*")),
    layer("repr: frozen not said", extra_repr=saying(", frozen=True")),
    layer("repr: frozen said of layers that are not", extra_repr=lambda self: (
        nn.BatchNorm.extra_repr(self) + ", frozen=True" * (not self.frozen))),
    layer("error: momentum above 1 accepted", _check_momentum=lambda self: None),
    layer("error: momentum said to weight the new value always", _check_momentum=(
        in_words_of_pytorch)),
]  # fmt: skip


LAYERS = [*CONVENTION, *COUNTING, *MODES, *PARTS, *WORDS]
