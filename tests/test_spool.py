"""The spool: fetched once, for all processes, within its size, and never trusted blindly."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import image_bytes
from object_stores import web_server

from pseudolabel import storage
from pseudolabel.errors import DamagedShard, StorageError
from pseudolabel.labeling.work import annotate_shard
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import Fetcher, ShardFile, fetched_ahead, shard_sha256, write_shard
from pseudolabel.storage import asking, remote, spool
from pseudolabel.teachers import parse_teacher


class Server:
    """A web server before a directory, that counts what it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[str] = []
        self.url = ""

    def count(self, path: str) -> int:
        self.asked.append(path)
        return 200

    def write(self, name: str, content: bytes) -> storage.RemotePath:
        (self.directory / name).write_bytes(content)
        return storage.RemotePath(f"{self.url}/{name}")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    found = Server(tmp_path / "served")
    monkeypatch.setenv("PSEUDOLABEL_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(spool, "_PIECE", 1000)
    asking.file_system.cache_clear()
    with web_server(found.directory, ranges=True, answer=found.count) as found.url:
        yield found
    asking.file_system.cache_clear()


@pytest.fixture(autouse=True)
def versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """This server tells the time of change to the second only: the size stands for an ETag."""
    real = remote._as_entry

    def as_entry(info: dict[str, object]) -> storage.Entry:
        found = real(info)
        return found._replace(version=found.size + 1)

    monkeypatch.setattr(remote, "_as_entry", as_entry)


def read(found: spool.Spooled) -> bytes:
    try:
        return os.pread(found.descriptor, found.size, 0)
    finally:
        os.close(found.descriptor)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 4000, 12_345])
def test_what_is_fetched_is_what_is_there(size: int, server: Server) -> None:
    content = os.urandom(size)
    found = spool.fetch(server.write("a.bin", content))
    assert (found.size, found.sha256) == (size, hashlib.sha256(content).hexdigest())
    assert read(found) == content


def test_it_is_fetched_once_for_all_processes(server: Server) -> None:
    source = server.write("a.bin", os.urandom(5000))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=spool.fetch, args=(source,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    os.close(spool.fetch(source).descriptor)
    assert len(server.asked) == 5


def test_an_object_that_is_replaced_is_fetched_again(server: Server) -> None:
    assert read(spool.fetch(server.write("a.bin", b"old"))) == b"old"
    assert read(spool.fetch(server.write("a.bin", b"newer"))) == b"newer"


def test_without_a_version_it_is_never_taken_for_the_same(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = remote._as_entry
    monkeypatch.setattr(remote, "_as_entry", lambda info: real(info)._replace(version=0))
    assert read(spool.fetch(server.write("a.bin", b"old"))) == b"old"
    assert read(spool.fetch(server.write("a.bin", b"new"))) == b"new"
    assert os.listdir(os.environ["PSEUDOLABEL_SPOOL"]) == []


def test_an_object_that_is_replaced_meanwhile_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = server.write("a.bin", b"x" * 5000)
    real = spool._copy

    def copy(source: storage.RemotePath, size: int, target: Path) -> str:
        digest = real(source, size, target)
        server.write("a.bin", b"y" * 5001)
        return digest

    monkeypatch.setattr(spool, "_copy", copy)
    with pytest.raises(StorageError, match=r"a.bin: was replaced while it was fetched; run the same command again"):
        spool.fetch(source)
    assert os.listdir(os.environ["PSEUDOLABEL_SPOOL"]) == []


def test_what_was_used_longest_ago_goes_first(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSEUDOLABEL_SPOOL_LIMIT", "10KB")
    sources = [server.write(f"{number}.bin", bytes([number]) * 4000) for number in range(3)]
    first = spool.fetch(sources[0])
    os.close(spool.fetch(sources[1]).descriptor)
    os.utime(first.path, (time.time() - 100, time.time() - 100))
    os.close(spool.fetch(sources[0]).descriptor)  # used again
    os.close(spool.fetch(sources[2]).descriptor)
    asked = len(server.asked)
    os.close(spool.fetch(sources[0]).descriptor)
    assert len(server.asked) == asked
    assert read(first) == b"\0" * 4000  # open, whatever goes
    os.close(spool.fetch(sources[1]).descriptor)
    assert len(server.asked) == asked + 4


@pytest.mark.parametrize("limit", ["much", "-1", "10 XB"])
def test_a_limit_that_is_none_is_refused(limit: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSEUDOLABEL_SPOOL_LIMIT", limit)
    with pytest.raises(StorageError, match=r"PSEUDOLABEL_SPOOL_LIMIT=.*: write a number of bytes, such as 200GB"):
        spool.fetch(server.write("a.bin", b"x"))


def test_what_else_lies_in_the_spool_stays(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever room is wanted: the directory is the user's choice, and may hold more."""
    directory = Path(os.environ["PSEUDOLABEL_SPOOL"])
    (directory / "pseudolabel-run-x").mkdir(parents=True)
    (directory / "thesis.txt").write_text("years of work")
    monkeypatch.setenv("PSEUDOLABEL_SPOOL_LIMIT", "1")
    for name in "ab":
        os.close(spool.fetch(server.write(name, os.urandom(3000))).descriptor)
    spool.make_room(directory, 1, all_of_it=True)
    assert sorted(path.name for path in directory.iterdir()) == ["pseudolabel-run-x", "thesis.txt"]


def test_a_run_at_a_url_has_a_copy_that_nobody_else_clears_and_that_goes(server: Server) -> None:
    directory = Path(os.environ["PSEUDOLABEL_SPOOL"])
    with storage.mirrored(storage.RemotePath("s3://bucket/run")) as mirror, storage.held(mirror.path):
        (mirror.path / "x").write_text("x")
        os.utime(mirror.path, (0, 0))
        abandoned = directory / "pseudolabel-run-abandoned"
        abandoned.mkdir()
        os.utime(abandoned, (0, 0))
        with storage.mirrored(storage.RemotePath("s3://bucket/other")):
            assert mirror.path.exists()
            assert not abandoned.exists()
    assert list(directory.iterdir()) == []


def test_what_a_killed_process_left_is_no_hindrance(server: Server) -> None:
    source = server.write("a.bin", os.urandom(5000))
    found = spool.fetch(source)
    os.close(found.descriptor)
    found.path.rename(found.path.with_suffix(".part"))
    found.path.with_suffix(".part").write_bytes(b"half of it")
    assert len(read(spool.fetch(source))) == 5000
    assert sorted(path.suffix for path in found.path.parent.iterdir()) == ["", ".sha256"]
    found.path.with_suffix(".sha256").write_text("torn")
    assert len(read(spool.fetch(source))) == 5000


def shard_at(server: Server, name: str) -> Shard:
    write_shard(server.directory / f"{name}.tar", [(f"{n}", {"png": image_bytes(n)}) for n in range(6)])
    return Shard(name, f"{server.url}/{name}.tar")


def test_a_disk_that_changes_what_was_fetched_is_found_out(server: Server, teacher_dir: Path) -> None:
    shard = shard_at(server, "a")
    teacher = parse_teacher(f"checkpoint:{teacher_dir}").load(torch.device("cpu"))
    wanted = annotate_shard(shard, teacher, AnnotateSettings())
    (path,) = (one for one in Path(os.environ["PSEUDOLABEL_SPOOL"]).iterdir() if not one.suffix)
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedShard, match=r"a.tar: this shard was changed in the spool \(.*spool/"):
        annotate_shard(shard, teacher, AnnotateSettings())
    again = annotate_shard(shard, teacher, AnnotateSettings())
    assert again.part.equals(wanted.part)
    assert again.info == wanted.info


def test_the_next_shard_is_fetched_while_one_is_read(server: Server) -> None:
    shards = [shard_at(server, name) for name in "abc"]
    given = iter(shards)
    ahead = fetched_ahead(given)
    assert next(ahead) == shards[0]
    assert next(given) == shards[2]  # one was taken ahead, no more
    for _ in range(500):
        if any("b.tar" in path for path in server.asked):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("it isn't fetched ahead")
    assert list(ahead) == [shards[1]]


def test_a_window_of_shards_is_fetched_beside_training_once(server: Server) -> None:
    shards = [shard_at(server, name) for name in "abcd"]
    fetcher = Fetcher()
    fetcher.ask([shards[:2], shards[2:3]])
    fetcher.ask([shards[2:3], shards[3:]])
    pieces = sum(-(-path.stat().st_size // 1000) for path in server.directory.iterdir())
    for _ in range(1000):
        if len(server.asked) >= pieces:
            break
        time.sleep(0.01)
    for shard in shards:
        ShardFile(shard).close()
    assert len(server.asked) == pieces


def test_what_can_not_be_fetched_is_said_by_who_opens_it(server: Server, tmp_path: Path) -> None:
    local = Shard("local", str(tmp_path / "local.tar"))
    write_shard(tmp_path / "local.tar", [("a", {"png": b"x"})])
    shards = [local, Shard("none", f"{server.url}/none.tar"), shard_at(server, "b")]
    assert list(fetched_ahead(iter(shards))) == shards
    with pytest.raises(StorageError, match=r"none.tar failed: there is no such file"):
        ShardFile(shards[1])
    assert shard_sha256(shards[2]) == hashlib.sha256((server.directory / "b.tar").read_bytes()).hexdigest()
