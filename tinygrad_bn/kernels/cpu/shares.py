"""What a mask makes of the values of a tensor: the part that each has in its channel's mean."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
Axes = tuple[int, ...]


def shares_of(
    mask: Array, shape: Axes, axis: Axes, order: Axes, groups: int
) -> tuple[Array, Array] | None:
    """Return p, (groups, positions) in memory's order, and how many values count, Σ w, per group.

    mask: w, how often each value counts, as in `ops.batch_norm.batch_norm`.
    shape, axis, order: of x, its channel axes, and the order of its axes in memory.

    p = w / Σ w in float64, and 0 for what does not count: a group with fewer than two values that
    do has neither mean nor variance. None where float64 cannot hold a share or the sum.
    """
    sizes = tuple(1 if i in axis else size for i, size in enumerate(shape))
    often = np.broadcast_to(mask, sizes).transpose(order)
    # In C order, since the loops walk along each group; a copy would keep that of the mask.
    often = often.astype(np.float64, order="C").reshape(groups, -1)
    counts = often > 0
    counts[counts.sum(axis=1) < 2] = False
    often[~counts] = 0
    with np.errstate(all="ignore"):
        total = often.sum(axis=1)
        share = often / np.where(total > 0, total, 1)[:, None]
    if not np.isfinite(total).all() or (share > 0).sum() != counts.sum():
        return None
    return share, total
