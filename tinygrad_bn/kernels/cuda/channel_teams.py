"""How one launch shares out a tensor among teams of blocks that keep their tiles on the chip.

See batch_norm_teams.cu for the kernels. What is planned here is how many channels a tile has and
how many blocks a team, so that the busiest block has least to do.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from tinygrad_bn.backend import array_module
from tinygrad_bn.kernels.cuda import launch
from tinygrad_bn.kernels.cuda.channel_tiles import (
    MOST,
    Loads,
    View,
    loads_for,
    program_for,
    real_bytes,
)

# Threads of a block, and blocks that a multiprocessor holds, or as many as it has registers for:
# they share its memory, less the part of each that is not theirs to use.
THREADS, RESIDENT, RESERVED = 128, 4, 1024
# What a round costs a block besides its elements, in vectors moved: a barrier and the sums are
# taken to need 2 µs, in which one of the 528 blocks of an H100 moves 11 KB.
ROUND = 700
# Widths of a tile that are tried, in vectors: a narrow one fits on the chip sooner, and a row of it
# is still whole sectors of 32 bytes.
WIDTHS = (8, 16, 32)


class Plan(NamedTuple):
    """How a launch is shared out.

    tile: channels of a tile. members: blocks of a team. teams: how many there are.
    kept: vectors that a thread keeps of each tensor.
    """

    tile: int
    members: int
    teams: int
    kept: int


class Job(NamedTuple):
    """What a kernel has to do, in numbers: what a plan depends on, besides the tensor.

    tensors: how many are read and kept. sums: for each channel. coefficients: likewise.
    bytes of a vector and of a coefficient.
    """

    tensors: int
    sums: int
    coefficients: int
    vector_bytes: int
    coefficient_bytes: int


@cache
def plan(view: View, loads: Loads, job: Job, shared: int, resident: int) -> Plan | None:
    """Return the plan whose busiest block moves least; None if none is possible.

    shared: bytes of shared memory that a block has. resident: blocks that run at once.
    """
    best: tuple[float, Plan] | None = None
    for tile in sorted({loads.tile(view, width) for width in WIDTHS}):
        lanes = loads.vector if loads.columns else 1
        left = shared - 8 * THREADS * lanes * job.sums
        left -= job.coefficient_bytes * job.coefficients * tile
        kept = left // (job.vector_bytes * job.tensors * THREADS)
        tiles = view.groups * -(-view.channels // tile)
        if kept < 0 or tiles * resident > MOST:
            continue
        vectors = view.values * tile // loads.vector
        width = tile * view.inner // loads.vector if loads.columns else 1
        if width > THREADS:
            continue
        room = kept * (THREADS // width * width)  # of a block; other threads have no column
        shareable = view.rows if loads.columns else -(-vectors // THREADS)
        for members in sorted({resident // teams for teams in range(1, min(tiles, resident) + 1)}):
            members = min(members, shareable)
            teams = min(tiles, resident // members)
            share = -(-vectors // members)
            again = max(0, share - room)
            moved = (job.tensors + 1) * share + job.tensors * again
            cost = -(-tiles // teams) * (moved + ROUND * (2 if loads.columns else 1))
            if best is None or cost < best[0]:
                best = cost, Plan(tile, members, teams, kept)
    return None if best is None else best[1]


class Teams(NamedTuple):
    """A plan for a tensor, and the program that carries it out."""

    view: View
    program: launch.Program
    loads: Loads
    plan: Plan
    job: Job
    shared: int

    def launch(self, name: str, like: Any, *arguments: Any) -> None:
        """Start a kernel, whose arguments are these arrays, scratch, and the numbers of the plan.

        The scratch is of the device of `like`: partial sums, coefficients, counters of arrivals.
        """
        xp, view, job = array_module(like), self.view, self.job
        tile, members, teams, kept = self.plan
        tiles = view.groups * -(-view.channels // tile)
        partials = xp.empty((tiles * members * tile * job.sums,), "float64")
        coefficients = None
        if self.loads.columns:
            size = tiles * tile * job.coefficients * job.coefficient_bytes
            coefficients = xp.empty((size,), "uint8")
        arrived = xp.zeros((teams,), "uint32")
        inputs, outputs = arguments
        numbers = (teams, tiles, kept, view.rows, view.channels, view.inner, tile, members)
        self.program.launch(
            name,
            teams * members,
            THREADS,
            self.shared,
            *inputs,
            *(partials, coefficients, arrived),
            *outputs,
            *numbers,
            cooperative=True,
        )


def teams_for(
    name: str, view: View, arrays: tuple[Any, ...], relu: bool, tensors: int, coefficients: int
) -> Teams | None:
    """Return how kernel `name` of batch_norm_teams.cu shares out `arrays`; None if it cannot.

    It cannot where blocks cannot be resident together, and elements that are loaded one by one are
    left to the two launches too.
    """
    dtype = arrays[0].dtype
    loads = loads_for(view, arrays)
    if loads.vector == 1:
        return None
    program = program_for("batch_norm_teams.cu", dtype, loads, relu, THREADS)
    device = program.device
    if not device.cooperative:
        return None
    job = Job(tensors, 2, coefficients, loads.vector * dtype.itemsize, real_bytes(dtype))
    each = min(RESIDENT, program.resident_blocks(name, THREADS, 0) // device.multiprocessors)
    if each == 0:
        return None
    shared = min(device.shared // each - RESERVED, device.shared_per_block) // 16 * 16
    resident = program.resident_blocks(name, THREADS, shared)
    found = plan(view, loads, job, shared, resident) if resident > 0 else None
    return None if found is None else Teams(view, program, loads, found, job, shared)
