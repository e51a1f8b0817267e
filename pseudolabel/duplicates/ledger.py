"""The file of leaks: which samples of which shards show what an evaluation shows. One sealed Parquet file.

A row is a leaking sample and its nearest match. The footer holds JSON under the key `pseudolabel`: how it was searched,
and the SHA-256 of every shard looked at, by name: `shards` those that leak, `against` those of the evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import pyarrow as pa

from pseudolabel import storage
from pseudolabel.errors import StoreError
from pseudolabel.labels import schema
from pseudolabel.storage import Location

FORMAT_VERSION = schema.FORMAT_VERSION
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("distance", pa.int32(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("against_shard", pa.string(), nullable=False),
        pa.field("against_key", pa.string(), nullable=False),
        pa.field("against_index", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, order=True)
class Leak:
    """A sample and what it repeats. `kind` is exact or near; `distance` is in bits of the perceptual hash."""

    shard: str
    index: int
    key: str
    kind: str
    distance: int
    similarity: float
    against_shard: str
    against_key: str
    against_index: int


@dataclass(frozen=True)
class Leaks:
    """`excluded`: the positions of the samples that leak, sorted, by shard. `shards` and `against`: the SHA-256 of what
    was looked at, by name.
    """

    excluded: Mapping[str, list[int]]
    shards: Mapping[str, str]
    against: Mapping[str, str]


def write_leaks(path: Location, leaks: Iterable[Leak], metadata: Mapping[str, object]) -> None:
    """Write the file, whole or not at all. Raises `StorageError`."""
    rows = [astuple(one) for one in sorted(leaks)]
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    facts = {"format_version": FORMAT_VERSION, "kind": "leaks", **metadata}
    schema.write_sealed(path, pa.Table.from_arrays(arrays, schema=SCHEMA), facts)


def read_leaks(path: str | os.PathLike[str]) -> Leaks:
    """Read what `leaks` wrote, every byte verified.

    Raises:
        StoreError: there is no such file, or it is another one.
        DamagedPart: it was changed or cut short.
        StorageError: it can't be read.
    """
    place = storage.location(path)
    if not place.is_file():
        raise StoreError(f"{place}: no such file; make it with `pseudolabel leaks`")
    table = schema.read_table(place)
    facts = schema.read_metadata(place)
    if facts.get("kind") != "leaks" or table.schema.remove_metadata() != SCHEMA:
        raise StoreError(f"{place}: holds no leaks but something else; name what `pseudolabel leaks --out` made")
    excluded: dict[str, list[int]] = {}
    for shard, index in zip(table["shard"].to_pylist(), table["index"].to_pylist(), strict=True):
        excluded.setdefault(shard, []).append(index)
    return Leaks({shard: sorted(found) for shard, found in excluded.items()}, facts["shards"], facts["against"])
