"""Running statistics on a GPU, moved by one launch where array operations take thirteen.

Batch norm's functional face asks for this by family, as ops ask for their kernels.
"""

from __future__ import annotations

from typing import Any

from tinygrad_bn.backend import largest
from tinygrad_bn.kernels.cuda import launch

THREADS = 128


def move(
    mean: Any,
    var: Any,
    running_mean: Any,
    running_var: Any,
    momentum: Any,
    *,
    factor: float,
    groups: int,
) -> bool:
    """Return whether this kernel serves, after moving the running statistics in place.

    mean, var: of each group and channel, in any shape. running_mean, running_var: of each channel,
        in the same order. momentum: weight of the new values, a number or an array of one.
    factor: what the variance is multiplied by.
    """
    statistics, running = (mean, var), (running_mean, running_var)
    arrays = (*statistics, *running)
    if not all(array.flags.c_contiguous for array in arrays):
        return False
    if any(a.dtype.name != "float64" or a.size != groups * running_mean.size for a in statistics):
        return False
    if any(a.dtype.name not in launch.KINDS or a.size != running_mean.size for a in running):
        return False
    if isinstance(momentum, (int, float)):
        by = None, 0, float(momentum)
    elif momentum.size == 1 and momentum.dtype.name in launch.KINDS:
        by = momentum, launch.KINDS[momentum.dtype.name], 0.0
    else:
        return False
    channels = running_mean.size
    if channels:
        with launch.on_device_of(mean):
            program = launch.program("running_statistics.cu", THREADS=THREADS)
            to = [(a, launch.KINDS[a.dtype.name], largest(a.dtype)) for a in running]
            numbers = (*by, float(factor), groups, channels)
            blocks = -(-channels // THREADS)
            program.launch(
                "move_statistics", blocks, THREADS, 0, mean, var, *to[0], *to[1], *numbers
            )
    return True
