"""What a timing was taken on: without it, the number says nothing."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401  (before tinygrad_bn)
import numpy as np

import tinygrad_bn as tg
from tinygrad_bn.kernels.cpu.threads import available_cpus

LIBRARIES = ("numpy", "numba", "threadpoolctl", "torch", "jax", "flax", "keras", "mygrad")


def describe(threads: int) -> dict[str, Any]:
    """Return the machine, the versions of everything that matters, and the date."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": available_cpus(),
        "threads": threads,
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "tinygrad_bn": tg.__version__,
        "kernels": _kernel_families(),
        **{name: version for name in LIBRARIES if (version := _version(name))},
        "blas": _blas(),
    }


def installed(library: str) -> bool:
    """Return whether a library is there to be measured beside us."""
    return _version(library) is not None


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the model of the CPU and the widest vector unit that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = facts.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), "")
    return " ".join(filter(None, (facts.get("model name", platform.machine()), vectors)))


def _load() -> float:
    """Return the load average over the last minute: well above 0, and others are at work."""
    try:
        return round(os.getloadavg()[0], 1)
    except (AttributeError, OSError):  # not on this system
        return float("nan")


def _kernel_families() -> str:
    """Return the families that may serve an op here."""
    families = {
        family
        for op in tg.kernel_status().values()
        for family, status in op.items()
        if status == "usable"
    }
    return " ".join(sorted(families)) or "generic"


def _blas() -> str:
    """Return the name and version of the library behind NumPy's matrix products."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # pyrefly: ignore
    return f"{blas.get('name')} {blas.get('version')}"
