"""Files out of a distribution package of Debian or Ubuntu, without root and without installing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SECONDS = 600  # for 31 MB on a slow line; a silent one is given up on by the timeouts below
_TIMEOUTS = [
    f"-oAcquire::{setting}"
    for setting in ("Retries=0", "http::Timeout=6", "https::Timeout=6", "ftp::Timeout=6")
]


def unpack(package: str, into: Path) -> Path:
    """Return a folder below `into` that holds the files of `package`, as they would be installed.

    Raises OSError saying why not: no apt, no such package, no network.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not on this machine")
    downloaded, unpacked = into / "downloaded", into / "unpacked"
    downloaded.mkdir()
    _call(["apt-get", *_TIMEOUTS, "download", package], downloaded, package)
    archive = next(downloaded.glob("*.deb"), None)
    if archive is None:
        raise FileNotFoundError(f"apt-get download left no .deb of {package}")
    _call(["dpkg-deb", "-x", str(archive), str(unpacked)], into, package)
    return unpacked


def _call(command: list[str], folder: Path, package: str) -> None:
    """Run `command` in `folder`; raise OSError with its last line of complaint if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},  # we look for a phrase in what it says
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]} did not finish within {SECONDS} s") from None
    if done.returncode == 0:
        return
    if "Unable to locate package" in done.stderr or "no candidate" in done.stderr:
        raise FileNotFoundError(
            f"apt knows no package {package}; its package lists may be missing "
            "(`sudo apt-get update` fetches them)"
        )
    complaint = done.stderr.strip().splitlines() or ["no message"]
    raise OSError(f"{command[0]} failed with code {done.returncode}: {complaint[-1]}")
