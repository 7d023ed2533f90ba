"""Where a user's files belong that can be made again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Return `tinygrad_bn` in the user's folder for caches; it need not exist.

    That folder is `XDG_CACHE_HOME` where it is set, else what the platform's custom is.

    >>> cache_folder({"XDG_CACHE_HOME": "/var/caches"}).as_posix()
    '/var/caches/tinygrad_bn'
    """
    xdg = environ.get("XDG_CACHE_HOME", "")
    if Path(xdg).is_absolute():  # the XDG specification: ignore relative paths
        return Path(xdg) / "tinygrad_bn"
    home = Path(os.path.expanduser("~"))  # Path.home() raises where there is no home
    if platform == "darwin":
        return home / "Library" / "Caches" / "tinygrad_bn"
    if platform == "win32":
        local = environ.get("LOCALAPPDATA")
        return (Path(local) if local else home / "AppData" / "Local") / "tinygrad_bn" / "Cache"
    return home / ".cache" / "tinygrad_bn"
