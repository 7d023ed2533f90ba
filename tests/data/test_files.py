from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from tinygrad_bn.data import DatasetCorruptError, files

PAYLOAD = bytes(range(256)) * 40
HASH = hashlib.sha256(PAYLOAD).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({"TINYGRAD_BN_DATA": "/d", "XDG_CACHE_HOME": "/x"}, "linux", "/d"),
        ({"XDG_CACHE_HOME": "/x"}, "linux", "/x/tinygrad_bn"),
        ({"XDG_CACHE_HOME": "/x"}, "darwin", "/x/tinygrad_bn"),
        ({"XDG_CACHE_HOME": "x"}, "linux", "HOME/.cache/tinygrad_bn"),
        ({"TINYGRAD_BN_DATA": ""}, "linux", "HOME/.cache/tinygrad_bn"),
        ({}, "darwin", "HOME/Library/Caches/tinygrad_bn"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/tinygrad_bn/Cache"),
        ({}, "win32", "HOME/AppData/Local/tinygrad_bn/Cache"),
    ],
)
def test_the_cache_follows_the_variables_and_then_the_platform(
    environ: dict[str, str], platform: str, expected: str
) -> None:
    home = Path.home().as_posix()
    came = files.cache_directory(environ, platform).as_posix()
    assert came == expected.replace("HOME", home)


def test_plain_and_gzip_are_told_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(PAYLOAD)
    (tmp_path / "b").write_bytes(gzip.compress(PAYLOAD))
    assert files.find(tmp_path, "a", HASH) == PAYLOAD
    assert files.find(tmp_path, "b", HASH) == PAYLOAD


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # some unpackers make a folder of the file's name
    assert files.find(tmp_path, "a", HASH) is None


def test_a_wrong_file_is_named_with_both_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(DatasetCorruptError) as caught:
        files.find(tmp_path, "a", HASH)
    for part in (str(tmp_path / "a"), OTHER, HASH, "5 bytes"):
        assert part in str(caught.value)


def test_a_right_file_beside_a_wrong_one_is_used_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"other")
    (tmp_path / "a.gz").write_bytes(gzip.compress(PAYLOAD))
    with pytest.warns(UserWarning, match=OTHER):
        assert files.find(tmp_path, "a", HASH) == PAYLOAD


@pytest.mark.parametrize("kept", [3, 12, 60, -9, -1])
def test_a_truncated_gzip_file_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(PAYLOAD)[:kept])
    with pytest.raises(DatasetCorruptError, match=f"truncated gzip.*{HASH}"):
        files.find(tmp_path, "a", HASH)


def test_a_flipped_bit_is_refused_anywhere(tmp_path: Path) -> None:
    packed = gzip.compress(PAYLOAD)
    for at in range(10, len(packed)):  # the gzip header's date may differ
        damaged = bytearray(packed)
        damaged[at] ^= 1
        (tmp_path / "a.gz").write_bytes(damaged)
        try:
            assert files.find(tmp_path, "a", HASH) == PAYLOAD  # deflate has bits without meaning
        except DatasetCorruptError:
            continue


def test_a_gzip_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 1000)
    with pytest.raises(DatasetCorruptError, match="1,001 bytes"):
        files.verified(gzip.compress(bytes(10**6)), HASH, "bomb")


def test_what_is_stored_is_found_again(tmp_path: Path) -> None:
    packed = gzip.compress(PAYLOAD)
    assert files.store(tmp_path, "a", HASH, [packed[:9], packed[9:]], "here") == PAYLOAD
    assert files.store(tmp_path, "b", HASH, [PAYLOAD], "here") == PAYLOAD
    assert contents(tmp_path) == ["a.gz", "b"]
    assert files.find(tmp_path, "a", HASH) == files.find(tmp_path, "b", HASH) == PAYLOAD


def test_storing_replaces_wrong_files_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"other")
    (tmp_path / "a.gz").write_bytes(b"other")
    files.store(tmp_path, "a", HASH, [gzip.compress(PAYLOAD)], "here")
    assert contents(tmp_path) == ["a.gz"]


def broken_line() -> object:
    yield gzip.compress(PAYLOAD)[:20]
    raise ConnectionResetError("line is down")


def impatient_user() -> object:
    yield gzip.compress(PAYLOAD)[:20]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([b"other"], DatasetCorruptError),
        ([gzip.compress(PAYLOAD)[:50]], DatasetCorruptError),
        ([], DatasetCorruptError),
        (broken_line, ConnectionResetError),
        (impatient_user, KeyboardInterrupt),
    ],
    ids=["wrong", "truncated", "empty", "broken line", "interrupted"],
)
def test_a_failed_store_leaves_what_was_there_and_no_more(
    tmp_path: Path, chunks: object, error: type[BaseException]
) -> None:
    (tmp_path / "a.gz").write_bytes(b"before")
    with pytest.raises(error):
        files.store(tmp_path, "a", HASH, chunks() if callable(chunks) else chunks, "here")
    assert contents(tmp_path) == ["a.gz"]
    assert (tmp_path / "a.gz").read_bytes() == b"before"


def test_an_endless_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 100_000)
    endless = iter(lambda: bytes(1000), None)
    with pytest.raises(DatasetCorruptError, match="larger than 100,000"):
        files.store(tmp_path, "a", HASH, endless, "here")
    assert contents(tmp_path) == []


def test_a_stored_file_has_ordinary_permissions(tmp_path: Path) -> None:
    files.store(tmp_path, "a", HASH, [PAYLOAD], "here")
    (tmp_path / "other").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_verified_data_is_returned_though_it_cannot_be_renamed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.warns(UserWarning, match="could not keep a"):
        assert files.store(tmp_path, "a", HASH, [PAYLOAD], "here") == PAYLOAD
    assert contents(tmp_path) == ["a"]


def test_the_first_writable_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below_a_file, good = tmp_path / "file" / "x", tmp_path / "new" / "good"
    assert files.first_writable([below_a_file, good, tmp_path]) == good
    assert contents(good) == []
    assert files.first_writable([below_a_file]) is None


def test_a_folder_that_refuses_files_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, good = tmp_path / "refusing", tmp_path / "good"
    refusing.mkdir()
    touch = Path.touch

    def refuse(path: Path, *args: object, **options: object) -> None:
        if path.parent == refusing:  # permission bits would not stop root
            raise PermissionError(path)
        touch(path, *args, **options)

    monkeypatch.setattr(Path, "touch", refuse)
    assert files.first_writable([refusing, good]) == good


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="there are no such locks here")
    dead, living, data = (tmp_path / n for n in (".a.1.part", ".a.2.part", "a.gz"))
    dead.touch()
    data.touch()
    with living.open("xb") as file:
        files._lock(file.fileno())
        files.first_writable([tmp_path])
        assert contents(tmp_path) == [".a.2.part", "a.gz"]
    files.first_writable([tmp_path])
    assert contents(tmp_path) == ["a.gz"]
