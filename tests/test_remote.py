"""Files at URLs, on two real S3 servers and a web server, with what networks do to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from object_stores import Bucket, Proxy, web_server

from pseudolabel import storage
from pseudolabel.errors import StorageError
from pseudolabel.storage import asking, remote


def test_files_are_written_listed_read_and_removed(bucket: Bucket) -> None:
    place = storage.location(bucket.url) / "a" / "b"
    assert isinstance(place, storage.RemotePath)
    assert (place.name, place.parent.name, place.suffix) == ("b", "a", "")
    assert not place.exists()
    assert storage.entries(place) == []
    storage.write_atomic(place / "two.bin", b"\0" * 70_000)
    storage.write_atomic(place / "one.txt", "ü")
    storage.write_atomic(place / "below" / "x", b"1")
    assert [(one.name, one.size) for one in storage.entries(place)] == [("one.txt", 2), ("two.bin", 70_000)]
    assert sorted(one.name for one in place.iterdir()) == ["below", "one.txt", "two.bin"]
    assert place.exists()
    assert place.is_dir()
    assert not place.is_file()
    assert (place / "one.txt").read_text() == "ü"
    assert (place / "two.bin").read_range(69_998, 70_000) == b"\0\0"
    old = storage.entry(place / "one.txt")
    storage.write_atomic(place / "one.txt", "uu")
    assert storage.entry(place / "one.txt").version != old.version
    (place / "one.txt").unlink()
    (place / "one.txt").unlink(missing_ok=True)
    assert not (place / "one.txt").exists()
    assert [name.url for name, _ in place.parent.glob("*/two.*")] == [(place / "two.bin").url]


@pytest.mark.parametrize("wanted", [{"f-03"}, {"a", "f-00", "f-04", "g"}, {f"f-{n:02d}" for n in range(40)}])
def test_a_listing_in_many_places_at_once_is_the_same(
    wanted: set[str], bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that are told but not there, and those that are there and not told, change nothing."""
    monkeypatch.setattr(remote, "_MANY", 1)
    monkeypatch.setattr(remote, "_AT_ONCE", 3)
    place = storage.location(bucket.url) / "parts"
    for name in ("below/x", "f-00", "f-01", "f-10", "f-11", "f-20", "ü", "0"):
        storage.write_atomic(place / name, name)
    found = storage.entries(place, sorted(wanted) * 3)
    assert found == storage.entries(place)
    assert [one.name for one in found] == ["0", "f-00", "f-01", "f-10", "f-11", "f-20", "ü"]
    assert storage.entries(place.parent / "none", sorted(wanted) * 3) == []


def test_a_question_mark_in_a_key_is_a_letter(bucket: Bucket) -> None:
    place = storage.location(bucket.url) / "u"
    storage.write_atomic(place / "a?b.tar", b"1")
    assert [one.name for one in storage.entries(place)] == ["a?b.tar"]


def test_what_follows_the_question_mark_of_a_web_address_is_never_shown() -> None:
    for url in ("https://host/x.tar?sig=secret", "HTTPS://host/x?sig=secret", "https://host?sig=secret"):
        place = storage.location(url)
        assert "secret" not in f"{place} {place!r} {storage.shown(url)}"


def test_what_is_written_new_is_never_overwritten(bucket: Bucket) -> None:
    path = storage.location(f"{bucket.url}/store.json")
    assert storage.write_new(path, "first")
    assert not storage.write_new(path, "second")
    assert path.read_bytes() == b"first"


def test_of_two_that_write_new_at_once_one_wins(proxied: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that nothing is there; S3's condition decides."""
    bucket, _ = proxied
    if bucket.kind == "rclone":
        pytest.skip("it knows no conditions")
    path = storage.location(f"{bucket.url}/store.json")
    monkeypatch.setattr(storage.RemotePath, "is_file", lambda self: False)
    assert storage.write_new(path, "first")
    assert not storage.write_new(path, "second")
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("kind", ["503", "429", "500", "reset", "cut", "short", "slow"])
def test_reading_goes_on_after(kind: str, proxied: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, proxy = proxied
    path = storage.location(f"{bucket.url}/data.bin")
    content = os.urandom(300_000)
    storage.write_atomic(path, content)
    if kind == "slow":
        monkeypatch.setattr(asking, "_DEADLINE", 1.0)
    proxy.fail(kind, "GET", "data.bin", times=2)
    assert path.read_bytes() == content
    assert [fault.times for fault in proxy.faults] == [0]


@pytest.mark.parametrize("kind", ["503", "429", "reset", "cut upload", "lost answer"])
def test_writing_goes_on_after(kind: str, proxied: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = proxied
    path = storage.location(f"{bucket.url}/data.bin")
    proxy.fail(kind, "PUT", "data.bin", times=2)
    content = os.urandom(300_000)
    with storage.atomic_file(path) as temporary:
        temporary.write_bytes(content)
    assert path.read_bytes() == content
    assert [fault.times for fault in proxy.faults] == [0]


def test_a_lost_answer_to_write_new_leaves_what_was_written(proxied: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = proxied
    path = storage.location(f"{bucket.url}/store.json")
    proxy.fail("lost answer", "PUT")
    storage.write_new(path, "first")
    assert path.read_bytes() == b"first"


def test_an_upload_that_never_succeeds_leaves_nothing(
    proxied: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = proxied
    monkeypatch.setattr(asking, "_LONGEST_PAUSE", 0.05)
    path = storage.location(f"{bucket.url}/parts/a.parquet")
    proxy.fail("cut upload", "PUT", times=1000)
    with pytest.raises(StorageError, match=r"writing s3://.*a.parquet failed: .*\nit was tried 7 times"):
        storage.write_atomic(path, b"x" * 100_000)
    with suppress(ZeroDivisionError), storage.atomic_file(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise ZeroDivisionError
    proxy.faults.clear()
    assert storage.entries(path.parent) == []


def test_a_large_file_goes_up_in_pieces_and_appears_whole(
    proxied: tuple[Bucket, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = proxied
    if bucket.kind == "moto":
        pytest.skip("100 MB are sent once: to the server that checks digests")
    monkeypatch.setattr(asking, "_LONGEST_PAUSE", 0.05)
    path = storage.location(f"{bucket.url}/weights")
    content = os.urandom(1 << 20) * 101
    (tmp_path / "weights").write_bytes(content)
    proxy.fail("reset", "PUT", "partNumber=2", times=1000)
    with pytest.raises(StorageError, match="writing"):
        path.put(tmp_path / "weights")
    assert storage.entries(path.parent) == []
    proxy.faults.clear()
    path.put(tmp_path / "weights")
    assert path.read_bytes() == content
    assert any("partNumber=2" in request for request in proxy.seen)


def test_what_is_missing_is_one_error(bucket: Bucket) -> None:
    place = storage.location(bucket.url)
    with pytest.raises(StorageError, match=r"reading .*/none failed: there is no such file\ncheck the name"):
        (place / "none").read_bytes()
    with pytest.raises(StorageError, match="no such file"):
        (place / "none").entry()
    elsewhere = storage.location("s3://no-such-bucket-anywhere/x")
    for ask in (elsewhere.exists, lambda: storage.entries(elsewhere), lambda: storage.write_atomic(elsewhere, b"1")):
        with pytest.raises(StorageError, match=r"(?i)s3://no-such-bucket-anywhere.* failed: .*bucket"):
            ask()


def test_wrong_credentials_are_one_error_that_does_not_tell_them(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bucket.kind == "moto":
        pytest.skip("it lets wrong secrets pass")
    path = storage.location(f"{bucket.url}/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    asking.file_system.cache_clear()
    for ask in (path.read_bytes, lambda: storage.write_atomic(path, b"1"), lambda: storage.entries(path.parent)):
        with pytest.raises(StorageError, match=r"failed: .*\ncheck the credentials in your environment") as error:
            ask()
        assert "wrong-and-secret" not in str(error.value)


def test_no_credentials_at_all_are_one_error(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    asking.file_system.cache_clear()
    with pytest.raises(StorageError, match="check the credentials in your environment"):
        storage.write_atomic(storage.location(f"{bucket.url}/x"), b"1")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://key:secret@bucket/x", "a password doesn't belong into a URL"),
        ("https://user:secret@host/x.tar", "a password doesn't belong into a URL"),
        ("ftp://host/x", "no storage of this kind"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/a/../x.tar", "'..' leads nowhere"),
        ("file://tmp/x", "names the machine 'tmp'; of a path, write file:///PATH"),
        ("s3://b[0-9]/x.tar", "is no URL"),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as error:
        storage.location(url)
    assert "secret" not in str(error.value)


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    asking.file_system.cache_clear()
    with pytest.raises(StorageError, match=r"gs:// needs a package .*: pip install 'pseudolabel\[gcs\]'"):
        storage.location("gs://bucket/x").exists()


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    status = {"/secret.bin": 403}
    with web_server(tmp_path, ranges=request.param, answer=lambda path: status.get(path.partition("?")[0], 200)) as url:
        yield url
    asking.file_system.cache_clear()


def test_a_web_server_is_read_from(web: str, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(content := os.urandom(100_000))
    path = storage.location(f"{web}/data.bin?X-Signature=secret")
    assert isinstance(path, storage.RemotePath)
    assert path.name == "data.bin"
    assert path.read_bytes() == content
    assert path.read_range(50_000, 60_000) == content[50_000:60_000]
    assert "secret" not in str(path)


def test_a_web_server_that_fails_or_is_gone_is_not_taken_for_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec calls it FileNotFoundError, whatever it was."""
    monkeypatch.setattr(asking, "_LONGEST_PAUSE", 0.05)
    (tmp_path / "data.bin").write_bytes(b"123")
    with web_server(tmp_path, ranges=True) as address:
        proxy = Proxy(address)
        path = storage.location(f"{proxy.url}/data.bin")
        proxy.fail("503", "HEAD|GET", times=4)
        assert path.exists()
        assert not (path.parent / "none").exists()
        proxy.close()
        with pytest.raises(StorageError, match="it was tried 7 times"):
            path.exists()
    asking.file_system.cache_clear()


def test_what_a_web_server_can_not_do_is_said(web: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"x")
    place = storage.location(web)
    with pytest.raises(StorageError, match="can't be listed"):
        storage.entries(place)
    with pytest.raises(StorageError, match="only read from"):
        storage.write_atomic(place / "x", b"1")
    assert not (place / "none").exists()
    with pytest.raises(StorageError, match=r"secret.bin\?… failed: 403.*\ncheck the credentials") as error:
        storage.location(f"{web}/secret.bin?sig=hidden").read_range(0, 1)
    assert "hidden" not in str(error.value)


def test_what_was_not_tried_again_is_not_said_to_be(bucket: Bucket) -> None:
    """A name that no bucket can have is refused at once."""
    with pytest.raises(StorageError, match="check the address, and the configuration of the storage"):
        storage.write_atomic(storage.location("s3://Not_A_Bucket!/x"), b"1")
