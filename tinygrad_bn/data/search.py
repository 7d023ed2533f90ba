"""The search for a data set's files: folders, then mirrors, then the distribution's package.

Every file is found by itself, so that what an interrupted download left complete is kept; that is
safe, because nothing is taken without the right hash.
"""

from __future__ import annotations

import http.client
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinygrad_bn.data import apt, files, web
from tinygrad_bn.data.errors import DatasetCorruptError, DatasetNotFoundError

_FAILURES = (DatasetCorruptError, OSError, http.client.HTTPException)


class Search:
    """What was found so far, and which places could not give what.

    wanted: file name -> SHA-256 of its payload.
    found: file name -> payload. tried: (place, reason) pairs.
    """

    def __init__(self, wanted: Mapping[str, str]) -> None:
        self.wanted = dict(wanted)
        self.found: dict[str, bytes] = {}
        self.tried: list[tuple[str, str]] = []

    @property
    def missing(self) -> list[str]:
        """The names of the files that are still wanted."""
        return [name for name in self.wanted if name not in self.found]

    def in_folder(self, folder: Path, *, strict: bool = False) -> None:
        """Take what is missing from `folder`.

        A file there that is wrong or unreadable is passed over with a warning; with `strict`,
        because the user named this very folder, it is an error.
        """
        if not folder.is_dir():
            self.tried.append((str(folder), "no such folder"))
            return
        absent = []
        for name in self.missing:
            try:
                payload = files.find(folder, name, self.wanted[name])
            except (DatasetCorruptError, OSError) as error:
                if strict:
                    raise
                self.tried.append((str(folder), str(error)))
                warnings.warn(f"ignored a file: {error}", stacklevel=2)
                continue
            if payload is None:
                absent.append(name)
            else:
                self.found[name] = payload
        if absent:
            self.tried.append((str(folder), f"has no {', '.join(absent)} (nor .gz)"))

    def online(self, mirrors: Sequence[str], package: str, folders: Sequence[Path]) -> None:
        """Fetch what is missing and keep it in the first of `folders` that can be written."""
        keep = files.first_writable(folders)
        with tempfile.TemporaryDirectory(prefix="tinygrad_bn-") as scratch:
            if keep is None:
                places = ", ".join(map(str, folders))
                warnings.warn(f"cannot write to {places}: not keeping the data set", stacklevel=2)
                keep = Path(scratch)
            for mirror in mirrors:
                self._from_mirror(mirror, keep)
            if self.missing:
                self._from_package(package, keep, Path(scratch))

    def _from_mirror(self, mirror: str, keep: Path) -> None:
        """Fetch what is missing from `mirror` until it fails once: it would fail us again."""
        for name in self.missing:
            url = f"{mirror}{name}.gz"
            try:
                self.found[name] = files.store(keep, name, self.wanted[name], web.chunks(url), url)
            except _FAILURES as error:
                self.tried.append((url, web.reason(error)))
                return

    def _from_package(self, package: str, keep: Path, scratch: Path) -> None:
        """Fetch what is missing out of the distribution's package."""
        place = f"distribution package {package}"
        try:
            unpacked = apt.unpack(package, scratch)
            for name in self.missing:
                path = next((p for p in unpacked.rglob(f"{name}*") if p.is_file()), None)
                if path is None:
                    raise FileNotFoundError(f"it holds no {name}")
                source = f"{path.name} of {place}"
                raw = path.read_bytes()
                self.found[name] = files.store(keep, name, self.wanted[name], [raw], source)
        except _FAILURES as error:
            self.tried.append((place, str(error)))

    def result(self, title: str, advice: str) -> dict[str, bytes]:
        """Return all payloads; raise DatasetNotFoundError with everything tried if one is missing.

        title: how the message begins; advice: how it ends.
        """
        if not self.missing:
            return self.found
        tried = "\n".join(f"  - {place}: {reason}" for place, reason in self.tried)
        raise DatasetNotFoundError(
            f"{title} could not obtain {', '.join(self.missing)}.\nTried, in this order:\n{tried}\n"
            f"What to do:\n{advice}",
            self.tried,
        )
