"""What the parts' footers say, kept in one file, so that a store of a hundred thousand parts is known in a second.

STORE/log/footers.parquet is a cache: each row holds a part's footer with the size and time of the part file that it was
read from, and counts only while the file has these. It may be deleted; `verify` and training don't use it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pseudolabel.errors import PseudolabelError, StorageError
from pseudolabel.labels import schema
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import Store

_SCHEMA = pa.schema([("shard", pa.string()), ("bytes", pa.int64()), ("time_ns", pa.int64()), ("info", pa.string())])
WORTH_IT = 100  # new footers before the file is written again
_CHUNK = 10_000  # rows that are Python objects at once, beside those that are kept


class Footer(NamedTuple):
    """A part's footer as JSON, and the size and time of change of its file. Small: there may be a hundred thousand."""

    bytes: int
    time_ns: int
    text: str

    @property
    def info(self) -> PartInfo:
        """What it says, read anew each time."""
        return PartInfo(**json.loads(self.text))


def read_footers(store: Store, only: Container[str] | None = None, *, keep: bool = False) -> dict[str, Footer]:
    """Of all parts, or `only` of these shards, by shard, sorted; from the cache where the part file is the one it
    knows. `keep` writes the cache again if many were not in it. Raises as `Store.info`.
    """
    known = _load(store)
    found: dict[str, Footer] = {}
    new = 0
    for name, size, time_ns in sorted(_listed(store.root / "parts")):
        if only is not None and name not in only:
            continue
        footer = known.get(name)
        if footer is None or (footer.bytes, footer.time_ns) != (size, time_ns):
            footer = Footer(size, time_ns, json.dumps(store.info(name).to_json()))
            new += 1
        found[name] = footer
    if keep and new >= WORTH_IT:
        with contextlib.suppress(StorageError):  # a cache, on a disk that may be full
            _save(store, {**known, **found})
    return found


def _path(store: Store) -> Path:
    return store.root / "log" / "footers.parquet"


def _listed(directory: Path) -> Iterator[tuple[str, int, int]]:
    """Shard, bytes and time of every part file."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                status = entry.stat()
                yield entry.name.removesuffix(".parquet"), status.st_size, status.st_mtime_ns


def _load(store: Store) -> dict[str, Footer]:
    path = _path(store)
    try:
        if schema.read_metadata(path).get("fingerprint") != store.fingerprint:
            return {}
        batches = schema.read_table(path).to_batches(max_chunksize=_CHUNK)
        columns = (batch.to_pydict().values() for batch in batches)
        return {name: Footer(*facts) for chunk in columns for name, *facts in zip(*chunk, strict=True)}
    except (PseudolabelError, KeyError, TypeError, ValueError):
        return {}  # none there, or spoiled: the footers are read again


def _save(store: Store, footers: Mapping[str, Footer]) -> None:
    columns = [
        list(footers),
        [one.bytes for one in footers.values()],
        [one.time_ns for one in footers.values()],
        [one.text for one in footers.values()],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    facts = {"format_version": schema.FORMAT_VERSION, "fingerprint": store.fingerprint}
    schema.write_sealed(_path(store), pa.Table.from_arrays(arrays, schema=_SCHEMA), facts)
