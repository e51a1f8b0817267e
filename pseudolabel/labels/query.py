"""Questions in SQL over a whole store, answered by DuckDB.

    labels    all columns of all parts, and `shard`; logits as lists of float
    rejects   the ledger: shard, index, key, stage, error, detail
    classes   number, name

DuckDB asks for the columns that a question needs, and gets them part by part through `Store.read_columns`: so page
checksums and fingerprints are checked, a store may be at a URL, and no question holds more than a part. (DuckDB's own
reader knows no float16 of the encoding that parts have, and checks nothing.) The user's SQL itself opens no files.
"""

from __future__ import annotations

import datetime
import decimal
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from pseudolabel.database import Connection, Relation, foreign_question, scratch_database
from pseudolabel.errors import PseudolabelError, QueryError
from pseudolabel.labels import schema
from pseudolabel.labels.footers import read_footers
from pseudolabel.labels.store import Store, open_store

MOST_VALUES = 2_000_000
"""Numbers and texts of an answer, those in lists counted one by one: what is held in memory."""
_BATCH_ROWS = 2048
_FETCHED_ROWS = 64


@dataclass(frozen=True)
class Answer:
    """Rows of values that JSON knows. `more` rows are not among them."""

    columns: tuple[str, ...]
    rows: list[list[Any]]
    more: int


def query_store(store: Store | str | os.PathLike[str], sql: str, most: int | None = None) -> Answer:
    """Answer a SELECT, with `most` rows or all.

    Raises:
        QueryError: the SQL is wrong, does more than reading, or all of its answer is more than memory should hold.
        StoreError, StoreMismatch, DamagedPart, StorageError.
    """
    store = store if isinstance(store, Store) else open_store(store)
    tables = _tables(store)
    try:
        with scratch_database() as connection:
            for name, table in tables.items():
                connection.register(name, table)
            with foreign_question(connection, sql) as relation:
                return _all_of(connection, sql) if most is None else _first(relation, most)
    except PseudolabelError:
        for table in tables.values():
            if isinstance(table, _Parts) and table.failure is not None:
                raise table.failure from None
        raise


def _first(relation: Relation, most: int) -> Answer:
    rows = relation.limit(most + 1).fetchall()
    more = 0
    if len(rows) > most:
        more = relation.aggregate("count(*)").fetchall()[0][0] - most
    return Answer(tuple(relation.columns), [_plain(row) for row in rows[:most]], more)


def _all_of(connection: Connection, sql: str) -> Answer:
    result = connection.execute(sql)
    columns = tuple(name for name, *_ in result.description or ())
    rows: list[list[Any]] = []
    values = 0
    while found := result.fetchmany(_FETCHED_ROWS):
        rows += [_plain(row) for row in found]
        values += sum(len(value) if isinstance(value, (list, tuple)) else 1 for row in found for value in row)
        if values > MOST_VALUES:
            raise QueryError(
                f"the answer has more than {MOST_VALUES:,} values; {len(rows):,} rows are not all of it\nadd a LIMIT, "
                "count or average in SQL, or read the parts themselves (docs/reading-stores.md)"
            )
    return Answer(columns, rows, 0)


def _tables(store: Store) -> dict[str, Any]:
    footers = read_footers(store)
    rejecting = [shard for shard, footer in footers.items() if footer.info.rejects]
    numbers = pa.array(range(store.identity.num_classes), pa.int32())

    def read_labels(shard: str, columns: Sequence[str]) -> pa.Table:
        stored = [name for name in columns if name != "shard"] or ["index"]
        table = store.read_columns(shard, stored)
        return table.append_column("shard", pa.array([shard], pa.string()).take(pa.repeat(0, table.num_rows)))

    def read_rejects(shard: str, columns: Sequence[str]) -> pa.Table:
        return store.read_rejects(shard)

    return {
        "labels": _Parts(_label_schema(store, list(footers)), list(footers), read_labels),
        "rejects": _Parts(schema.REJECT_SCHEMA, rejecting, read_rejects),
        "classes": pa.table({"number": numbers, "name": pa.array(store.identity.classes, pa.string())}),
    }


def _label_schema(store: Store, shards: Sequence[str]) -> pa.Schema:
    """Of the first part, as all parts of a store are alike."""
    fields = schema.part_schema([], augmented=store.identity.num_views > 1)
    if shards:
        fields = schema.read_schema(store.part_path(shards[0]))
    return pa.schema([*map(_widened, fields), pa.field("shard", pa.string(), nullable=False)])


def _widened(field: pa.Field) -> pa.Field:
    """DuckDB has no float16."""
    if pa.types.is_fixed_size_list(field.type) and pa.types.is_float16(field.type.value_type):
        return field.with_type(pa.list_(pa.float32(), field.type.list_size))
    return field


class _Parts(ds.InMemoryDataset):  # type: ignore[misc]
    """Parts as DuckDB scans a dataset of pyarrow's: it asks `scanner` for columns and a filter, that `to_reader` for
    batches. pyarrow's own scanner would read ahead in threads that can crash a process which ends.
    """

    failure: PseudolabelError | KeyboardInterrupt | None = None

    def __init__(
        self, schema: pa.Schema, shards: Sequence[str], read: Callable[[str, Sequence[str]], pa.Table]
    ) -> None:
        super().__init__([], schema=schema)
        self._shards, self._read = shards, read

    def scanner(self, columns: Sequence[str] | None = None, filter: ds.Expression | None = None, **_: Any) -> _Scan:
        wanted = self.schema.names if columns is None else columns
        projected = pa.schema([self.schema.field(name) for name in wanted])
        return _Scan(pa.RecordBatchReader.from_batches(projected, self._batches(projected, filter)))

    def _batches(self, projected: pa.Schema, condition: ds.Expression | None) -> Iterator[pa.RecordBatch]:
        told = str(condition)  # whose columns DuckDB need not ask for; one too many does no harm
        needed = [name for name in self.schema.names if name in projected.names or name in told]
        try:
            for shard in self._shards:
                table = self._read(shard, needed)
                if condition is not None:
                    table = table.filter(condition)
                for batch in table.select(projected.names).to_batches(max_chunksize=_BATCH_ROWS):
                    yield batch.cast(projected)
        except (PseudolabelError, KeyboardInterrupt) as error:
            self.failure = error  # of which DuckDB would pass on the text alone
            raise


@dataclass(frozen=True)
class _Scan:
    reader: pa.RecordBatchReader

    def to_reader(self) -> pa.RecordBatchReader:
        return self.reader


def _plain(value: Any) -> Any:
    """As JSON has it: dates and what else has a text as text, NaN and infinity as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)
