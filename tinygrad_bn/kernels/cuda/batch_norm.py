"""Batch norm on a GPU: arguments of the op made into launches.

One launch of `batch_norm_teams.cu` where that serves, which is whatever has no mask and whose rows
or runs are whole vectors; two of `batch_norm.cu` otherwise. Statistics stay on the device; nothing
here waits for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tinygrad_bn.backend import array_module, saving
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.cuda.channel_teams import teams_for
from tinygrad_bn.kernels.cuda.channel_tiles import View, tiles_for, view_of
from tinygrad_bn.kernels.layout import Axes

#: Numbers that the kernels keep for each channel: `Affine`, and with `Gradient`.
AFFINE, GRADIENT = 4, 7


def forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    mask: Any = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
) -> Any:
    """Return what `ops.batch_norm.batch_norm` returns, or NotImplemented."""
    return normalized(x, weight, bias, mask, axis=axis, eps=eps, groups=groups)


def normalized(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    mask: Any = None,
    residual: Any = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
    relu: bool = False,
) -> Any:
    """Return batch norm with its residuals; with `relu`, max(batch norm + residual, 0).

    residual: of x's shape and dtype, or None. Returns NotImplemented for what the kernels do not
    serve.
    """
    view = view_of(x, axis, groups)
    if view is None or not parameters_served(weight, bias) or not _like(x, residual):
        return NotImplemented
    xp = array_module(x)
    with launch.on_device_of(x):
        laid, laid_residual = view.lay(x), None if residual is None else view.lay(residual)
        out = view.empty(x)
        mean, var = (xp.empty(view.kept, "float64") for _ in range(2))
        tensors = (laid, laid_residual, out)
        statistics = (mean, var, *given(weight), *given(bias), float(eps))
        count = view.values
        if mask is not None or not _forward_by_teams(view, tensors, statistics, relu):
            places = Mask.of(mask, view)
            count = count if mask is None else places.count
            if not _forward_in_two(view, tensors, statistics, places, relu):
                return NotImplemented
    return saving(view.back(out), mean=mean, var=var, count=count)


def _forward_by_teams(view: View, tensors: Any, statistics: Any, relu: bool) -> bool:
    """Fill `out`, the last of `tensors`, and mean and var; return whether that is possible."""
    arrays = present(tensors)
    teams = teams_for("forward_teams", view, arrays, relu, 1, AFFINE)
    if teams is not None:
        teams.launch("forward_teams", arrays[0], tensors, statistics)
    return teams is not None


def _forward_in_two(view: View, tensors: Any, statistics: Any, places: Mask, relu: bool) -> bool:
    """Do the same in two launches, for any tensor, with or without a mask."""
    arrays = present(tensors)
    tiles = tiles_for(view, arrays, places.frequency is not None, relu)
    if tiles is None:
        return False
    mean, var, *parameters, eps = statistics
    partials = tiles.partials(arrays[0], 2)
    tiles.launch_sums("forward_sums", 2, arrays[0], *places.kernel, partials)
    vectors = (*given(mean), *given(var), *parameters)
    tiles.launch_apply(
        "forward_apply", 2, AFFINE, *tensors, partials, *vectors, *places.kernel, eps
    )
    return True


def vjp(
    g: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    mean: Any,
    var: Any,
    axis: Axes,
    eps: float,
    groups: int,
    needs: tuple[bool, ...],
) -> Any:
    """Return what the rule of `ops.batch_norm.batch_norm` returns, or NotImplemented."""
    grads = gradients(
        g, x, weight, bias, mask, mean, var, axis=axis, eps=eps, groups=groups, needs=needs
    )
    return grads if grads is NotImplemented else (*grads[:3], None)[: len(needs)]


def gradients(
    g: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    mean: Any,
    var: Any,
    out: Any = None,
    *,
    axis: Axes,
    eps: float,
    groups: int = 1,
    needs: tuple[bool, ...],
    relu: bool = False,
) -> Any:
    """Return the cotangents of x, weight and bias, None for what `needs` leaves out.

    g: the cotangent of what `normalized` returned. out: that itself, if it had a residual and relu.
    """
    view = view_of(x, axis, groups)
    if view is None or not parameters_served(weight, bias) or not (_like(x, g) and _like(x, out)):
        return NotImplemented
    xp = array_module(x)
    with launch.on_device_of(x):
        laid, laid_g, laid_out = (None if a is None else view.lay(a) for a in (x, g, out))
        gx = view.empty(x) if needs[0] else None
        shape = tuple(x.shape[a] for a in axis)
        per_group = shape if groups == 1 else (groups, *shape)
        # Groups are added up in float64; a single one is rounded at once.
        gweight, gbias = (
            xp.empty(per_group, "float64" if p is None or groups > 1 else p.dtype) if need else None
            for p, need in zip((weight, bias), (*needs[1:3], False, False)[:2], strict=True)
        )
        tensors = (laid_g, laid, laid_out, gx)
        given_vectors = (mean, var, weight, bias)
        to = (*given(gweight), *given(gbias))
        options = {"eps": float(eps), "relu": relu}
        if not (
            (mask is None and _backward_by_teams(view, tensors, given_vectors, to, **options))
            or _backward_in_two(view, tensors, given_vectors, to, Mask.of(mask, view), **options)
        ):
            return NotImplemented
        if groups > 1:
            gweight, gbias = (None if s is None else s.sum(axis=0) for s in (gweight, gbias))
    return None if gx is None else view.back(gx), gweight, gbias


def _backward_by_teams(
    view: View, tensors: Any, vectors: Any, to: Any, eps: float, relu: bool
) -> bool:
    """Fill gx, the last of `tensors`, and the vectors in `to`; return whether that is possible."""
    mean, var, weight, bias = vectors
    if tensors[-1] is None:  # nothing to keep it on the chip for
        return False
    if mean.dtype.name != "float64" or var.dtype.name != "float64":  # which the kernel does not ask
        return False
    arrays = present(tensors)
    teams = teams_for("backward_teams", view, arrays, relu, 2, GRADIENT)
    if teams is not None:
        statistics = (mean, var, *given(weight), *given(bias))
        teams.launch("backward_teams", arrays[0], tensors, (*statistics, *to, eps))
    return teams is not None


def _backward_in_two(
    view: View, tensors: Any, vectors: Any, to: Any, places: Mask, eps: float, relu: bool
) -> bool:
    """Do the same in two launches, for any tensor, with or without a mask."""
    arrays = present(tensors)
    tiles = tiles_for(view, arrays, places.frequency is not None, relu)
    if tiles is None:
        return False
    sums = tiles.backward_sums
    partials = tiles.partials(arrays[0], sums)
    *inputs, gx = tensors
    statistics = [part for vector in vectors for part in given(vector)]
    tiles.launch_sums("backward_sums", sums, *inputs, partials, *statistics, places.frequency, eps)
    tiles.launch_apply(
        "backward_apply",
        sums,
        GRADIENT,
        *(*inputs, gx, partials),
        *statistics,
        *to,
        *(None, None, 0),
        *(places.frequency, places.total, eps),
    )
    return True


class Mask(NamedTuple):
    """Where values count, as the kernels take it: `Mask` in batch_norm.cu. None for everywhere.

    frequency: (groups, rows · inner), 0 in a group that has fewer than two places that count.
    total: (groups,), the sums. example: (groups,), a place that counts in each group.
    count: the totals in the shape of the op's residual.
    """

    frequency: Any = None
    total: Any = None
    example: Any = None
    count: Any = None

    @property
    def kernel(self) -> tuple[Any, Any, Any]:
        """What the kernels of the forward pass take."""
        return self.frequency, self.total, self.example

    @staticmethod
    def of(mask: Any, view: View) -> Mask:
        """Return the frequencies of a mask of x's rank, which is 1 along the channel axes."""
        if mask is None:
            return Mask()
        xp = array_module(mask)
        kept = view.kept if view.groups == 1 else view.kept[1:]
        whole = tuple(1 if k != 1 else n for k, n in zip(kept, view.shape, strict=True))
        # Where the one channel axis has size 1, so has the mask; then both read 1 here.
        spread = xp.broadcast_to(mask.astype("float64"), whole).transpose(view.order)
        frequency = xp.ascontiguousarray(spread).reshape(view.groups, view.values)
        counts = frequency > 0
        enough = counts.sum(axis=1, keepdims=True) >= 2
        frequency = xp.where(counts & enough, frequency, 0.0)
        total = frequency.sum(axis=1)
        example = counts.argmax(axis=1).astype("int64")
        ones = (1,) * len(view.shape)
        count = total.reshape(ones if view.groups == 1 else (view.groups, *ones))
        return Mask(frequency, total, example, count)


def given(array: Any) -> tuple[Any, int]:
    """Return what a kernel takes for a vector of parameters: where it is and its dtype, by number.

    A vector with gaps is copied; None is left out.
    """
    if array is None:
        return None, 0
    return array_module(array).ascontiguousarray(array), launch.KINDS[array.dtype.name]


def present(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arrays that are there."""
    return tuple(a for a in arrays if a is not None)


def parameters_served(*vectors: Any) -> bool:
    """Return whether the kernels can read vectors of these dtypes."""
    return all(v is None or v.dtype.name in launch.KINDS for v in vectors)


def _like(x: Any, other: Any) -> bool:
    return other is None or (other.dtype == x.dtype and other.shape == x.shape)
