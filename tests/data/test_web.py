from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler

import pytest

from tinygrad_bn.data import web


def read(url: str) -> bytes:
    return b"".join(web.chunks(url))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


def test_a_body_comes_whole(serve: Callable) -> None:
    body = bytes(range(256)) * 2000
    assert read(serve({"/a": body}).url + "a") == body


def test_an_http_error_is_told_by_its_number(serve: Callable) -> None:
    with pytest.raises(OSError, match="404") as caught:
        read(serve({}).url + "a")
    assert web.reason(caught.value) == "HTTP 404 Not Found"


def test_a_refused_connection_fails_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(OSError, match="refused") as caught:
        read(f"http://127.0.0.1:{port}/a")
    assert time.monotonic() - start < 3
    assert "refused" in web.reason(caught.value)


def test_an_unknown_host_is_told_without_urllib_s_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match="not known") as caught:
        read("http://mirror.invalid/a")
    assert web.reason(caught.value) == "[Errno -2] Name or service not known"


def test_a_name_server_that_never_answers_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(*args: object, **options: object) -> None:
        released.wait(30)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(web, "OPEN_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        read("http://mirror.invalid/a")
    assert time.monotonic() - start < 5
    released.set()


def test_a_server_that_accepts_and_is_silent_is_given_up_on(
    serve: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(web, "OPEN_SECONDS", 0.2)
    with pytest.raises(TimeoutError, match="no answer"):
        read(serve({"/a": lambda handler: released.wait(30)}).url + "a")
    released.set()


def test_a_body_that_stops_is_given_up_on(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def stop(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"begin")
        released.wait(30)

    monkeypatch.setattr(web, "READ_SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        read(serve({"/a": stop}).url + "a")
    released.set()


def test_a_trickle_is_given_up_on(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not stopped.wait(0.02):
            handler.wfile.write(b"x")

    monkeypatch.setattr(web, "READ_SECONDS", 0.4)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="too slow"):
        read(serve({"/a": trickle}).url + "a")
    assert time.monotonic() - start < 5
    stopped.set()
