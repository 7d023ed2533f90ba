"""What layers with a value per channel share: parameters, running statistics, and their sizes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tinygrad_bn import backend, creation
from tinygrad_bn.nn.module import Module
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.normalization import BatchStatistics
from tinygrad_bn.normalization_checks import check_floating, kept_axes
from tinygrad_bn.tensor import Tensor

Axis = int | tuple[int, ...]

#: What each of the tensors starts from.
_START = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


class PerChannel(Module):
    """A layer that may hold a weight, a bias and running statistics for each channel.

    num_features: the number of channels, or a tuple of sizes for several axes in x's order. With
        None it is read off the first x, or off a state dict that is loaded before; until then the
        tensors are there, with no entries, and they stay the same objects, so an optimizer may be
        given them at once. (What is written into them by hand before is lost: there is no room.)
    axis: the channel axis or axes.
    scale, center: whether there is a weight (starting at 1) and a bias (at 0).
    tracked: whether there are running statistics.
    dtype, device: of all of them: float32 unless given, and never narrower.
    """

    #: The ranks of x that are accepted; None accepts any that has a channel and another axis.
    ranks: tuple[int, ...] | None = None
    #: The layer that accepts them all.
    any_rank = "nn.BatchNorm"

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int | tuple[int, ...] | None,
        axis: Axis,
        *,
        scale: bool,
        center: bool,
        tracked: bool,
        dtype: Any,
        device: str | None,
    ):
        self.num_features = num_features
        self.axis = axis
        #: Takes the statistics of a batch; None moves the running ones.
        self._sink: Callable[[BatchStatistics], Any] | None = None
        if num_features is not None and len(self._channels()) != len(self._axes()):
            raise ValueError(
                f"{self._name}: num_features is {num_features} and axis {axis}, expected a size "
                f"for each axis"
            )
        dtype = self._dtype_for(backend.as_dtype(dtype or "float32"))
        shape = self._channels()

        def filled(name: str) -> Tensor:
            return creation.full(shape, _START[name], dtype=dtype, device=device)

        self.weight = Parameter(filled("weight")) if scale else None
        self.bias = Parameter(filled("bias")) if center else None
        self.register_buffer("running_mean", filled("running_mean") if tracked else None)
        self.register_buffer("running_var", filled("running_var") if tracked else None)
        count = creation.zeros((), dtype=backend.int64, device=device) if tracked else None
        self.register_buffer("num_batches_tracked", count)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def reset_running_stats(self) -> None:
        """Set the running statistics back to their start: mean 0, variance 1, no batches."""
        for buffer, value in (
            (self.running_mean, _START["running_mean"]),
            (self.running_var, _START["running_var"]),
            (self.num_batches_tracked, 0),
        ):
            if buffer is not None:
                buffer[...] = value

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Leave running statistics and counter alone inside: for a forward that is done again.

        A network that computes activations a second time, to save memory, would otherwise count
        every batch twice. What is computed is the same.

        >>> import tinygrad_bn as tg
        >>> bn = tg.nn.BatchNorm1d(3)
        >>> x = tg.randn(8, 3)
        >>> y = bn(x)
        >>> with bn.recomputing():
        ...     again = bn(x)
        >>> bool((again == y).min()), bn.num_batches_tracked.item()
        (True, 1)
        """
        before, self._sink = self._sink, ignore
        try:
            yield
        finally:
            self._sink = before

    # --- sizes -----------------------------------------------------------------------------------

    def _axes(self) -> tuple[int, ...]:
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    def _channels(self) -> tuple[int, ...]:
        """Return the sizes of the channel axes; zeros while they are unknown."""
        if self.num_features is None:
            return (0,) * len(self._axes())
        sizes = self.num_features if isinstance(self.num_features, tuple) else (self.num_features,)
        return tuple(operator.index(size) for size in sizes)

    def _dtype_for(self, dtype: Any) -> Any:
        """Return `dtype`, or float32 where that is wider: statistics are not kept in half."""
        return dtype if dtype.itemsize >= 4 else backend.float32

    def _set_channels(self, sizes: tuple[int, ...] | None) -> None:
        """Give the tensors their sizes and start values; None takes their entries away again."""
        shape = (0,) * len(self._axes()) if sizes is None else sizes
        for name, value in _START.items():
            tensor = getattr(self, name)
            if tensor is not None:
                where = {"dtype": tensor.dtype, "device": tensor.device}
                tensor.data = creation.full(shape, value, **where).data
                tensor.note_write()
        # Last, since another thread that finds it set takes the tensors to be there.
        self.num_features = None if sizes is None else sizes if len(sizes) > 1 else sizes[0]

    def _take_sizes(self, state: Mapping[str, Any], prefix: str) -> bool:
        if self.num_features is not None:
            return False
        for name in _START:
            shape = tuple(getattr(state.get(f"{prefix}{name}"), "shape", ()))
            if len(shape) == len(self._axes()) and 0 not in shape:
                self._set_channels(shape)
                return True
        return False

    def _forget_sizes(self) -> None:
        self._set_channels(None)

    def _check(self, x: Any) -> None:
        """Raise ValueError unless x has the rank and the channels; take the channels from a first x
        where they were left open."""
        check_floating(self._name, x)
        if self.ranks is not None and x.ndim not in self.ranks:
            expected = " or ".join(map(str, self.ranks))
            raise ValueError(
                f"{self._name}: x has shape {tuple(x.shape)}, expected {expected} dimensions; for "
                f"other ranks use {self.any_rank}"
            )
        if self.num_features is None:
            kept = kept_axes(self._name, x, self.axis)
            self._set_channels(tuple(x.shape[a] for a in kept))
            return
        axes = self._axes()
        # An axis that x does not have is for the function to complain about.
        if all(-x.ndim <= a < x.ndim for a in axes):
            found = tuple(x.shape[a] for a in sorted(a % x.ndim for a in axes))
            if found != self._channels():
                sizes = found if len(found) > 1 else found[0]
                raise ValueError(
                    f"{self._name}: x has shape {tuple(x.shape)}, so {sizes} channels on axis "
                    f"{self.axis}; expected num_features={self.num_features}. Set axis= if the "
                    f"channels are elsewhere (-1 is channels-last)"
                )


def ignore(found: BatchStatistics) -> None:
    """Do nothing with the statistics of a batch: it is being computed again."""


@contextlib.contextmanager
def recomputing(model: Module) -> Iterator[None]:
    """Let no layer inside `model` move its running statistics inside this context.

    For forward passes that are done again, as `BatchNorm.recomputing` for one layer.

    >>> import tinygrad_bn as tg
    >>> from tinygrad_bn import nn
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> with nn.recomputing(model):
    ...     y = model(tg.randn(8, 3))
    >>> model[1].num_batches_tracked.item()
    0
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PerChannel):
                stack.enter_context(module.recomputing())
        yield
