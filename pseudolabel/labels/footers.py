"""What the parts' footers say, kept in one file, so that a store of a hundred thousand parts is known in a second.

STORE/log/footers.parquet is a cache: each row holds a part's footer with the size and version (on a disk: the time of
change) of the part file that it was read from, and counts only while the file has these. It may be deleted; `verify`
and training don't use it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from pseudolabel.errors import PseudolabelError, StorageError
from pseudolabel.labels import schema
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import Store
from pseudolabel.storage import Location, RemotePath

_SCHEMA = pa.schema([("shard", pa.string()), ("bytes", pa.int64()), ("time_ns", pa.int64()), ("info", pa.string())])
WORTH_IT = 100  # new footers before the file is written again
_AT_ONCE = 32  # footers asked of an object storage
_CHUNK = 10_000  # rows that are Python objects at once, beside those that are kept


class Footer(NamedTuple):
    """A part's footer as JSON, and the size and version of its file. Small: there may be a hundred thousand."""

    bytes: int
    time_ns: int
    text: str

    @property
    def info(self) -> PartInfo:
        """What it says, read anew each time."""
        return PartInfo(**json.loads(self.text))


def read_footers(store: Store, only: Collection[str] | None = None, *, keep: bool = False) -> dict[str, Footer]:
    """Of all parts, or `only` of these shards, by shard, sorted; from the cache where the part file is the one it
    knows. `keep` writes the cache again if many were not in it. Raises as `Store.info`.
    """
    known = _load(store)
    files = {one.name.removesuffix(".parquet"): one for one in store.part_files(only if only is not None else known)}
    wanted = [name for name in files if only is None or name in only]
    unknown = [name for name in wanted if name not in known or known[name][:2] != files[name][1:]]

    def read(name: str) -> Footer:
        _, size, version = files[name]
        return Footer(size, version, json.dumps(store.info(name, size).to_json()))

    if isinstance(store.root, RemotePath):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            fresh = dict(zip(unknown, pool.map(read, unknown), strict=True))
    else:
        fresh = {name: read(name) for name in unknown}
    found = {name: fresh.get(name) or known[name] for name in wanted}
    if keep and len(fresh) >= WORTH_IT:
        with contextlib.suppress(StorageError):  # a cache, on a disk that may be full
            _save(store, {**known, **found})
    return found


def _path(store: Store) -> Location:
    return store.root / "log" / "footers.parquet"


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
