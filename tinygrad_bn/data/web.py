"""Reading an address of the web in pieces, without ever waiting long for a silent network."""

from __future__ import annotations

import http.client
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

OPEN_SECONDS = 6.0  # for name, connection, TLS, redirects and the first line of the answer together
READ_SECONDS = 10.0  # for the next piece of the body
SLOWEST = 10_000  # bytes a second, on average, once READ_SECONDS are over
_PIECE = 1 << 16


def chunks(url: str) -> Iterator[bytes]:
    """Yield the body of `url` in pieces. Raises OSError or HTTPException, within seconds."""
    start, received = time.monotonic(), 0
    with _open(url) as response:
        # read1: a plain read would wait for a full piece, so that a trickle escapes the clock
        while piece := response.read1(_PIECE):
            received += len(piece)
            elapsed = time.monotonic() - start
            if elapsed > READ_SECONDS and received < SLOWEST * elapsed:
                raise TimeoutError(f"too slow: {received:,} bytes in {elapsed:.0f} s")
            yield piece


def reason(error: Exception) -> str:
    """Return in a few words why an address could not be read."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _open(url: str) -> http.client.HTTPResponse:
    """Return the open answer of `url`, or raise, within OPEN_SECONDS.

    In a thread: looking up a name takes no timeout, and a host with many addresses would be
    granted the socket's timeout for each of them.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "tinygrad_bn"})
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=READ_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()  # daemon: it must not hold up the exit
    try:
        answer = answers.get(timeout=OPEN_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {OPEN_SECONDS:g} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()
    if isinstance(answer, Exception):
        raise answer
    return answer
