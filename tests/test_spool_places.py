"""Where the spool is and how large: checked before anything is fetched, and held to when its files go meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Refuse
from conftest import image_bytes
from object_stores import web_server

from pseudolabel import storage
from pseudolabel.errors import StorageError
from pseudolabel.shards import write_shard
from pseudolabel.storage import asking, spool


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of four shards."""
    for number in range(4):
        write_shard(tmp_path / "served" / f"s-{number}.tar", [("a", {"png": image_bytes(number)})])
    monkeypatch.setenv("PSEUDOLABEL_SPOOL", str(tmp_path / "spool"))
    asking.file_system.cache_clear()
    with web_server(tmp_path / "served", ranges=True) as url:
        yield url
    asking.file_system.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PSEUDOLABEL_SPOOL", "s3://labels/spool", "^PSEUDOLABEL_SPOOL=s3://…: the spool must be on this machine"),
        ("PSEUDOLABEL_SPOOL", "FILE", "^making the spool .*file failed: File exists"),
        ("PSEUDOLABEL_SPOOL", "FILE/below", "^making the spool .*file/below failed: Not a directory"),
        ("PSEUDOLABEL_SPOOL_LIMIT", "1e9", "^PSEUDOLABEL_SPOOL_LIMIT=1e9: write a number of bytes, such as 200GB$"),
        ("PSEUDOLABEL_SPOOL_LIMIT", "-1", "^PSEUDOLABEL_SPOOL_LIMIT=-1: write a number of bytes, such as 200GB$"),
    ],
)
def test_a_spool_that_can_be_none_is_refused_at_once(
    name: str, value: str, said: str, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse
) -> None:
    """Before the teacher is loaded, which isn't even there. It was found shard by shard, or not at all."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "file")))
    monkeypatch.chdir(tmp_path)
    teacher = ("--teacher", "checkpoint:none", "--out", tmp_path / "out")
    refuse("annotate", f"{served}/s-{{0..3}}.tar", *teacher, kind="StorageError", said=said)
    assert not any(path.name.startswith("s3") for path in tmp_path.iterdir())


def test_a_run_at_a_url_is_not_copied_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSEUDOLABEL_SPOOL", "s3://labels/spool")
    with (
        pytest.raises(StorageError, match="must be on this machine"),
        storage.mirrored(storage.RemotePath("s3://bucket/run")),
    ):
        pass


@pytest.mark.parametrize("times", [1, 3, 4])
def test_a_spool_that_is_deleted_meanwhile_is_made_again(
    times: int, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be deleted at any time; only one that never lasts as long as a fetch is an error."""
    real, deleted = spool._copy, []

    def copy(source: storage.RemotePath, size: int, target: Path) -> str:
        digest = real(source, size, target)
        if len(deleted) < times:
            deleted.append(target)
            shutil.rmtree(tmp_path / "spool")
        return digest

    monkeypatch.setattr(spool, "_copy", copy)
    source = storage.RemotePath(f"{served}/s-0.tar")
    if times == spool._TRIES:
        with pytest.raises(StorageError, match="is gone as soon as it is fetched"):
            spool.fetch(source)
        return
    found = spool.fetch(source)
    assert os.pread(found.descriptor, found.size, 0) == (tmp_path / "served" / "s-0.tar").read_bytes()
    os.close(found.descriptor)
    assert len(deleted) == times


@pytest.mark.parametrize("suffix", ["", ".part", ".sha256"])
def test_a_directory_in_the_place_of_a_file_is_named(suffix: str, served: str, tmp_path: Path) -> None:
    source = storage.RemotePath(f"{served}/s-0.tar")
    found = spool.fetch(source)
    os.close(found.descriptor)
    for path in (tmp_path / "spool").iterdir():
        path.unlink()
    found.path.with_suffix(suffix).mkdir()
    with pytest.raises(StorageError, match=f"{found.path.name}{suffix}: is a directory where the spool keeps a file"):
        spool.fetch(source)
    os.close(spool.fetch(storage.RemotePath(f"{served}/s-1.tar")).descriptor)  # it is in nobody else's way
