"""The parts' footers in one file: used while the part files are those it knows, and not a moment longer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pseudolabel.annotate import annotate
from pseudolabel.errors import DamagedPart
from pseudolabel.labels import footers
from pseudolabel.labels.footers import read_footers
from pseudolabel.labels.store import Store, open_store
from pseudolabel.settings import AnnotateSettings


@pytest.fixture
def opened(corpus: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of three parts that remembers from the first part on."""
    monkeypatch.setattr(footers, "WORTH_IT", 1)
    monkeypatch.setattr(sys.modules["pseudolabel.annotate"], "WORTH_IT", 1)  # the package offers the verb by that name
    annotate(corpus / "unlabeled", f"checkpoint:{teacher_dir}", tmp_path / "store", settings=AnnotateSettings())
    return open_store(tmp_path / "store")


def _spoil(store: Store, shard: str, *, keep_time: bool) -> None:
    """Change a byte of a part's footer."""
    path = store.part_path(shard)
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_cache_says_what_the_footers_say(opened: Store) -> None:
    assert (opened.root / "log" / "footers.parquet").exists()
    found = read_footers(opened)
    assert list(found) == ["unlabeled-0", "unlabeled-1", "unlabeled-2"]
    assert all(one.info == opened.info(name) for name, one in found.items())
    assert all(one.bytes == opened.part_path(name).stat().st_size for name, one in found.items())
    assert list(read_footers(opened, {"unlabeled-1", "another"})) == ["unlabeled-1"]


def test_a_part_that_has_not_changed_is_not_opened_and_one_that_has_is(opened: Store) -> None:
    before = read_footers(opened)
    _spoil(opened, "unlabeled-1", keep_time=True)
    assert read_footers(opened) == before
    _spoil(opened, "unlabeled-2", keep_time=False)
    with pytest.raises(DamagedPart, match="unlabeled-2"):
        read_footers(opened)


def test_a_part_that_is_gone_is_not_remembered(opened: Store) -> None:
    opened.part_path("unlabeled-1").unlink()
    assert list(read_footers(opened)) == ["unlabeled-0", "unlabeled-2"]


@pytest.mark.parametrize("how", ["cut short", "no Parquet", "of another store"])
def test_a_spoiled_cache_costs_only_time(opened: Store, how: str) -> None:
    cache, wanted = opened.root / "log" / "footers.parquet", read_footers(opened)
    content = cache.read_bytes()
    if how == "cut short":
        cache.write_bytes(content[:-30])
    elif how == "no Parquet":
        cache.write_bytes(b"nothing")
    else:
        cache.write_bytes(content.replace(opened.fingerprint.encode(), b"0" * 64))
    assert read_footers(opened, keep=True) == wanted
    assert footers._load(opened) == wanted


def test_a_full_disk_costs_only_the_cache(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (opened.root / "log" / "footers.parquet").unlink()
    monkeypatch.setattr(os, "fsync", full)
    assert len(read_footers(opened, keep=True)) == 3
    assert not (opened.root / "log" / "footers.parquet").exists()
