"""The columns and metadata of a part, and how one Parquet file is written and read (see FORMAT.md).

A file carries its own SHA-256: the metadata is written with 64 zeros in its place, the file hashed, and the zeros
overwritten with the digits. So any changed byte is found, the footer's too, which Parquet's page checksums don't
cover. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pseudolabel import storage
from pseudolabel.errors import DamagedPart, StoreError
from pseudolabel.storage import Location, RemotePath

FORMAT_VERSION = 1
METADATA_KEY = b"pseudolabel"
ROW_GROUP_ROWS = 16384
_UNSEALED = "0" * 64
_SEAL_KEY = "file_sha256"

_IDENTITY_FIELDS = [
    pa.field("key", pa.string(), nullable=False),
    pa.field("index", pa.int32(), nullable=False),
    pa.field("view", pa.int16(), nullable=False),
]
_VIEW_FIELDS = [
    pa.field("crop", pa.list_(pa.float32(), 4), nullable=False),
    pa.field("flip", pa.bool_(), nullable=False),
    pa.field("aug_seed", pa.int64(), nullable=False),
]
_SUMMARY_FIELDS = [
    pa.field("label", pa.int32(), nullable=True),
    pa.field("pred", pa.int32(), nullable=False),
    pa.field("confidence", pa.float32(), nullable=False),
    pa.field("entropy", pa.float32(), nullable=False),
    pa.field("margin", pa.float32(), nullable=False),
]
REJECT_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class PartInfo:
    """What a part says of itself. `fidelity` maps "mean" and "p99" to nats of KL(full ‖ stored) by temperature."""

    fingerprint: str
    shard: str
    size: int
    sha256: str
    samples: int
    rejects: int
    encoding: str
    num_classes: int
    fidelity: Mapping[str, Mapping[str, float]]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in sorted(self.__dataclass_fields__)}


def part_schema(encoding_fields: Sequence[pa.Field], *, augmented: bool) -> pa.Schema:
    """The columns of a part, in order. `augmented` stores carry the view columns."""
    return pa.schema([*_IDENTITY_FIELDS, *(_VIEW_FIELDS if augmented else []), *_SUMMARY_FIELDS, *encoding_fields])


def write_sealed(path: Location, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Write a Parquet file atomically, with page checksums, `metadata` as JSON, and its own hash. Raises
    `StorageError`.
    """
    lists = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    plain = [
        name
        for name in ("crop", "confidence", "entropy", "margin", "lse", "tail_mean", "tail_var")
        if name in table.column_names
    ]
    columns = {
        f"{name}.list.element" if name in lists else name: "BYTE_STREAM_SPLIT"
        for name in dict.fromkeys([*lists, *plain])
    }
    text = json.dumps({**metadata, _SEAL_KEY: _UNSEALED}, sort_keys=True, separators=(",", ":"))
    with storage.atomic_file(path) as temporary:
        with pq.ParquetWriter(
            temporary.absolute(),  # or else pyarrow takes what is before a colon for a URL's scheme
            table.schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[
                name for name in ("label", "pred", "view", "shard", "stage", "error") if name in table.column_names
            ],
            column_encoding=columns,
            write_page_checksum=True,
        ) as writer:
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            writer.add_key_value_metadata({METADATA_KEY.decode(): text})
        _seal(temporary)


def _seal(path: Path) -> None:
    content = path.read_bytes()
    position = _seal_position(content)
    assert content[position : position + 64] == _UNSEALED.encode()
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(hashlib.sha256(content).hexdigest().encode())


def _seal_position(content: bytes) -> int:
    marker = f'"{_SEAL_KEY}":"'.encode()
    position = content.rfind(marker)
    if position < 0:
        raise ValueError("it carries no hash of itself")
    return position + len(marker)


def read_table(path: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a file whole, its hash and page checksums verified. Raises `DamagedPart` or `StorageError`."""
    with storage.explain_os_errors(path, "reading"):
        content = path.read_bytes()
    try:
        position = _seal_position(content)
        digest = hashlib.sha256(content[:position])
        digest.update(_UNSEALED.encode())
        digest.update(memoryview(content)[position + 64 :])
        if digest.hexdigest().encode() != content[position : position + 64]:
            raise ValueError("its content doesn't fit the hash it was sealed with")
        # Not pq.read_table: its scanner's threads can outlive a short process and abort it at exit.
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, _first_line(error)) from error


def read_columns(path: Location, columns: Sequence[str]) -> tuple[PartInfo, pa.Table]:
    """What a part says of itself, and these columns of it, their page checksums verified. Of a large file little is
    read, so not its seal: a changed footer, or a changed page header, need not be found. Raises as `read_metadata`.
    """
    source, remote = _open(path), isinstance(path, RemotePath)
    try:
        with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=remote) as file:
            info = _part_info(path, _metadata(path, file.metadata))
            absent = [name for name in columns if name not in file.schema_arrow.names]
            if absent:
                raise StoreError(f"{path}: has no column {absent[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            return info, file.read(columns=list(columns), use_threads=False).select(list(columns))
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, _first_line(error)) from error


def read_metadata(path: Location, size: int | None = None) -> dict[str, Any]:
    """The JSON of a file's footer. Raises `DamagedPart` or `StoreError` (unknown format version)."""
    return _metadata(path, _footer(path, size))


def _footer(path: Location, size: int | None = None) -> pq.FileMetaData:
    source = _open(path, size)
    try:
        return pq.read_metadata(source)
    except PermissionError as error:
        raise _unreadable(path, error) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, f"its footer can't be read: {_first_line(error)}") from error


def read_schema(path: Location) -> pa.Schema:
    """A file's columns, from its footer alone. Raises as `read_metadata`."""
    return _footer(path).schema.to_arrow_schema().remove_metadata()


def _open(path: Location, size: int | None = None) -> Path | pa.PythonFile:
    """What pyarrow reads: of a remote file only as much as it wants."""
    if isinstance(path, RemotePath):
        return pa.PythonFile(storage.RangedFile(path, size), mode="r")
    if not path.is_file():
        raise StoreError(f"{path}: no such file; annotate this shard")
    return path.absolute()


def _metadata(path: Location, footer: pq.FileMetaData) -> dict[str, Any]:
    try:
        metadata = json.loads((footer.metadata or {})[METADATA_KEY])
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"its footer can't be read: {_first_line(error)}") from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {version}, this version reads {FORMAT_VERSION}; use a matching pseudolabel"
        )
    return dict(metadata)


def read_info(path: Location, size: int | None = None) -> PartInfo:
    """What a part says of itself, from its footer alone. Raises as `read_metadata`."""
    return _part_info(path, read_metadata(path, size))


def _part_info(path: Location, metadata: Mapping[str, Any]) -> PartInfo:
    try:
        return PartInfo(**{name: metadata[name] for name in PartInfo.__dataclass_fields__})
    except KeyError as error:
        raise damaged(path, f"its metadata lacks {error}") from error


def _unreadable(path: Location, error: OSError) -> StoreError:
    return StoreError(f"{path}: not readable ({error.strerror}); change its permissions")


def damaged(path: Location, why: str) -> DamagedPart:
    return DamagedPart(
        f"{path}: this file of the store is damaged: {why}\ndelete it and run the same annotate "
        "again: only this shard is redone"
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
