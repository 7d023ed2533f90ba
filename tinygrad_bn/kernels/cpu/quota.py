"""How much processor time the control groups of this process allow it (Linux).

A container on a machine of 64 processors is often given the time of two. Its threads see 64 all the
same, and with so many they would spend each period's allowance at once and then stand still.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_quota(
    root: str | Path = "/sys/fs/cgroup", membership: str | Path = "/proc/self/cgroup"
) -> float | None:
    """Return how many processors' time this process may use, or None for no limit.

    root: where control groups are mounted.
    membership: the file that names the groups this process is in.

    The smallest limit counts of the group's own and those above it.
    """
    limits = [_limit(folder) for folder in _groups(Path(root), Path(membership))]
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of the groups that limit processor time, upwards from each."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "<number>:<controllers>:<path>"; version 2 has number 0 and names none
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mounts = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [root / controllers, root / "cpu"]
        else:
            continue
        # In a container the path may be the host's, which is not to be seen from inside; the
        # container's own group is the root then.
        inside = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            yield from (mount / group for group in (inside, *inside.parents))


def _limit(folder: Path) -> float | None:
    """Return the limit of one group, or None if it has none."""
    try:
        text = (folder / "cpu.max").read_text()  # "<microseconds or max> <period>"
    except OSError:
        try:  # version 1, where -1 is no limit
            text = " ".join(
                (folder / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
        except OSError:
            return None
    match text.split():
        case [used, period] if used.isdecimal() and period.isdecimal() and int(period):
            return int(used) / int(period)
    return None
