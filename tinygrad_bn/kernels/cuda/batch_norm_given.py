"""Batch norm with given statistics on a GPU: launches of `batch_norm.cu`."""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.cuda.batch_norm import (
    AFFINE,
    GRADIENT,
    given,
    parameters_served,
    present,
)
from tinygrad_bn.kernels.cuda.channel_tiles import tiles_for, view_of
from tinygrad_bn.kernels.layout import Axes


def forward(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *, axis: Axes, eps: float
) -> Any:
    """Return what `ops.batch_norm.batch_norm_given` returns, or NotImplemented."""
    view = view_of(x, axis, 1)
    if view is None or not parameters_served(mean, var, weight, bias):
        return NotImplemented
    with launch.on_device_of(x):
        laid, out = view.lay(x), view.empty(x)
        tiles = tiles_for(view, (laid, out))
        if tiles is None:
            return NotImplemented
        tiles.launch_apply(
            "forward_apply",
            2,
            AFFINE,
            *(laid, None, out, None),
            *given(mean),
            *given(var),
            *given(weight),
            *given(bias),
            *(None, None, None),
            float(eps),
        )
    return view.back(out)


def vjp(
    g: Any,
    x: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    axis: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.batch_norm.batch_norm_given` returns, or NotImplemented."""
    view = view_of(x, axis, 1)
    if view is None or not parameters_served(mean, var, weight, bias) or g.dtype != x.dtype:
        return NotImplemented
    xp = array_module(x)
    shape = tuple(x.shape[a] for a in axis)
    # `needs` ends with the last input that was given.
    needs = (*needs, False, False)[:5]
    with launch.on_device_of(x):
        eps, laid, laid_g = float(eps), view.lay(x), view.lay(g)
        gx = view.empty(x) if needs[0] else None
        tiles = tiles_for(view, present((laid, laid_g, gx)))
        if tiles is None:
            return NotImplemented
        gmean, gvar, gweight, gbias = (xp.empty(shape, "float64") if n else None for n in needs[1:])
        statistics = (*given(mean), *given(var), *given(weight), *given(bias))
        inputs = (laid_g, laid, None)
        sums, partials = tiles.backward_sums, None
        if any(needs[1:]):
            partials = tiles.partials(x, sums)
            tiles.launch_sums(
                "backward_sums", sums, *inputs, partials, *statistics, None, float(eps)
            )
        tiles.launch_apply(
            "backward_apply",
            sums,
            GRADIENT,
            *inputs,
            *(gx, partials),
            *statistics,
            *given(gweight),
            *given(gbias),
            *(gmean, gvar, 1),
            *(None, None, eps),
        )
    return None if gx is None else view.back(gx), gmean, gvar, gweight, gbias
