"""A data set of a few kilobytes in Fashion-MNIST's form, and mirrors of it on this machine."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

# By import_module, because `tinygrad_bn.data.fashion_mnist` is the function.
fashion_mnist_module = importlib.import_module("tinygrad_bn.data.fashion_mnist")


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@dataclass
class Tiny:
    """arrays in the order of `fashion_mnist()`; payloads by file name; the cache folder."""

    arrays: tuple[np.ndarray, ...]
    payloads: dict[str, bytes]
    cache: Path
    tmp: Path

    @property
    def names(self) -> list[str]:
        return list(self.payloads)

    @property
    def hashes(self) -> dict[str, str]:
        return {n: hashlib.sha256(p).hexdigest() for n, p in self.payloads.items()}

    def fill(self, folder: Path, *, packed: bool = True) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, payload in self.payloads.items():
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(payload))
            else:
                (folder / name).write_bytes(payload)
        return folder

    def packed(self) -> dict[str, bytes]:
        """What a good mirror serves."""
        return {f"/{n}.gz": gzip.compress(p) for n, p in self.payloads.items()}

    def check(self, came: tuple[np.ndarray, ...]) -> None:
        assert len(came) == 4
        for array, expected in zip(came, self.arrays, strict=True):
            assert array.dtype == np.uint8
            np.testing.assert_array_equal(array, expected)

    def listing(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny data set in place of the real one; nothing of it exists yet, nothing is online."""
    rng = np.random.default_rng(0)
    arrays = (
        rng.integers(256, size=(80, 28, 28), dtype=np.uint8),
        rng.integers(10, size=80, dtype=np.uint8),
        rng.integers(256, size=(20, 28, 28), dtype=np.uint8),
        rng.integers(10, size=20, dtype=np.uint8),
    )
    payloads = dict(zip(fashion_mnist_module.FILES, map(idx, arrays), strict=True))
    tiny = Tiny(arrays, payloads, tmp_path / "cache" / "fashion-mnist", tmp_path)
    monkeypatch.setattr(fashion_mnist_module, "FILES", tiny.hashes)
    monkeypatch.setattr(fashion_mnist_module, "MIRRORS", ())
    monkeypatch.setattr(fashion_mnist_module, "SYSTEM_FOLDER", str(tmp_path / "system"))
    monkeypatch.setenv("TINYGRAD_BN_DATA", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no apt, unless a test puts one there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tiny


Answer = bytes | int | Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Mirror:
    """A server on this machine. answers: path -> body, status code, or what handles the request."""

    url: str
    answers: dict[str, Answer]
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, Answer]], Mirror]]:
    """Return a function that starts a mirror; all are stopped at the end."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, Answer]) -> Mirror:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                answer = mirror.answers.get(self.path, 404)
                if isinstance(answer, int):
                    self.send_error(answer)
                elif isinstance(answer, bytes):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                else:
                    answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda request, client_address: None  # clients that hang up
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        mirror = Mirror(f"http://127.0.0.1:{server.server_address[1]}/", answers)
        return mirror

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that names the mirrors `fashion_mnist` asks, in order."""

    def use(*urls: str) -> None:
        monkeypatch.setattr(fashion_mnist_module, "MIRRORS", urls)

    return use
