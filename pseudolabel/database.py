"""DuckDB, for what doesn't fit into memory: sorting and counting the rows of a whole store.

A database lives in a scratch directory (under TMPDIR) for as long as one question takes. It spills to disk beyond its
share of memory, fetches no extensions, and uses as many threads as this process may use cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pseudolabel.errors import StorageError
from pseudolabel.storage import scratch_directory

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

MEMORY = 400 << 20
"""Bytes that a database may hold before it spills."""


@contextmanager
def scratch_database(memory: int = MEMORY) -> Iterator[DuckDBPyConnection]:
    """A connection to an empty database, gone afterwards. Raises `StorageError` for a full disk, and whatever duckdb
    raises for a question that is wrong.
    """
    import duckdb

    with scratch_directory("duckdb") as scratch:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory}B",
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "temp_directory": str(scratch),
            "autoinstall_known_extensions": False,
        }
        connection = duckdb.connect(str(scratch / "scratch.duckdb"), config=settings)
        try:
            yield connection
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            raise StorageError(
                f"{scratch}: the scratch database failed: {str(error).splitlines()[0]}\nset TMPDIR to a disk with "
                "more space"
            ) from error
        finally:
            connection.close()


def table_of(connection: DuckDBPyConnection, question: str) -> pa.Table:
    """The answer, whole."""
    found = connection.execute(question).to_arrow_table()
    assert found is not None
    return found


def batches_of(connection: DuckDBPyConnection, question: str, rows: int) -> Iterator[pa.RecordBatch]:
    """The answer, about so many rows at once."""
    reader = connection.execute(question).to_arrow_reader(rows)
    assert reader is not None
    yield from reader
