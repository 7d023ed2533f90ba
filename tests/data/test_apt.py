"""The last resort: the distribution's package, with stand-ins for apt-get and dpkg-deb."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tinygrad_bn import data
from tinygrad_bn.data import apt

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")

PLACE = "distribution package dataset-fashion-mnist"
DOWNLOADS = 'echo "$@" > "$HERE/asked"; echo packed > "$3_1.0_all.deb"'
UNPACKS = (
    '[ "$1" = -x ] && [ "$(cat "$2")" = packed ] || exit 2\n'
    'mkdir -p "$3/usr/share/datasets/fashion-mnist"\n'
    'cp "$HERE"/contents/* "$3/usr/share/datasets/fashion-mnist"'
)


@pytest.fixture
def install(tiny) -> Callable[..., None]:
    """Return a function that puts stand-ins on PATH: program name -> body of a shell script."""

    def install(**bodies: str) -> None:
        for program, body in bodies.items():
            path = tiny.tmp / "bin" / program.replace("_", "-")
            lines = "#!/bin/sh", "PATH=/usr/bin:/bin", f"HERE='{tiny.tmp}'", body
            path.write_text("\n".join(lines) + "\n")
            path.chmod(0o755)

    return install


def reason() -> str:
    with pytest.raises(data.DatasetNotFoundError) as caught:
        data.fashion_mnist()
    return dict(caught.value.tried)[PLACE]


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_the_package_is_fetched_unpacked_and_kept(tiny, install, packed: bool) -> None:
    # The options before "download" are dropped, so that the package's name is $3.
    install(apt_get=f'while [ "$2" != download ]; do shift; done\n{DOWNLOADS}', dpkg_deb=UNPACKS)
    tiny.fill(tiny.tmp / "contents", packed=packed)
    tiny.check(data.fashion_mnist())
    assert (tiny.tmp / "asked").read_text().endswith("download dataset-fashion-mnist\n")
    ending = ".gz" if packed else ""
    assert tiny.listing(tiny.cache) == sorted(name + ending for name in tiny.names)


def test_mirrors_come_before_the_package(tiny, install, serve, mirrors) -> None:
    install(apt_get='touch "$HERE/asked"', dpkg_deb=UNPACKS)
    mirrors(serve(tiny.packed()).url)
    tiny.check(data.fashion_mnist())
    assert not (tiny.tmp / "asked").exists()


def test_the_package_is_not_asked_without_download(tiny, install) -> None:
    install(apt_get='touch "$HERE/asked"', dpkg_deb=UNPACKS)
    with pytest.raises(data.DatasetNotFoundError):
        data.fashion_mnist(download=False)
    assert not (tiny.tmp / "asked").exists()


def test_a_wrong_package_is_never_used_or_kept(tiny, install) -> None:
    install(apt_get=f'while [ "$2" != download ]; do shift; done\n{DOWNLOADS}', dpkg_deb=UNPACKS)
    folder = tiny.fill(tiny.tmp / "contents")
    for name in tiny.names:
        (folder / f"{name}.gz").write_bytes(b"wrong")
    assert "holds the wrong data" in reason()
    assert tiny.listing(tiny.cache) == []


def test_a_package_without_the_files_is_told(tiny, install) -> None:
    install(apt_get=f'while [ "$2" != download ]; do shift; done\n{DOWNLOADS}', dpkg_deb=UNPACKS)
    (tiny.tmp / "contents").mkdir()
    (tiny.tmp / "contents" / "README").touch()
    assert "holds no train-images" in reason()


def test_a_machine_without_apt_says_so(tiny) -> None:
    assert reason() == "apt-get is not on this machine"


def test_a_machine_without_dpkg_says_so(tiny, install) -> None:
    install(apt_get="exit 0")
    assert reason() == "dpkg-deb is not on this machine"


def test_missing_package_lists_are_told(tiny, install) -> None:
    install(apt_get='echo "E: Unable to locate package $4" >&2; exit 100', dpkg_deb=UNPACKS)
    assert "package lists may be missing" in reason()


def test_another_failure_of_apt_is_told_in_its_words(tiny, install) -> None:
    install(apt_get='echo "W: odd" >&2; echo "E: no route" >&2; exit 100', dpkg_deb=UNPACKS)
    assert reason() == "apt-get failed with code 100: E: no route"


def test_apt_speaks_english_to_us(tiny, install, monkeypatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    install(apt_get='echo "E: $LC_ALL" >&2; exit 1', dpkg_deb=UNPACKS)
    assert reason().endswith("E: C")


def test_an_apt_that_leaves_no_package_is_told(tiny, install) -> None:
    install(apt_get="exit 0", dpkg_deb=UNPACKS)
    assert "left no .deb" in reason()


def test_a_hanging_apt_is_ended(tiny, install, monkeypatch) -> None:
    monkeypatch.setattr(apt, "SECONDS", 0.3)
    install(apt_get="exec sleep 60", dpkg_deb=UNPACKS)
    start = time.monotonic()
    assert "did not finish within 0.3 s" in reason()
    assert time.monotonic() - start < 20


def test_nothing_is_left_in_the_folder_for_temporary_files(tiny, install, monkeypatch) -> None:
    scratch: Path = tiny.tmp / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    install(apt_get="exit 0", dpkg_deb=UNPACKS)
    reason()
    assert tiny.listing(scratch) == []
