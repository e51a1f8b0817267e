"""The strict reader: what webdataset and tarfile write reads as through webdataset, and damage is never a short shard.

Each case of damage is one that was seen or measured: webdataset's own reader drops samples for some of them in silence.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.writer import ShardWriter, TarWriter

from pseudolabel.errors import DamagedShard, ShardListError, StorageError
from pseudolabel.shard_lists import Shard, list_shards, slice_shards
from pseudolabel.shards import ShardFile, read_samples, write_shard
from pseudolabel.tar import BLOCK

Samples = list[tuple[str, dict[str, bytes]]]
Member = tuple[str, bytes]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(2 * BLOCK)


def ours(path: Path) -> Samples:
    return [(sample.key, dict(sample.fields)) for sample in read_samples(Shard(path.stem, str(path)))]


def theirs(path: Path) -> Samples:
    """The same tar through webdataset's own pipeline, undecoded."""
    with open(path, "rb") as stream:
        found = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return [
        (one["__key__"], {name: value for name, value in one.items() if name not in ("__key__", "__url__")})
        for one in found
    ]


def attempt(path: Path) -> tuple[Samples, str]:
    """The samples, or none and what is said of the damage. Any other exception is a failure of the test."""
    try:
        return ours(path), ""
    except DamagedShard as error:
        return [], str(error)


def damage(path: Path) -> str:
    """What is said of a damaged shard; every such message names the file, the byte and the remedy."""
    with pytest.raises(DamagedShard) as caught:
        ours(path)
    message = str(caught.value)
    first, remedy = message.splitlines()
    assert first.startswith(f"{path}: this shard ")
    assert " (at byte " in first
    assert first.endswith(" whole samples)")
    assert remedy == "fetch or pack it again, then rerun"
    return message


def tar(path: Path, members: Iterable[Member | tarfile.TarInfo], kind: int = tarfile.GNU_FORMAT) -> Path:
    """A tar by Python's tarfile: (name, bytes) is a file, a `TarInfo` anything else."""
    with tarfile.open(path, "w", format=kind) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                out.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """One raw header with a checksum that fits; `size` is the field's bytes as they are."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    return resummed(block)


def resummed(block: bytearray | bytes) -> bytes:
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def pax(**records: str) -> bytes:
    """An extended header with its records."""
    lines = b""
    for name, value in records.items():
        body = f" {name.replace('__', '.')}={value}\n".encode()
        length = next(total for total in range(len(body), len(body) + 9) if len(str(total)) + len(body) == total)
        lines += str(length).encode() + body
    return header(b"PaxHeaders/x", octal(len(lines)), b"x") + padded(lines)


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """Write raw blocks as a tar."""

    def write(*blocks: bytes) -> Path:
        path = tmp_path / "raw.tar"
        path.write_bytes(b"".join(blocks))
        return path

    return write


GOOD = header(b"good.txt", octal(4)) + padded(b"good")


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


def test_old_headers_and_folders_read_as_through_webdataset(raw: Callable[..., Path]) -> None:
    """A folder has no data whatever its header says: skipping its "size" would skip the samples after it."""
    path = raw(
        header(b"v7.txt", octal(2), b"\0", magic=b""),
        padded(b"v7"),
        header(b"folder/", octal(4096), b"5"),
        header(b"old.folder/", octal(2048), b"\0", magic=b""),
        header(b"contiguous.txt", b"          3 ", b"7"),
        padded(b"one"),
        header(b"base256.txt", b"\x80" + (3).to_bytes(11, "big"), magic=b"ustar  \0"),
        padded(b"two"),
        END,
    )
    assert ours(path) == [
        ("v7", {"txt": b"v7"}),
        ("contiguous", {"txt": b"one"}),
        ("base256", {"txt": b"two"}),
    ]
    assert ours(path) == theirs(path)


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


# ---------------------------------------------------------------------------------- damage


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Five samples, of which one has an extended header for its long name."""
    samples = [(f"key-{index}", {"png": bytes([index]) * (300 * index), "cls": b"%d" % index}) for index in range(4)]
    write_shard(tmp_path / "whole.tar", [*samples, ("long/" * 40 + "k", {"png": b"x" * 600})])
    return tmp_path / "whole.tar"


def end_of_members(path: Path) -> int:
    with tarfile.open(path) as opened:
        last = opened.getmembers()[-1]
    return last.offset_data + last.size + -last.size % BLOCK


def test_cut_anywhere_is_damage_and_never_a_short_read(whole: Path, tmp_path: Path) -> None:
    data, complete, end = whole.read_bytes(), ours(whole), end_of_members(whole)
    assert len(data) > end + 4 * BLOCK  # tars are padded, and the padding is no content
    cut = tmp_path / "cut.tar"
    for boundary in range(0, len(data), BLOCK):
        for length in (boundary, boundary + 1, boundary + 200, boundary + BLOCK - 1):
            cut.write_bytes(data[:length])
            if length >= end + len(END):
                assert ours(cut) == complete
            else:
                message = damage(cut)
                assert length == 0 or length < BLOCK or "truncated" in message, (length, message)


def test_the_message_says_where_and_after_how_much(whole: Path, tmp_path: Path) -> None:
    with tarfile.open(whole) as opened:
        third = opened.getmember("key-2.png")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: third.offset_data + 100])
    assert damage(cut) == (
        f"{cut}: this shard is truncated: 'key-2.png' says 600 bytes, 100 are left "
        f"(at byte {third.offset}, after 2 whole samples)\nfetch or pack it again, then rerun"
    )


def test_the_end_of_archive_takes_two_blocks(raw: Callable[..., Path]) -> None:
    for missing in (b"", bytes(BLOCK), bytes(2 * BLOCK - 1)):
        assert "end-of-archive blocks are missing" in damage(raw(GOOD, missing)) or len(missing) % BLOCK
    assert ours(raw(GOOD, END)) == [("good", {"txt": b"good"})]
    assert ours(raw(GOOD, END, bytes(100))) == [("good", {"txt": b"good"})]


def test_joined_tars_are_refused_where_webdataset_reads_only_the_first(whole: Path, raw: Callable[..., Path]) -> None:
    data = whole.read_bytes()
    assert "goes on after its end" in damage(raw(GOOD, END, data))
    assert len(theirs(raw(GOOD, END, data))) == 1
    assert "goes on after its end" in damage(raw(data, GOOD, END))
    assert "goes on after its end" in damage(raw(GOOD, bytes(BLOCK), GOOD, END))
    assert "goes on after its end" in damage(raw(GOOD, END, bytes(3 << 20), b"x"))
    assert len(ours(raw(GOOD, data))) == 6  # joined as tars are to be joined


def test_no_flipped_bit_of_a_header_goes_unnoticed(raw: Callable[..., Path]) -> None:
    """A checksum is a plain sum: any single changed byte changes it. Only its own field may spell the same number."""
    before = header(b"b.png", octal(5)) + padded(b"first")
    named = header(b"caf\xc3\xa9.txt", octal(700)) + padded(b"s" * 700)
    blocks = (GOOD, before, named, header(b"d.txt", octal(0)), END)
    original = ours(raw(*blocks))
    data, start = b"".join(blocks), len(GOOD) + len(before)
    unnoticed = []
    for offset in range(BLOCK):
        for bit in (0, 4):
            spoiled = bytearray(data)
            spoiled[start + offset] ^= 1 << bit
            found, _ = attempt(raw(bytes(spoiled)))
            assert found in ([], original), (offset, bit)
            unnoticed += [offset] if found else []
    assert set(unnoticed) <= set(range(148, 156))


@pytest.mark.parametrize("value", [0x00, 0x20, 0xFF])
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_no_changed_byte_of_a_long_name_header_goes_unnoticed(kind: str, value: int, tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("deep/" * 30 + "b.txt", b"2"), ("c.txt", b"3")]
    path = tar(tmp_path / "s.tar", members, FORMATS[kind])
    data, original = path.read_bytes(), ours(path)
    name_header = next(at for at in range(0, len(data), BLOCK) if data[at + 156 : at + 157] in (b"L", b"x"))
    for offset in range(name_header, name_header + BLOCK):
        if data[offset] == value:
            continue
        path.write_bytes(data[:offset] + bytes([value]) + data[offset + 1 :])
        found, message = attempt(path)
        assert found == original or f"at byte {name_header}" in message, offset - name_header


@given(st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_anywhere_never_loses_or_renames(position: int, bit: int) -> None:
    """Tar has no checksum over data: a field may differ (a part's sha256 catches that), but not keys and sizes."""
    samples: Samples = [(f"k{index}", {"png": bytes(range(40)) * index, "cls": b"1"}) for index in range(4)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "s.tar")
        write_shard(path, samples)
        data = bytearray(path.read_bytes()[: end_of_members(path) + len(END)])
        data[position % len(data)] ^= 1 << bit
        path.write_bytes(data)
        found, _ = attempt(path)
    assert not found or [(key, {name: len(value) for name, value in fields.items()}) for key, fields in found] == [
        (key, {name: len(value) for name, value in sorted(fields.items())}) for key, fields in samples
    ]


@given(st.binary(max_size=4 * BLOCK), st.integers(0, 6), st.integers(1, 3 * BLOCK))
def test_overwritten_blocks_are_read_or_refused_but_nothing_else(noise: bytes, block: int, length: int) -> None:
    """Whatever the bytes: an answer or `DamagedShard`, no hang and no other exception."""
    data = bytearray(GOOD + pax(path="new.txt") + header(b"old.txt", octal(3)) + padded(b"old") + END)
    data[block * BLOCK : block * BLOCK + min(len(noise), length)] = noise[:length]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "s.tar")
        path.write_bytes(data)
        found, message = attempt(path)
        assert found or "fetch or pack it again" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<html>404 not found</html>", "is not a tar file"),
        (b"key,label\n" * 200, "is not a tar file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "is not a tar file"),
        (gzip.compress(GOOD + END, mtime=0), "is compressed with gzip"),
        (gzip.compress(os.urandom(2000), mtime=0), "is compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(range(1, 200)) * 9, "is compressed with zstd"),
        (END, "holds no samples"),
        (bytes(10240), "holds no samples"),
        (bytes(BLOCK), "is truncated"),
        (header(b"folder/", octal(0), b"5") + END, "holds no samples"),
        (header(b"noextension", octal(0)) + END, "holds no samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_what_is_no_shard_is_named(content: bytes, said: str, raw: Callable[..., Path]) -> None:
    assert f"this shard {said}" in damage(raw(content))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.png", "a.png"], "has two files 'png' under the key 'a' (at byte 1024"),
        (["a.png", "a.PNG"], "has two files 'png' under the key 'a'"),
        (["a.png", "b.png", "a.png"], "has the key 'a' twice, or its files don't lie side by side (at byte 2048"),
        (["a.png", "b.png", "a.cls", "b.cls"], "has the key 'a' twice, or its files don't lie side by side"),
        (["f/a.png", "f/b.png", "f/c.png", "f/a.cls"], "has the key 'f/a' twice"),
    ],
)
def test_a_key_occurs_once(names: Sequence[str], said: str, tmp_path: Path) -> None:
    """webdataset yields half-samples for most of these, in silence."""
    assert said in damage(tar(tmp_path / "s.tar", [(name, b"1") for name in names]))


def test_other_members_may_lie_between_a_keys_files(tmp_path: Path) -> None:
    between = [special("folder", tarfile.DIRTYPE), ("README", b"2"), ("__meta__/x.y", b"3")]
    path = tar(tmp_path / "s.tar", [("a.png", b"1"), *between, ("a.cls", b"4")])
    assert ours(path) == theirs(path) == [("a", {"png": b"1", "cls": b"4"})]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "holds a symbolic link ('a.cls')"),
        (tarfile.LNKTYPE, "holds a hard link ('a.cls')"),
        (tarfile.CHRTYPE, "holds a device ('a.cls')"),
        (tarfile.BLKTYPE, "holds a device ('a.cls')"),
        (tarfile.FIFOTYPE, "holds a pipe ('a.cls')"),
        (tarfile.GNUTYPE_SPARSE, "holds an entry of unknown type b'S'"),
        (b"M", "holds an entry of unknown type b'M'"),
        (b"X", "holds an entry of unknown type b'X'"),
    ],
)
def test_only_regular_files_are_read(kind: bytes, said: str, raw: Callable[..., Path]) -> None:
    """A link's data is elsewhere; webdataset drops it, so its sample loses a field in silence."""
    path = raw(header(b"a.png", octal(1)), padded(b"1"), header(b"a.cls", octal(0), kind), END)
    assert f"{said}" in damage(path)
    assert "only regular files are read" in damage(path)


def test_links_with_long_targets_are_refused(tmp_path: Path) -> None:
    for kind in FORMATS.values():
        link = special("a.cls", tarfile.SYMTYPE, "t" * (90 if kind == tarfile.USTAR_FORMAT else 300))
        assert "holds a symbolic link ('a.cls')" in damage(tar(tmp_path / "s.tar", [("a.png", b"1"), link], kind))


def test_a_sparse_file_is_refused(raw: Callable[..., Path]) -> None:
    """GNU tar --sparse --format=posix: the data begins with a map, so raw bytes would be wrong bytes."""
    records = pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="a.bin", GNU__sparse__realsize="9")
    path = raw(records, header(b"GNUSparseFile.0/a.bin", octal(3)), padded(b"0\n\n"), END)
    assert "sparse file" in damage(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"long/" * 40 + b"\xff\xfe.png"], ids=["short", "long"])
def test_names_that_are_not_utf8_are_refused(kind: str, name: bytes, tmp_path: Path) -> None:
    if kind == "ustar":
        name = name[-60:]
    path = tar(tmp_path / "s.tar", [("a.png", b"1"), (os.fsdecode(name), b"2")], FORMATS[kind])
    message = damage(path)
    assert "utf-8" in message.lower()
    message.encode()  # can be printed


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("size", "said"),
    [
        (octal(8**11 - 1), "is truncated"),
        (b"\x80" + (1 << 80).to_bytes(11, "big"), "is truncated"),
        (b"\xff" * 12, "can't be read (a negative number)"),
        (b"-0000001000\0", "can't be read"),
        (b"-1000\0", "can't be read"),
        (b"+0000000003\0", "can't be read"),
        (b"0000_000003\0", "can't be read"),
        (b"00000000009\0", "can't be read"),
        (b"0x000000003\0", "can't be read"),
        (b"\x00\x00garbage\x00", "can't be read"),
    ],
)
def test_absurd_sizes_are_refused(size: bytes, said: str, raw: Callable[..., Path]) -> None:
    """A size of -512 used to send the reader back to the same header: for ever, if its file is one to skip."""
    for name in (b"a.png", b"README"):
        path = raw(GOOD, header(name, size), padded(b"abc"), END)
        assert said in damage(path)
        assert f"at byte {len(GOOD)}" in damage(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "records",
    [
        pax(size="-512"),
        pax(size="-513"),
        pax(size="+3"),
        pax(size="1e3"),
        pax(size="٣"),
        pax(size="9" * 30),
        pax(size="9" * 5000),
        header(b"x", octal(9), b"x") + padded(b"7 path=a\n"),
        header(b"x", octal(9), b"x") + padded(b"99 path=a"),
        header(b"x", octal(9), b"x") + padded(b"-9 path=a"),
        header(b"x", octal(9), b"x") + padded(b"no spaces"),
        header(b"x", octal(10), b"x") + padded(b"9 path=ab\n"),
        header(b"x", octal(10), b"x") + padded(b"10 path=\xff\n"),
    ],
    ids=range(13),
)
def test_damaged_extended_headers_are_refused(records: bytes, raw: Callable[..., Path]) -> None:
    damage(raw(GOOD, records, header(b"a.png", octal(3)), padded(b"abc"), END))


@pytest.mark.parametrize(
    "records", [pax(path="a.png"), pax(mtime="1.5"), header(b"@LongLink", octal(6), b"L") + padded(b"a.png\0")]
)
def test_an_extended_header_without_its_file_is_damage(records: bytes, raw: Callable[..., Path]) -> None:
    assert "extended header whose file is missing" in damage(raw(GOOD, records, END))


def test_a_name_is_for_one_member_only(raw: Callable[..., Path]) -> None:
    """Extended names must not leak to the next file, nor past a folder."""
    data = header(b"plain.png", octal(1)) + padded(b"1")
    folder = header(b"folder", octal(0), b"5")
    later = header(b"later.png", octal(1)) + padded(b"2")
    long_name = header(b"@LongLink", octal(10), b"L") + padded(b"named.png\0")
    long_folder = header(b"@LongLink", octal(9), b"L") + padded(b"named.d/\0")
    for path in (
        raw(pax(path="named.png"), data, later, END),
        raw(long_name, data, later, END),
        raw(pax(path="named.d/"), folder, header(b"named.png", octal(1)), padded(b"1"), later, END),
        raw(long_folder, folder, pax(path="named.png"), data, later, END),
    ):
        assert [key for key, _ in ours(path)] == ["named", "later"]
        assert ours(path) == theirs(path)


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
    with pytest.raises(StorageError, match="only local paths work"):
        list(read_samples(Shard("a", "s3://bucket/a.tar")))


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


def test_listings_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "self.txt").write_text(f"@{tmp_path / 'self.txt'}\n")
    with pytest.raises(ShardListError, match="lists in lists without end"):
        list_shards(f"@{tmp_path / 'self.txt'}")
    with pytest.raises(ShardListError, match="its braces name more than"):
        list_shards(str(tmp_path / "x-{1..999999999}.tar"))


# ---------------------------------------------------------------------------------- listing


@pytest.fixture
def places(tmp_path: Path) -> Path:
    for name in ("x-000002", "x-000000", "x-000001", "y"):
        write_shard(tmp_path / "d" / f"{name}.tar", [("k", {"txt": name.encode()})])
    (tmp_path / "d" / "notes.txt").write_text("no shard")
    (tmp_path / "d" / ".y.tar.tmp-0").write_bytes(b"")
    (tmp_path / "d" / ".hidden.tar").write_bytes(b"")
    return tmp_path / "d"


def names(spec: Any) -> list[str]:
    return [shard.name for shard in list_shards(spec)]


def test_every_way_to_name_shards_gives_them_sorted(places: Path, tmp_path: Path) -> None:
    numbered = ["x-000000", "x-000001", "x-000002"]
    assert names(places) == names(str(places)) == names(f"{places}/") == [*numbered, "y"]
    assert names(f"file://{places}") == [*numbered, "y"]
    assert names(f"{places}/x-*.tar") == names(f"{tmp_path}/**/x-*.tar") == numbered
    assert names(f"{places}/x-{{000002..000000}}.tar") == names(f"{places}/x-{{000000..000002}}.tar") == numbered
    assert names(f"{places}/{{y,x-*}}.tar") == [*numbered, "y"]
    assert names(places / "y.tar") == ["y"]
    assert names([f"{places}/y.tar", f"{places}/x-000001.tar"]) == ["x-000001", "y"]
    assert list_shards(places)[0].path == str(places / "x-000000.tar")


def test_a_brace_range_may_name_directories(places: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "e" / "z.tar", [("k", {"txt": b"z"})])
    assert names(f"{tmp_path}/{{d,e}}") == ["x-000000", "x-000001", "x-000002", "y", "z"]


def test_a_name_with_braces_or_stars_is_a_name_first(tmp_path: Path) -> None:
    for name in ("a{b", "c{0..3}", "d[1]", "e*"):
        write_shard(tmp_path / f"{name}.tar", [("k", {"txt": b""})])
        assert names(tmp_path / f"{name}.tar") == [name]


def test_a_list_names_one_place_a_line(places: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text(f"# comment\n\n  {places}/y.tar  \n{places}/x-{{000000..000001}}.tar\n{places}/y.tar\n")
    assert names(f"@{listing}") == ["x-000000", "x-000001", "y"]
    for empty in ("", "\n# nothing\n\n"):
        listing.write_text(empty)
        with pytest.raises(ShardListError, match="lists no shards"):
            list_shards(f"@{listing}")
    listing.write_bytes(b"\xff\xfe")
    for unreadable in (listing, tmp_path / "absent.txt", tmp_path):
        with pytest.raises(ShardListError, match="can't read this list"):
            list_shards(f"@{unreadable}")


def test_what_is_missing_is_an_error(places: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec, said in (
        (tmp_path / "empty", "no \\*.tar in this directory"),
        (tmp_path / "absent", "no such shard"),
        (f"{places}/z*.tar", "nothing matches it as a glob"),
        (f"{places}/x-{{000000..000005}}.tar", r"3 of 6 shards are missing, the first is .*x-000003\.tar"),
        (f"{places}/x-{{000000..000005.tar", "braces don't match up"),
        ([], "no shards given"),
        ("", "an empty text"),
        ([str(places), ""], "an empty text"),
    ):
        with pytest.raises(ShardListError, match=said):
            list_shards(spec)
    with pytest.raises(StorageError, match="only local paths"):
        list_shards("s3://bucket/x-{000000..000001}.tar")


def test_a_link_to_nothing_is_not_passed_over(places: Path) -> None:
    """Under a glob a dangling link used to be no shard at all."""
    (places / "x-000003.tar").symlink_to(places / "gone.tar")
    assert "x-000003" in names(f"{places}/x-*.tar")
    assert "x-000003" in names(places)
    with pytest.raises(StorageError, match="No such file"):
        ours(places / "x-000003.tar")


def test_one_file_named_twice_is_one_shard(places: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "y.tar").symlink_to(places / "y.tar")
    assert names([places / "y.tar", f"{places}/y*.tar", f"{places}/../d/y.tar", other / "y.tar"]) == ["y"]


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """It ended in a traceback when its part was to be named."""
    shard_file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.tar")
    with open(shard_file, "wb") as file:
        file.write(bytes(1024))
    with pytest.raises(ShardListError, match=r"caf\\xe9\.tar'?: this file name is not UTF-8"):
        list_shards(tmp_path)


def test_two_shards_of_one_name_are_refused(places: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "y.tar"
    write_shard(other, [("k", {"txt": b""})])
    with pytest.raises(ShardListError, match="two shards are named 'y'") as caught:
        list_shards([places, other])
    assert str(other) in str(caught.value)
    assert str(places / "y.tar") in str(caught.value)


def test_slices_are_disjoint_and_complete() -> None:
    shards = [Shard(f"s{index:02d}", f"/s{index:02d}.tar") for index in range(11)]
    assert slice_shards(shards, None) == shards
    assert slice_shards(shards, "0/1") == shards
    for count in range(1, 12):
        parts = [slice_shards(shards, f"{index}/{count}") for index in range(count)]
        assert sorted((shard for part in parts for shard in part), key=lambda shard: shard.name) == shards
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("1", "1/", "/2", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "", " 0/2", "0.5/2"):
        with pytest.raises(ShardListError, match="write i/n"):
            slice_shards(shards, wrong)
    with pytest.raises(ShardListError, match="there are only 11 shards"):
        slice_shards(shards, "11/12")
