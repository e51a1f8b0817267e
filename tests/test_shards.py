"""The strict reader: what webdataset and tarfile write reads as through webdataset, equal samples are equal bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import END, FORMATS, GOOD, Member, Samples, damage, ours, special, tar, theirs
from webdataset.writer import ShardWriter, TarWriter

from pseudolabel.errors import DamagedShard, StorageError
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import ShardFile, write_shard
from pseudolabel.tar import BLOCK

# ---------------------------------------------------------------------------------- the same as through webdataset


NAMES = [
    "a.png",
    "a.cls",
    "b.PNG",
    "b.Seg.PNG",
    "c.tar.gz.json",
    "empty.png",
    "endsindot.",
    "noextension",
    ".hidden.png",
    "nested/folders/d.jpg",
    "nested/folders/d.txt",
    "dotted.folder/v1.2/e.jpg",
    "dotted.folder/noextension",
    "a folder/with spaces .jpg",
    "./prefixed.png",
    "../up/outside.png",
    "/rooted/f.png",
    "two\nlines.png",
    "trailing .png ",
    "ünï/ключ/鍵.png",
    "__meta__",
    "__meta__/g.png",
    "__meta__.json",
    "__half/h.png",
    "inner/__meta__/i.png",
    "n" * 95 + ".png",
    "d" * 90 + "/" + "n" * 60 + ".png",
    "é" * 49 + "/" + "鍵" * 30 + ".png",
]
LONG_NAMES = ["n" * 101 + ".png", "deep/" * 60 + "j.png", "鍵" * 200 + "/k.png", "x" * 5000 + ".png"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_of_tarfile_reads_as_through_webdataset(kind: str, tmp_path: Path) -> None:
    names = NAMES + (LONG_NAMES if kind != "ustar" else [])
    members: list[Member | tarfile.TarInfo] = [
        (name, b"" if name == "empty.png" else f"data of {name}".encode() * (index % 3 * 40 + 1))
        for index, name in enumerate(names)
    ]
    members.insert(10, special("nested", tarfile.DIRTYPE))
    members.insert(1, special("a directory." + "d" * (90 if kind == "ustar" else 200), tarfile.DIRTYPE))
    path = tar(tmp_path / "s.tar", members, FORMATS[kind])
    found = ours(path)
    assert found == theirs(path)
    by_key = dict(found)
    assert list(by_key["a"]) == ["png", "cls"]
    assert list(by_key["b"]) == ["png", "seg.png"]
    assert by_key["empty"] == {"png": b""}
    assert by_key["dotted.folder/v1.2/e"] == {"jpg": by_key["dotted.folder/v1.2/e"]["jpg"]}
    assert by_key["ünï/ключ/鍵"]["png"].startswith(b"data of \xc3\xbcn")
    assert not {"noextension", "__meta__/g", "dotted"} & set(by_key)
    assert len(found) == len(names) - 8  # second fields of a, b and d, five names that webdataset skips


WRITTEN: Samples = [
    ("plain", {"png": b"1", "cls": b"3"}),
    ("nested/folder/key", {"jpg": b"2", "seg.png": b"", "json": b"{}"}),
    ("with space", {"JPG": b"4"}),
    ("ünï/鍵", {"txt": "ключ".encode()}),
    ("../up", {"png": b"5"}),
    ("./here", {"png": b"6" * 1500}),
    ("n" * 101, {"png": b"7"}),
    ("deep/" * 60 + "k", {"png": b"8", "a.b.c": b"9" * 512}),
]


def test_what_webdataset_writes_reads_as_through_webdataset(tmp_path: Path) -> None:
    """The default stamps a fractional time, so every member gets an extended header."""
    with TarWriter(str(tmp_path / "timed.tar"), encoder=False) as writer:
        for key, fields in WRITTEN:
            writer.write({"__key__": key, **fields})
    with TarWriter(str(tmp_path / "fixed.tar"), mtime=0, keep_meta=True) as writer:
        for key, fields in WRITTEN:
            writer.write({"__key__": key, "_kept": "meta", **fields})
    with ShardWriter(str(tmp_path / "part-%02d.tar"), maxcount=3, verbose=0) as shards:
        for key, fields in WRITTEN:
            shards.write({"__key__": key, **fields})
    for path in sorted(tmp_path.glob("*.tar")):
        assert ours(path) == theirs(path), path.name
    expected = [(key, {name.lower(): data for name, data in sorted(fields.items())}) for key, fields in WRITTEN]
    assert ours(tmp_path / "timed.tar") == expected
    parts = [sample for shard in list_shards(str(tmp_path / "part-*.tar")) for sample in ours(Path(shard.path))]
    assert parts == expected


NAME = st.text("abB.._/ -é鍵", min_size=1, max_size=12).map(lambda name: name.rstrip("/") or "r.png")
LONG = st.builds(lambda part, count: (part * count).rstrip("/") or "l.png", NAME, st.integers(1, 60))


@given(st.lists(st.tuples(NAME | LONG, st.binary(max_size=700)), min_size=1, max_size=8), st.sampled_from([*FORMATS]))
def test_any_names_read_as_through_webdataset_or_are_refused(members: list[Member], kind: str) -> None:
    """Refused is only what webdataset refuses, reads as halves of one key, or reads as nothing at all."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "s.tar")
        try:
            tar(path, members, FORMATS[kind])
        except ValueError:  # too long a name for USTAR
            tar(path, members, tarfile.PAX_FORMAT)
        try:
            wanted = theirs(path)
        except ValueError:  # webdataset's "duplicate file name"
            wanted = []
        if not wanted or len({key for key, _ in wanted}) < len(wanted):
            damage(path)
        else:
            assert ours(path) == wanted


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_field_beyond_eight_gigabytes_is_stepped_over(kind: str, tmp_path: Path) -> None:
    """Octal sizes end at 8 GiB; beyond, GNU counts in base 256 and PAX in an extended header. The file is sparse."""
    info = tarfile.TarInfo("big.bin")
    info.size = (8 << 30) + 5
    path = tmp_path / "big.tar"
    with open(path, "wb") as file:
        file.write(info.tobuf(FORMATS[kind]))
        file.seek(info.size + -info.size % BLOCK, os.SEEK_CUR)
        file.write(GOOD + END)
    with ShardFile(Shard("big", str(path))) as opened:
        assert opened.keys == ["big", "good"]
        assert opened.read(1, "txt") == b"good"


# ---------------------------------------------------------------------------------- writing


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    """Neither the time, the order of a sample's fields, nor the umask shows."""
    write_shard(tmp_path / "a" / "s.tar", WRITTEN)
    before = os.umask(0o077)
    try:
        write_shard(tmp_path / "b" / "s.tar", [(key, dict(reversed(fields.items()))) for key, fields in WRITTEN])
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "s.tar").read_bytes() == (tmp_path / "b" / "s.tar").read_bytes()
    with tarfile.open(tmp_path / "a" / "s.tar") as made:
        assert {(one.mtime, one.uname, one.gname, one.uid, one.mode) for one in made} == {(0, "root", "root", 0, 0o644)}
    assert [key for key, _ in ours(tmp_path / "a" / "s.tar")] == [key for key, _ in WRITTEN]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["s.tar"]


@pytest.mark.parametrize(
    ("key", "field"), [("a.b", "png"), ("a", "_hidden"), ("__a__/b", "png"), ("", "png"), ("a", "b/c")]
)
def test_what_would_not_read_back_is_not_written(key: str, field: str, tmp_path: Path) -> None:
    """webdataset's writer drops `_hidden` without a word; its reader skips or renames the others."""
    with pytest.raises(ValueError, match="would not read back"):
        write_shard(tmp_path / "s.tar", [("fine", {"png": b"1"}), (key, {field: b"2"})])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- an opened shard


def test_samples_are_read_by_position(whole: Path) -> None:
    with ShardFile(Shard("whole", str(whole))) as opened:
        assert len(opened) == 5
        assert opened.size == whole.stat().st_size
        assert opened.sha256() == hashlib.sha256(whole.read_bytes()).hexdigest()
        assert opened.field_names(3) == ("cls", "png")
        assert opened.read(3, "png") == bytes([3]) * 900
        assert opened[2].key == "key-2"
        assert opened[2].index == 2
        assert [(one.index, one.key) for one in opened] == list(enumerate(opened.keys))
        with pytest.raises(KeyError):
            opened.read(0, "jpg")
        with pytest.raises(IndexError):
            opened[5]


def test_what_can_not_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    for path in (tmp_path / "absent.tar", tmp_path / "folder.tar", tmp_path / "no" / "such.tar"):
        with pytest.raises(StorageError, match=rf"reading {path} failed: "):
            ours(path)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(StorageError, match="no regular file"):  # it waited for a writer, for ever
        ours(tmp_path / "pipe.tar")


def test_a_shard_cut_short_while_it_is_read_is_damaged(tmp_path: Path) -> None:
    """Mapped into memory, it ended the process with SIGBUS."""
    path = tmp_path / "a.tar"
    write_shard(path, [(f"{index}", {"png": bytes(9000)}) for index in range(9)])
    with ShardFile(Shard("a", str(path))) as opened:
        os.truncate(path, 20_000)
        with pytest.raises(DamagedShard, match="was cut short while it was read"):
            opened.read(8, "png")
        with pytest.raises(DamagedShard, match="was cut short while it was read"):
            opened.sha256()
