"""How a tensor is cut into tiles of channels for the batch norm kernels; see batch_norm.cuh.

A tensor is seen as (groups, rows, channels, inner), in the order in which it lies in memory.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.layout import Axes, inverse, memory_order

# Threads of a block.
THREADS = 256
# Channels whose runs of elements are at least so long are walked along, shorter ones across: whole
# transactions of 128 bytes, and not too much lost where a run begins or ends within one.
LONG_RUN = 256
# A row of a tile is about so many vectors: 512 bytes, read by one warp at once.
WIDTH = 32
# Blocks a multiprocessor gets in a launch: two or more rounds, so that they end about together.
BLOCKS_PER_MULTIPROCESSOR = 8
# Vectors a block should have at least: with fewer, starting and summing outweigh them.
VECTORS_PER_BLOCK = 1024
# What kernels count in 32 bits: blocks, channels, the elements of a run.
MOST = 2**31 - 1


class View(NamedTuple):
    """A tensor as (groups, rows, channels, inner).

    order: of its axes in memory. shape: of the tensor.
    kept: the shape of statistics, as the generic form has them.
    """

    order: Axes
    shape: tuple[int, ...]
    groups: int
    rows: int
    channels: int
    inner: int
    kept: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many values share a mean."""
        return self.rows * self.inner

    def lay(self, array: Any) -> Any:
        """Return an array of the tensor's shape, contiguous in this order; copied if it is not."""
        xp = array_module(array)
        return xp.ascontiguousarray(array.transpose(self.order))

    def empty(self, like: Any) -> Any:
        """Return an uninitialised array as `lay` would give it."""
        xp = array_module(like)
        return xp.empty(tuple(self.shape[i] for i in self.order), like.dtype)

    def back(self, laid: Any) -> Any:
        """Return what `lay` gave, or an array like it, with its axes as they were."""
        return laid.transpose(inverse(self.order))


def view_of(x: Any, axis: Axes, groups: int) -> View | None:
    """Return how x is seen; None for what is left to the generic form.

    That is another dtype, no elements, channel axes that lie apart, and groups of an axis that is
    not the outermost in memory. An x with gaps is seen as it would be without them, in C order.
    """
    if x.dtype.name not in launch.ELEMENTS or x.size == 0:
        return None
    order = memory_order(x, axis)
    if order is None:
        if axis != tuple(range(axis[0], axis[-1] + 1)):
            return None
        order = tuple(range(x.ndim))
    if groups != 1 and order[0] != 0:
        return None
    sizes = [x.shape[i] for i in order]
    first = order.index(axis[0])
    last = first + len(axis)
    channels, run = math.prod(sizes[first:last]), math.prod(sizes[last:])
    if max(groups, channels, run) > MOST:
        return None
    kept = tuple(n if i in axis else 1 for i, n in enumerate(x.shape))
    rows = math.prod(sizes[:first]) // groups
    kept = kept if groups == 1 else (groups, *kept)
    return View(order, x.shape, groups, rows, channels, run, kept)


class Loads(NamedTuple):
    """How the elements of a tensor are reached.

    vector: how many a load brings. columns: whether threads go down columns, or along runs.
    step: how many channels fill whole vectors; a tile has a multiple of it, or all channels.
    """

    vector: int
    columns: bool
    step: int

    def tile(self, view: View, width: int) -> int:
        """Return how many channels make a tile whose rows have about `width` vectors."""
        if not self.columns:
            return 1
        of_step = self.step * view.inner
        return min(view.channels, self.step * -(-width * self.vector // of_step))


def loads_for(view: View, arrays: tuple[Any, ...], masked: bool = False) -> Loads:
    """Return how to reach `arrays`, all laid as `view` says.

    Loads have 16 bytes (or four elements, where a thread keeps sums for each) where every array
    begins at a multiple of that, and where runs (or rows) of a channel do; else, and with a mask,
    one element.
    """
    size = arrays[0].dtype.itemsize
    columns = view.inner * size < LONG_RUN
    wide = min(16 // size, 4) if columns else 16 // size
    together = view.channels * view.inner if columns else view.inner
    aligned = launch.alignment(*arrays) >= wide * size and together % wide == 0
    vector = wide if aligned and not masked else 1
    return Loads(vector, columns, vector // math.gcd(vector, view.inner))


def program_for(file: str, dtype: Any, loads: Loads, relu: bool, threads: int) -> launch.Program:
    """Return the kernels of `file` for elements of `dtype`."""
    return launch.program(
        file,
        ELEMENT=launch.ELEMENTS[dtype.name],
        VECTOR=loads.vector,
        COLUMNS=int(loads.columns),
        RELU=int(relu),
        THREADS=threads,
    )


class Tiles(NamedTuple):
    """How two launches share out a tensor: which program, how large tiles, how many blocks.

    tile: channels of a tile. members: blocks of a team, which share one.
    """

    view: View
    program: launch.Program
    loads: Loads
    tile: int
    members: int
    real_bytes: int

    @property
    def backward_sums(self) -> int:
        """How many sums the backward pass has: one more where there may be a mask."""
        return 3 if self.loads.vector == 1 else 2

    @property
    def blocks(self) -> int:
        """How many blocks a launch has."""
        return self.view.groups * -(-self.view.channels // self.tile) * self.members

    def partials(self, like: Any, sums: int) -> Any:
        """Return room for the partial sums that every block leaves, on the device of `like`."""
        return array_module(like).empty((self.blocks * self.tile * sums,), "float64")

    def launch_sums(self, name: str, sums: int, *arguments: Any) -> None:
        """Start a kernel that leaves `sums` sums of each block and channel."""
        lanes = self.loads.vector if self.loads.columns else 1
        self._launch(name, 8 * THREADS * lanes * sums, arguments)

    def launch_apply(self, name: str, sums: int, coefficients: int, *arguments: Any) -> None:
        """Start a kernel that reads them, and has so many coefficients for each channel."""
        shared = 8 * THREADS * sums + self.real_bytes * self.tile * coefficients
        self._launch(name, shared, arguments)

    def _launch(self, name: str, shared: int, arguments: tuple[Any, ...]) -> None:
        view = self.view
        sizes = (view.rows, view.channels, view.inner, self.tile, self.members)
        self.program.launch(name, self.blocks, THREADS, shared, *arguments, *sizes)


def tiles_for(
    view: View,
    arrays: tuple[Any, ...],
    masked: bool = False,
    relu: bool = False,
    program: launch.Program | None = None,
) -> Tiles | None:
    """Return how to share out `arrays` in two launches; None if there are too many tiles.

    program: whose kernels are to be launched, if not those of batch_norm.cu.
    """
    dtype = arrays[0].dtype
    loads = loads_for(view, arrays, masked)
    tile = loads.tile(view, WIDTH)
    program = program or program_for("batch_norm.cu", dtype, loads, relu, THREADS)
    teams = view.groups * -(-view.channels // tile)
    most = max(1, view.values * tile // loads.vector // VECTORS_PER_BLOCK)
    if loads.columns:
        most = min(most, view.rows)
    wanted = BLOCKS_PER_MULTIPROCESSOR * program.device.multiprocessors
    members = max(1, min(most, -(-wanted // teams)))
    if teams * members > MOST:
        return None
    return Tiles(view, program, loads, tile, members, real_bytes(dtype))


def real_bytes(dtype: Any) -> int:
    """Return the size of what arithmetic on elements of `dtype` is done in."""
    return max(4, dtype.itemsize)
