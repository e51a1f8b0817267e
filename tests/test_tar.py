"""Tars byte by byte: old headers are read, damage is refused with what and where, and is never a short shard.

Each case of damage is one that was seen or measured: webdataset's own reader drops samples for some of them in silence.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import END, FORMATS, GOOD, Samples, damage, header, octal, ours, padded, special, tar, theirs

from pseudolabel.errors import DamagedShard
from pseudolabel.shards import write_shard
from pseudolabel.tar import BLOCK


def attempt(path: Path) -> tuple[Samples, str]:
    """The samples, or none and what is said of the damage. Any other exception is a failure of the test."""
    try:
        return ours(path), ""
    except DamagedShard as error:
        return [], str(error)


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


# ---------------------------------------------------------------------------------- the same as through webdataset


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


# ---------------------------------------------------------------------------------- damage


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
