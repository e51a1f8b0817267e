"""The rows that were chosen, leaving the database shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pseudolabel.database import batches_of
from pseudolabel.selection import SCHEMA

if TYPE_CHECKING:
    from pseudolabel.database import Connection

_FETCHED = 100_000  # rows that leave the database at once


def manifest_parts(connection: Connection, shards: Sequence[str], num_views: int) -> Iterator[tuple[str, pa.Table]]:
    """The manifest's rows, shard by shard; a shard of which nothing is selected has none."""
    question = "select part, index, weight from chosen order by part, index"
    part, pieces = 0, list[pa.Table]()
    for batch in batches_of(connection, question, _FETCHED):
        numbers = batch.column(0).to_numpy()
        for piece in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers)) + 1):
            if not len(piece):
                continue
            while part < numbers[piece[0]]:
                yield shards[part], _with_views(pieces, num_views)
                part, pieces = part + 1, []
            pieces.append(pa.Table.from_batches([batch.slice(int(piece[0]), len(piece)).select(["index", "weight"])]))
    while part < len(shards):
        yield shards[part], _with_views(pieces, num_views)
        part, pieces = part + 1, []


def _with_views(pieces: Sequence[pa.Table], num_views: int) -> pa.Table:
    if not pieces:
        return SCHEMA.empty_table()
    table = pa.concat_tables(pieces)
    views = np.tile(np.arange(num_views, dtype=np.int16), len(table))
    index, weight = (np.repeat(table[name].to_numpy(), num_views) for name in ("index", "weight"))
    return pa.table([index, views, weight], schema=SCHEMA)
