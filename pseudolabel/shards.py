"""Shards: WebDataset tars, read strictly.

A shard is opened and indexed once (about 10 µs a sample; webdataset's own reader takes 87), then every sample is read
from where it lies. Reading differs from webdataset's in one way only: damage is an error that says what and at which
byte, where webdataset may drop samples without a word. Names are split into key and field by webdataset's rule, so
whatever webdataset writes reads the same. Nothing here decodes or unpickles a field: fields are bytes.

    for sample in read_samples(shard): sample.key, sample.fields["png"]
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pseudolabel import storage
from pseudolabel.errors import DamagedShard, ShardListError, StorageError

BLOCK = 512
_AHEAD = 16 * BLOCK  # read with a header: of small samples, the next headers are in it
_CHUNK = 1 << 20
_MAX_SHARDS = 1 << 22
_MAX_NESTING = 8
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_RANGE = re.compile(r"\{(-?\d{1,30})\.\.(-?\d{1,30})(?:\.\.-?\d+)?\}")
_META = re.compile(r"__[^/]*__($|/)")
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass(frozen=True)
class Shard:
    """One tar file. `name` is its file stem, unique in a corpus; `path` says where it lies."""

    name: str
    path: str


ShardsLike = str | os.PathLike[str] | Iterable[Shard | str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One record of a shard: `fields` maps a lower-case extension to its bytes; `index` is the position in the
    shard.
    """

    key: str
    index: int
    fields: Mapping[str, bytes]


def list_shards(spec: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Shard]:
    """The shards that `spec` names, sorted by name: a directory, a file, a glob, a brace range, `@list.txt`, or
    several.

    Raises:
        ShardListError: nothing is there, or two shards share a name.
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    paths = [path for one in specs for path in _expand(os.fspath(one))]
    if not paths:
        raise ShardListError("no shards given")
    by_name: dict[str, str] = {}
    for path in paths:
        name = os.path.basename(path).removesuffix(".tar")
        if not name.isascii() and not _is_utf8(name):
            raise ShardListError(
                f"{os.fsencode(path)!r}: this file name is not UTF-8; rename the shard, or set PYTHONUTF8=1"
            )
        other = by_name.setdefault(name, path)
        if other != path and os.path.realpath(other) != os.path.realpath(path):
            raise ShardListError(
                f"two shards are named {name!r}: {other} and {path}\na shard's file name is its "
                "identity in a store: rename one of them"
            )
    return [Shard(name, by_name[name]) for name in sorted(by_name)]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte that the file system's encoding could not make sense of
        return False
    return True


def _expand(spec: str, nesting: int = 0) -> list[str]:
    if not spec:
        raise ShardListError("an empty text names no shards; is a variable unset?")
    if spec.startswith("@"):
        listing = storage.local_path(spec[1:])
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ShardListError(f"{listing}: can't read this list of shards: {error}") from error
        if nesting > _MAX_NESTING:
            raise ShardListError(f"{listing}: lists in lists without end; does one name itself?")
        found = [
            path
            for line in lines
            if (text := line.strip()) and not text.startswith("#")
            for path in _expand(text, nesting + 1)
        ]
        if not found:
            raise ShardListError(f"{listing}: lists no shards; write one path a line")
        return found
    path = str(storage.local_path(spec))
    if os.path.isdir(path):
        found = sorted(str(tar) for tar in Path(path).glob("*.tar") if not tar.name.startswith("."))
        if not found:
            raise ShardListError(f"{path}: no *.tar in this directory; make shards with `pseudolabel pack`")
        return found
    if os.path.exists(path):
        return [path]
    if "{" in path:
        from braceexpand import braceexpand

        try:
            lengths = (abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(path))
            if math.prod(lengths) > _MAX_SHARDS:  # they are made at once
                raise ShardListError(f"{spec}: its braces name more than {_MAX_SHARDS} shards; check the range")
            found = [one for pattern in braceexpand(path) for one in (sorted(glob.glob(pattern)) or [pattern])]
        except ValueError as error:
            raise ShardListError(f"{spec}: no such shard, and its braces don't match up; check the range") from error
        missing = [one for one in found if not os.path.exists(one)]
        if missing:
            raise ShardListError(
                f"{spec}: {len(missing)} of {len(found)} shards are missing, the first is {missing[0]}"
            )
        return [path for one in found for path in _expand(one)]
    found = [one for one in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(one)]
    if not found:
        raise ShardListError(f"{spec}: no such shard, and nothing matches it as a glob; check the path")
    return found


class ShardFile:
    """An opened shard: indexed and checked. Use it as a context manager; samples are read by position.

    Raises:
        DamagedShard: empty, truncated, bad header, duplicate or interleaved keys, links, data after the end.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        path = self._path = storage.local_path(shard.path)
        with storage.explain_os_errors(path, "reading"):
            if not stat.S_ISREG(path.stat().st_mode):
                raise StorageError(f"reading {path} failed: it is no regular file\nremove it, or name other shards")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self.version = _version(os.fstat(self._descriptor))
            self.size = self.version[0]
            if self.size == 0:
                raise _damaged(shard, "is empty (0 bytes)", 0, 0)
            self.keys, self._fields = _index(shard, _Window(self))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        fields = {name: self.bytes_at(start, size) for name, (start, size) in self._fields[index].items()}
        return Sample(self.keys[index], index, fields)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def field_names(self, index: int) -> tuple[str, ...]:
        return tuple(self._fields[index])

    def read(self, index: int, field: str) -> bytes:
        """One field's bytes. Raises `KeyError` if the sample has no such field."""
        return self.bytes_at(*self._fields[index][field])

    def bytes_at(self, start: int, size: int) -> bytes:
        """Bytes of the file. Not through a map: a file that is cut short while it is mapped kills the process. Raises
        `DamagedShard` if they are not there any more.
        """
        try:
            data = os.pread(self._descriptor, size, start)
            while len(data) < size:
                more = os.pread(self._descriptor, size - len(data), start + len(data))
                if not more:
                    raise _damaged(self.shard, "was cut short while it was read", start + len(data), 0)
                data += more
        except OSError as error:
            raise storage.explained(error, self._path, "reading") from error
        return data

    def sha256(self) -> str:
        """The hash of the whole file, as hexadecimal digits."""
        digest = hashlib.sha256()
        for start in range(0, self.size, _CHUNK):
            digest.update(self.bytes_at(start, min(_CHUNK, self.size - start)))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise `DamagedShard` if the file is no longer the one that was opened: samples read may be of both."""
        with storage.explain_os_errors(self._path, "reading"):
            now = _version(self._path.stat())
        if now != self.version:
            raise _damaged(self.shard, "was changed or replaced while it was read", 0, len(self))


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    """Size, time of change, and which file it is: equal as long as a file stays what it was."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def shard_sha256(shard: Shard) -> str:
    """The hash of a shard's file, whatever is in it. Raises `StorageError`."""
    path = storage.local_path(shard.path)
    with storage.explain_os_errors(path, "reading"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_samples(shard: Shard) -> Iterator[Sample]:
    """Yield a shard's samples in order. Raises `DamagedShard` before the first sample if the shard is not whole."""
    with ShardFile(shard) as opened:
        yield from opened


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write (key, fields) pairs as one tar through webdataset: fixed time, owner and mode, so equal samples give
    equal bytes.

    Raises:
        StorageError: the place can't be written.
        ValueError: a reader would skip or rename a field (a dot in the key, a leading underscore).
    """
    from webdataset.writer import TarWriter

    with (
        storage.atomic_file(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, user="root", group="root", mode=0o644, mtime=0, encoder=False) as writer,
    ):
        for key, fields in samples:
            for field in fields:
                if field.startswith("_") or _split(f"{key}.{field}") != (key, field.lower()):
                    raise ValueError(f"the field {field!r} of the key {key!r} would not read back under these names")
            writer.write({"__key__": key, **fields})


def _damaged(shard: Shard, what: str, offset: int, samples: int) -> DamagedShard:
    return DamagedShard(
        f"{shard.path}: this shard {what} (at byte {offset}, after {samples} whole samples)\nfetch or "
        "pack it again, then rerun"
    )


class _Window:
    """A shard's bytes for whoever goes through them in order: slices come from the last piece read, while they can."""

    def __init__(self, opened: ShardFile) -> None:
        self._opened, self._start, self._piece = opened, 0, b""

    def __len__(self) -> int:
        return self._opened.size

    def __getitem__(self, where: slice) -> bytes:
        start, stop = min(where.start, len(self)), min(where.stop, len(self))
        begin = start - self._start
        if begin < 0 or stop - self._start > len(self._piece):
            size = min(max(stop - start, _AHEAD), len(self) - start)
            self._start, self._piece, begin = start, self._opened.bytes_at(start, size), 0
        return self._piece[begin : begin + stop - start]


def _index(shard: Shard, data: _Window) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """Group members into samples. A key's files must lie side by side, as webdataset groups them."""
    keys: list[str] = []
    fields: list[dict[str, tuple[int, int]]] = []
    seen: set[str] = set()
    for name, header, start, size in _members(shard, data, keys):
        split = _split(name)
        if split is None:
            continue
        key, field = split
        if keys and keys[-1] == key:
            if field in fields[-1]:
                raise _damaged(shard, f"has two files {field!r} under the key {key!r}", header, len(keys) - 1)
        else:
            if key in seen:
                raise _damaged(
                    shard, f"has the key {key!r} twice, or its files don't lie side by side", header, len(keys)
                )
            seen.add(key)
            keys.append(key)
            fields.append({})
        fields[-1][field] = (start, size)
    if not keys:
        raise _damaged(shard, "holds no samples", len(data), 0)
    return keys, fields


def _split(name: str) -> tuple[str, str] | None:
    """A member's key and field by webdataset's rule; None for what webdataset skips."""
    match = None if _META.match(name) else _NAME.match(name)
    return None if match is None else (match.group(1), match.group(2).lower())


def _members(shard: Shard, data: _Window, keys: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, header offset, data offset, size) of every regular file; check all that tar lets one check."""
    offset, end = 0, len(data)
    long_name: str | None = None
    pax: dict[str, str] = {}
    kind = b""

    def damaged(what: str) -> DamagedShard:
        return _damaged(shard, what, offset, max(len(keys) - 1, 0))

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
            _check_end(shard, data, offset, len(keys))
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


def _check_end(shard: Shard, data: _Window, offset: int, samples: int) -> None:
    """After the first zero block there must be a second one, and nothing but zeros (a concatenated tar would be
    lost).
    """
    if len(data) < offset + 2 * BLOCK:
        raise _damaged(shard, "is truncated: the end-of-archive blocks are missing", offset, samples)
    for position in range(offset, len(data), 1 << 20):
        chunk = data[position : position + (1 << 20)]
        if chunk.count(0) != len(chunk):
            raise _damaged(shard, "goes on after its end-of-archive blocks (tars joined with cat?)", position, samples)


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


def as_shards(shards: ShardsLike) -> list[Shard]:
    """Shards as a verb was given them: listed already, or as `list_shards` takes them. Raises `ShardListError`."""
    if isinstance(shards, (str, os.PathLike)):
        return list_shards(shards)
    given = list(shards)
    if all(isinstance(one, Shard) for one in given):
        return [one for one in given if isinstance(one, Shard)]
    return list_shards([one for one in given if not isinstance(one, Shard)])


def slice_shards(shards: list[Shard], part_of: str | None) -> list[Shard]:
    """Every n-th shard from the i-th on, for `i/n` (i from 0): slices of one listing are disjoint and complete.
    Raises `ShardListError`.
    """
    if part_of is None:
        return shards
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part_of)
    if match is None or not int(match[1]) < int(match[2]):
        raise ShardListError(f"--slice {part_of!r}: write i/n with i from 0 to n-1, such as 0/4")
    chosen = shards[int(match[1]) :: int(match[2])]
    if not chosen:
        raise ShardListError(f"--slice {part_of}: empty, there are only {len(shards)} shards; use fewer slices")
    return chosen
