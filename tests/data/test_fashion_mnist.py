"""`fashion_mnist()` over every place it looks in, with a tiny data set in place of the real one."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tinygrad_bn import data
from tinygrad_bn.data import web

IMAGES = "train-images-idx3-ubyte"


def refused_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/"


def not_found(**options: object) -> data.DatasetNotFoundError:
    with pytest.raises(data.DatasetNotFoundError) as caught:
        data.fashion_mnist(**options)
    return caught.value


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_root_is_used_plain_or_packed(tiny, packed: bool) -> None:
    root = tiny.fill(tiny.tmp / "root", packed=packed)
    tiny.check(data.fashion_mnist(root))
    tiny.check(data.fashion_mnist(str(root), download=False))


def test_the_arrays_may_be_written_into(tiny) -> None:
    tiny.fill(tiny.cache)
    for array in data.fashion_mnist():
        array[:] = 0


@pytest.mark.parametrize("place", ["cache/fashion-mnist", "system"])
def test_each_folder_serves_alone(tiny, place: str) -> None:
    tiny.fill(tiny.tmp / place)
    tiny.check(data.fashion_mnist(download=False))


def test_folders_come_in_order_and_before_mirrors(tiny, serve: Callable, mirrors) -> None:
    mirror = serve(tiny.packed())
    mirrors(mirror.url)
    root, system = tiny.fill(tiny.tmp / "root"), tiny.fill(tiny.tmp / "system")
    tiny.fill(tiny.cache)
    # A wrong file in a place would be reported if the place were looked into.
    (system / f"{IMAGES}.gz").write_bytes(b"wrong")
    tiny.check(data.fashion_mnist())
    (tiny.cache / f"{IMAGES}.gz").write_bytes(b"wrong")
    tiny.check(data.fashion_mnist(root))
    assert mirror.asked == []


def test_files_may_be_spread_over_places(tiny, serve: Callable, mirrors) -> None:
    mirror = serve(tiny.packed())
    mirrors(mirror.url)
    kept = {"root": 0, "cache/fashion-mnist": 1, "system": 2}  # place -> the one file it keeps
    for place, keeps in kept.items():
        folder = tiny.fill(tiny.tmp / place)
        for name in tiny.names:
            if name != tiny.names[keeps]:
                (folder / f"{name}.gz").unlink()
    tiny.check(data.fashion_mnist(tiny.tmp / "root"))
    assert mirror.asked == [f"/{tiny.names[3]}.gz"]


def test_a_wrong_file_in_root_is_an_error_though_the_cache_is_good(tiny) -> None:
    root = tiny.fill(tiny.tmp / "root", packed=False)
    tiny.fill(tiny.cache)
    tampered = bytearray(tiny.payloads[IMAGES])
    tampered[-1] ^= 1
    (root / IMAGES).write_bytes(tampered)
    with pytest.raises(data.DatasetCorruptError) as caught:
        data.fashion_mnist(root)
    assert str(root / IMAGES) in str(caught.value)
    assert tiny.hashes[IMAGES] in str(caught.value)
    assert (root / IMAGES).read_bytes() == tampered  # the user's own file is left alone


def test_a_truncated_file_in_root_is_an_error(tiny) -> None:
    root = tiny.fill(tiny.tmp / "root")
    whole = (root / f"{IMAGES}.gz").read_bytes()
    (root / f"{IMAGES}.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.DatasetCorruptError, match=f"{IMAGES}.gz is a damaged or truncated"):
        data.fashion_mnist(root)


def test_a_wrong_file_in_the_cache_is_warned_of_and_never_used(tiny) -> None:
    tiny.fill(tiny.cache)
    (tiny.cache / f"{IMAGES}.gz").write_bytes(gzip.compress(b"wrong"))
    with pytest.warns(UserWarning, match=f"{IMAGES}.gz holds the wrong data"):
        error = not_found(download=False)
    assert any("wrong data" in reason for _, reason in error.tried)
    tiny.fill(tiny.tmp / "system")
    with pytest.warns(UserWarning, match=f"{IMAGES}.gz holds the wrong data"):
        tiny.check(data.fashion_mnist(download=False))


def test_a_wrong_file_in_the_cache_is_replaced_by_a_download(tiny, serve, mirrors) -> None:
    mirrors(serve(tiny.packed()).url)
    tiny.fill(tiny.cache, packed=False)
    (tiny.cache / IMAGES).write_bytes(b"wrong")
    with pytest.warns(UserWarning, match="wrong data"):
        tiny.check(data.fashion_mnist())
    tiny.check(data.fashion_mnist(download=False))  # and warns no more
    assert tiny.listing(tiny.cache) == sorted([f"{IMAGES}.gz", *tiny.names[1:]])


# --- mirrors -------------------------------------------------------------------------------------


def test_a_download_is_kept_in_the_cache(tiny, serve: Callable, mirrors) -> None:
    mirror = serve(tiny.packed())
    mirrors(mirror.url)
    tiny.check(data.fashion_mnist())
    assert tiny.listing(tiny.cache) == sorted(f"{name}.gz" for name in tiny.names)
    asked = list(mirror.asked)
    tiny.check(data.fashion_mnist())
    assert mirror.asked == asked == [f"/{name}.gz" for name in tiny.names]


def test_a_download_is_kept_in_root_if_it_is_given(tiny, serve: Callable, mirrors) -> None:
    mirrors(serve(tiny.packed()).url)
    tiny.check(data.fashion_mnist(tiny.tmp / "new" / "root"))
    assert tiny.listing(tiny.tmp / "new" / "root") == sorted(f"{name}.gz" for name in tiny.names)
    assert not tiny.cache.exists()


def test_no_mirror_is_asked_without_download(tiny, serve: Callable, mirrors) -> None:
    mirror = serve(tiny.packed())
    mirrors(mirror.url)
    error = not_found(download=False)
    assert mirror.asked == []
    assert ("the network", "not tried, because of download=False") in error.tried
    assert not tiny.cache.exists()


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Promise more than comes, and hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    handler.wfile.write(gzip.compress(os.urandom(5000))[:3000])


def bad_answers(tiny) -> dict[str, object]:
    packed = gzip.compress(tiny.payloads[IMAGES])
    return {
        "missing": 404,
        "broken": 500,
        "truncated": packed[: len(packed) // 2],
        "tampered": gzip.compress(tiny.payloads[IMAGES][:-1] + b"?"),
        "another file": gzip.compress(tiny.payloads[tiny.names[1]]),
        "login page": b"<html>Welcome to our hotel</html>",
        "empty": b"",
        "cut off": reset,
    }


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("missing", "HTTP 404"),
        ("broken", "HTTP 500"),
        ("truncated", "truncated gzip"),
        ("tampered", "wrong data"),
        ("another file", "wrong data"),
        ("login page", "wrong data"),
        ("empty", "wrong data"),
        ("cut off", "truncated gzip"),
    ],
)
def test_the_next_mirror_takes_over_from_a_bad_one(tiny, serve, mirrors, case, told) -> None:
    bad = serve({**tiny.packed(), f"/{IMAGES}.gz": bad_answers(tiny)[case]})
    good = serve(tiny.packed())
    mirrors(bad.url)
    error = not_found()
    assert any(place == f"{bad.url}{IMAGES}.gz" and told in why for place, why in error.tried)
    assert tiny.listing(tiny.cache) == []  # neither the bad file nor a temporary one
    mirrors(bad.url, good.url)
    tiny.check(data.fashion_mnist())
    assert bad.asked == [f"/{IMAGES}.gz"] * 2  # no second file from a mirror that failed
    assert tiny.listing(tiny.cache) == sorted(f"{name}.gz" for name in tiny.names)


def test_mirrors_are_asked_in_order_and_only_for_what_is_missing(tiny, serve, mirrors) -> None:
    answers = tiny.packed()
    first = serve({f"/{n}.gz": answers[f"/{n}.gz"] for n in tiny.names[:2]})
    second = serve(answers)
    mirrors(first.url, second.url)
    tiny.check(data.fashion_mnist())
    assert first.asked == [f"/{n}.gz" for n in tiny.names[:3]]
    assert second.asked == [f"/{n}.gz" for n in tiny.names[2:]]


def test_a_mirror_that_unpacks_on_the_way_will_do(tiny, serve: Callable, mirrors) -> None:
    mirrors(serve({f"/{n}.gz": p for n, p in tiny.payloads.items()}).url)
    tiny.check(data.fashion_mnist())
    assert tiny.listing(tiny.cache) == sorted(tiny.names)
    tiny.check(data.fashion_mnist(download=False))


def test_a_machine_without_network_fails_within_seconds(tiny, mirrors) -> None:
    mirrors(refused_url(), refused_url(), refused_url())
    start = time.monotonic()
    error = not_found()
    assert time.monotonic() - start < 5
    assert sum("refused" in reason for _, reason in error.tried) == 3


def test_silent_mirrors_cost_one_wait_each(tiny, serve, mirrors, monkeypatch) -> None:
    released = threading.Event()
    silent = dict.fromkeys(tiny.packed(), lambda handler: released.wait(30))
    mirrors(serve(silent).url, serve(silent).url)
    monkeypatch.setattr(web, "OPEN_SECONDS", 0.3)
    start = time.monotonic()
    error = not_found()
    assert time.monotonic() - start < 3
    assert sum("no answer within 0.3 s" in reason for _, reason in error.tried) == 2
    released.set()


def test_an_unwritable_cache_costs_only_the_keeping(tiny, serve, mirrors) -> None:
    mirrors(serve(tiny.packed()).url)
    tiny.cache.parent.write_text("a file where the cache folder should be")
    with pytest.warns(UserWarning, match="not keeping"):
        tiny.check(data.fashion_mnist())


def test_an_unwritable_root_leaves_the_download_to_the_cache(tiny, serve, mirrors) -> None:
    mirrors(serve(tiny.packed()).url)
    (tiny.tmp / "file").touch()
    tiny.check(data.fashion_mnist(tiny.tmp / "file"))
    assert tiny.listing(tiny.cache) == sorted(f"{name}.gz" for name in tiny.names)


CHILD = """
import importlib, json, sys
from tinygrad_bn import data
module = importlib.import_module("tinygrad_bn.data.fashion_mnist")
files, mirror, system = json.loads(sys.argv[1])
module.FILES, module.MIRRORS, module.SYSTEM_FOLDER = files, (mirror,), system
data.fashion_mnist()
"""


@pytest.fixture
def child(tiny) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Return a function that starts a process which downloads from a mirror."""
    processes = []

    def start(mirror: str) -> subprocess.Popen:
        told = json.dumps([tiny.hashes, mirror, str(tiny.tmp / "system")])
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes.append(subprocess.Popen([sys.executable, "-c", CHILD, told], env=environ))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_killed_download_leaves_nothing_that_is_used(tiny, serve, mirrors, child) -> None:
    packed = tiny.packed()
    released = threading.Event()

    def half(handler: BaseHTTPRequestHandler) -> None:
        body = packed[f"/{IMAGES}.gz"]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        released.wait(60)

    process = child(serve({**packed, f"/{IMAGES}.gz": half}).url)
    wait_for(lambda: any(part.stat().st_size for part in tiny.cache.glob(f".{IMAGES}*.part")))
    process.kill()
    process.wait()
    released.set()
    assert len(tiny.listing(tiny.cache)) == 1  # the temporary file, hidden and half
    not_found(download=False)
    mirrors(serve(packed).url)
    tiny.check(data.fashion_mnist())
    if os.name == "posix":
        assert tiny.listing(tiny.cache) == sorted(f"{name}.gz" for name in tiny.names)


def test_processes_may_download_at_the_same_time(tiny, serve, child) -> None:
    url = serve(tiny.packed()).url
    processes = [child(url) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert tiny.listing(tiny.cache) == sorted(f"{name}.gz" for name in tiny.names)
    tiny.check(data.fashion_mnist(download=False))


# --- the error -----------------------------------------------------------------------------------


def test_the_error_lists_every_place_in_order_with_its_reason_and_what_to_do(tiny, mirrors) -> None:
    (tiny.tmp / "system").mkdir()
    first, second = refused_url(), refused_url()
    mirrors(first, second)
    error = not_found(root=tiny.tmp / "root")
    places = [place for place, _ in error.tried]
    assert places == [
        str(tiny.tmp / "root"),
        str(tiny.cache),
        str(tiny.tmp / "system"),
        f"{first}{IMAGES}.gz",
        f"{second}{IMAGES}.gz",
        "distribution package dataset-fashion-mnist",
    ]
    text = str(error)
    at = [text.index(f"- {place}: {reason}") for place, reason in error.tried]
    assert at == sorted(at)
    for advice in (*tiny.names, "root", "TINYGRAD_BN_DATA", "apt-get install", "_sample()"):
        assert advice in text
    assert isinstance(error, FileNotFoundError)


def test_the_error_names_only_the_files_that_are_missing(tiny) -> None:
    tiny.fill(tiny.cache)
    (tiny.cache / f"{IMAGES}.gz").unlink()
    first_line = str(not_found()).splitlines()[0]
    assert IMAGES in first_line
    assert tiny.names[1] not in first_line


def test_a_root_that_is_a_file_is_listed_as_no_folder(tiny) -> None:
    path: Path = tiny.tmp / "file"
    path.touch()
    assert (str(path), "no such folder") in not_found(root=path, download=False).tried
