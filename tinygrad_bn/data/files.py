"""Files whose contents are known beforehand by a SHA-256: read, checked, stored without a trace.

The hash is that of the *decompressed* contents, the payload: mirrors and distributions compress
anew, so the hash of a `.gz` would differ from place to place.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import sys
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tinygrad_bn.backend.folders import cache_folder
from tinygrad_bn.data.errors import DatasetCorruptError

LARGEST = 1 << 26  # bytes; a wrong answer, or a gzip bomb, is given up on beyond this
_GZIP_MAGIC = b"\x1f\x8b"
_PART = ".part"  # ends the name of a file that is still being written


def cache_directory(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Return the folder below which data sets are kept; it need not exist.

    `TINYGRAD_BN_DATA` names it outright. Otherwise it is `tinygrad_bn` in the user's folder for
    caches: `XDG_CACHE_HOME` where that is set, else what the platform's custom is.

    >>> print(cache_directory({"TINYGRAD_BN_DATA": "datasets"}))
    datasets
    """
    if environ.get("TINYGRAD_BN_DATA"):
        return Path(environ["TINYGRAD_BN_DATA"]).expanduser()
    return cache_folder(environ, platform)


def verified(raw: bytes, sha256: str, source: str) -> bytes:
    """Return the payload of `raw` (gzip, told by its first bytes, or plain) if its hash is right.

    source: the file or address that `raw` came from, for the message.

    Raises DatasetCorruptError naming the source, what came and what was expected.
    """
    payload, damage = raw, ""
    if raw.startswith(_GZIP_MAGIC):
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                payload = file.read(LARGEST + 1)
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile is an OSError
            damage = f"is a damaged or truncated gzip file ({error}); as it stands, it"
    came = hashlib.sha256(payload).hexdigest()
    if came != sha256:
        raise DatasetCorruptError(
            f"{source} {damage or 'holds the wrong data; it'} has SHA-256 {came} "
            f"({len(payload):,} bytes). Expected, once decompressed: SHA-256 {sha256}. "
            "It must be fetched again."
        )
    return payload


def find(folder: Path, name: str, sha256: str) -> bytes | None:
    """Return the payload of `name`, plain or `.gz`, in `folder`; None where there is neither.

    A wrong file beside a right one is warned of and passed over. Raises DatasetCorruptError or
    OSError where there is a file, but none that can be used.
    """
    wrong: list[Exception] = []
    payload = None
    for path in (folder / name, folder / f"{name}.gz"):
        if payload is None and path.is_file():
            try:
                with path.open("rb") as file:
                    payload = verified(file.read(LARGEST + 1), sha256, str(path))
            except (DatasetCorruptError, OSError) as error:
                wrong.append(error)
    if payload is None and wrong:
        raise wrong[0]
    for error in wrong:
        warnings.warn(f"ignored a file: {error}", stacklevel=2)
    return payload


def store(folder: Path, name: str, sha256: str, chunks: Iterable[bytes], source: str) -> bytes:
    """Return the verified payload that `chunks` bring, having made a file of `folder` of it.

    The bytes go to a hidden temporary file there, which is renamed once its hash is right and
    removed otherwise. Raises DatasetCorruptError, and whatever `chunks` and the disk raise.
    """
    part = folder / f".{name}.{os.urandom(6).hex()}{_PART}"
    try:
        with part.open("x+b") as file:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                _lock(file.fileno())
            for chunk in chunks:
                file.write(chunk)
                if file.tell() > LARGEST:
                    raise DatasetCorruptError(f"{source} is larger than {LARGEST:,} bytes")
            file.seek(0)
            raw = file.read()
        payload = verified(raw, sha256, source)
        _keep(part, folder / name, packed=raw.startswith(_GZIP_MAGIC))
        return payload
    finally:
        part.unlink(missing_ok=True)


def _keep(part: Path, plain: Path, *, packed: bool) -> None:
    """Give a verified temporary file its name. Not a matter of life and death: we hold its data."""
    try:
        part.replace(plain.with_name(f"{plain.name}.gz") if packed else plain)
        if packed:  # what else stands under this name is wrong, or nothing had to be fetched
            plain.unlink(missing_ok=True)
    except OSError as error:  # on Windows: another process has the old file open
        warnings.warn(f"could not keep {plain.name} in {plain.parent}: {error}", stacklevel=2)


def first_writable(folders: Iterable[Path]) -> Path | None:
    """Return the first of `folders` that files can be made in, creating it; None if there is none.

    Leftovers of processes that died while writing are swept out of it.
    """
    for folder in folders:
        probe = folder / f".probe.{os.urandom(6).hex()}{_PART}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch(exist_ok=False)  # the permission bits alone would not tell
            probe.unlink(missing_ok=True)
        except OSError:
            continue
        _sweep(folder)
        return folder
    return None


def _sweep(folder: Path) -> None:
    """Remove temporary files whose writers are gone; a living writer holds a lock on its own."""
    for part in folder.glob(f".*{_PART}"):
        try:
            with part.open("rb") as file:
                _lock(file.fileno())
            part.unlink()
        except OSError:  # in use (Windows refuses to remove an open file), or already gone
            continue


def _lock(descriptor: int) -> None:
    """Take the file's lock, which the system drops when its holder dies; OSError if it is taken."""
    try:
        import fcntl
    except ImportError:  # Windows needs no lock: an open file cannot be removed there
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
