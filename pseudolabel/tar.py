"""Where a shard's samples lie: a tar's headers, read strictly, and its members grouped by webdataset's rule.

All that tar lets one check is checked: headers' sums, sizes, the end of the archive and what comes after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from pseudolabel.errors import DamagedShard

BLOCK = 512
_AHEAD = 16 * BLOCK  # read with a header: of small samples, the next headers are in it
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


def damaged_shard(path: str, what: str, offset: int, samples: int) -> DamagedShard:
    return DamagedShard(
        f"{path}: this shard {what} (at byte {offset}, after {samples} whole samples)\nfetch or "
        "pack it again, then rerun"
    )


class Window:
    """A shard's bytes for whoever goes through them in order: slices come from the last piece read, while they can."""

    def __init__(self, size: int, bytes_at: Callable[[int, int], bytes]) -> None:
        self._size, self._bytes_at, self._start, self._piece = size, bytes_at, 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        start, stop = min(where.start, len(self)), min(where.stop, len(self))
        begin = start - self._start
        if begin < 0 or stop - self._start > len(self._piece):
            size = min(max(stop - start, _AHEAD), len(self) - start)
            self._start, self._piece, begin = start, self._bytes_at(start, size), 0
        return self._piece[begin : begin + stop - start]


def index_samples(path: str, data: Window) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """Group members into samples. A key's files must lie side by side, as webdataset groups them."""
    keys: list[str] = []
    fields: list[dict[str, tuple[int, int]]] = []
    seen: set[str] = set()
    for name, header, start, size in _members(path, data, keys):
        split = split_name(name)
        if split is None:
            continue
        key, field = split
        if keys and keys[-1] == key:
            if field in fields[-1]:
                raise damaged_shard(path, f"has two files {field!r} under the key {key!r}", header, len(keys) - 1)
        else:
            if key in seen:
                raise damaged_shard(
                    path, f"has the key {key!r} twice, or its files don't lie side by side", header, len(keys)
                )
            seen.add(key)
            keys.append(key)
            fields.append({})
        fields[-1][field] = (start, size)
    if not keys:
        raise damaged_shard(path, "holds no samples", len(data), 0)
    return keys, fields


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and field by webdataset's rule; None for what webdataset skips."""
    match = None if _META.match(name) else _NAME.match(name)
    return None if match is None else (match.group(1), match.group(2).lower())


def _members(path: str, data: Window, keys: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, header offset, data offset, size) of every regular file; check all that tar lets one check."""
    offset, end = 0, len(data)
    long_name: str | None = None
    pax: dict[str, str] = {}
    kind = b""

    def damaged(what: str) -> DamagedShard:
        return damaged_shard(path, what, offset, max(len(keys) - 1, 0))

    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            if offset == 0:
                raise damaged(_looks_like(header))
            raise damaged(
                "is truncated: the end-of-archive blocks are missing" if not header else "is truncated in a header"
            )
        if header.count(0) == BLOCK:
            if kind in (b"x", b"L", b"K"):
                raise damaged("ends after an extended header whose file is missing")
            _check_end(path, data, offset, len(keys))
            return
        if not _checksum_fits(header):
            if offset == 0:
                raise damaged(_looks_like(header))
            raise damaged("has a damaged header (its checksum doesn't fit)")
        kind = header[156:157]
        try:
            size = _number(header[124:136])
            name = long_name or pax.get("path") or _header_name(header)
            size = _decimal(pax["size"]) if "size" in pax else size
            if kind == b"5" or (kind == b"\0" and name.endswith("/")):
                size = 0  # a folder has no data, whatever its header says
        except ValueError as error:
            raise damaged(f"has a header that can't be read ({error})") from error
        start = offset + BLOCK
        if start + size > end:
            raise damaged(f"is truncated: {name!r} says {size} bytes, {max(end - start, 0)} are left")
        following = start + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind == b"x":
            pax = _pax_records(data[start : start + size], damaged)
        elif kind == b"L":
            long_name = _text(data[start : start + size].rstrip(b"\0"), damaged)
        elif kind in (b"g", b"K", b"5"):
            if kind == b"5":
                long_name, pax = None, {}
        elif kind in _REGULAR:
            if not (kind == b"\0" and name.endswith("/")):
                yield name, offset, start, size
            long_name, pax = None, {}
        else:
            raise damaged(
                f"holds {_KINDS.get(kind, f'an entry of unknown type {kind!r}')} ({name!r}); only "
                "regular files are read"
            )
        offset = following


def _check_end(path: str, data: Window, offset: int, samples: int) -> None:
    """After the first zero block there must be a second one, and nothing but zeros (a concatenated tar would be
    lost).
    """
    if len(data) < offset + 2 * BLOCK:
        raise damaged_shard(path, "is truncated: the end-of-archive blocks are missing", offset, samples)
    for position in range(offset, len(data), 1 << 20):
        chunk = data[position : position + (1 << 20)]
        if chunk.count(0) != len(chunk):
            raise damaged_shard(
                path, "goes on after its end-of-archive blocks (tars joined with cat?)", position, samples
            )


def _checksum_fits(header: bytes) -> bool:
    try:
        wanted = _number(header[148:156])
    except ValueError:
        return False
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if total == wanted:
        return True
    signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])  # some old tars sum signed bytes
    return signed == wanted


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256
        if field[0] == 0xFF:
            raise ValueError("a negative number")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ") or b"0"
    if not digits.isdigit():  # int() would take a sign, too
        raise ValueError(f"{digits!r} is no number")
    return int(digits, 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no number")
    return int(text)


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode()
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        return f"{prefix.decode()}/{name}"
    return name


def _pax_records(data: bytes, damaged: Callable[[str], DamagedShard]) -> dict[str, str]:
    records: dict[str, str] = {}
    position = 0
    try:
        while position < len(data) and data[position] != 0:
            space = data.index(b" ", position)
            length = _decimal(data[position:space].decode())
            name, _, value = data[space + 1 : position + length - 1].partition(b"=")
            if length < 5 or data[position + length - 1 : position + length] != b"\n":
                raise ValueError("a record's length is wrong")
            if name.startswith(b"GNU.sparse"):
                raise ValueError("it announces a sparse file; only regular files are read")
            if name in (b"path", b"size"):
                records[name.decode()] = value.decode()
            position += length
    except ValueError as error:
        raise damaged(f"has a PAX header that can't be read ({error})") from error
    return records


def _text(data: bytes, damaged: Callable[[str], DamagedShard]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise damaged(f"has a member name that isn't UTF-8 ({data[:60]!r})") from error


def _looks_like(header: bytes) -> str:
    if header[:2] == b"\x1f\x8b":
        return "is compressed with gzip: shards must be plain .tar, so decompress it"
    if header[:4] == b"\x28\xb5\x2f\xfd":
        return "is compressed with zstd: shards must be plain .tar, so decompress it"
    return "is not a tar file"
