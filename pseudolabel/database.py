"""DuckDB, for what doesn't fit into memory: sorting and counting the rows of a whole store.

A database lives in a scratch directory (under TMPDIR) for as long as one question takes. It spills to disk beyond its
share of memory, fetches no extensions, and uses as many threads as this process may use cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from pseudolabel.errors import QueryError, StorageError
from pseudolabel.storage import scratch_directory

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

Connection: TypeAlias = "DuckDBPyConnection"
Relation: TypeAlias = "DuckDBPyRelation"
MEMORY = 400 << 20
"""Bytes that a database may hold before it spills."""
_EXCERPT = "\nLINE "  # of the SQL, as DuckDB shows it below an error: not always the line that the user wrote


@contextmanager
def scratch_database(memory: int = MEMORY) -> Iterator[Connection]:
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
        except RuntimeError as error:
            if "interrupted" in str(error).lower():  # what DuckDB makes of Ctrl-C
                raise KeyboardInterrupt from error
            raise
        finally:
            connection.close()


def table_of(connection: Connection, question: str) -> pa.Table:
    """The answer, whole."""
    found = connection.sql(question).to_arrow_table()
    assert found is not None
    return found


def batches_of(connection: Connection, question: str, rows: int) -> Iterator[pa.RecordBatch]:
    """The answer, about so many rows at once."""
    reader = connection.sql(question).to_arrow_reader(rows)
    assert reader is not None
    yield from reader


@contextmanager
def foreign_question(connection: Connection, sql: str) -> Iterator[Relation]:
    """A user's SQL, which must be a single SELECT or what only reads as one does, ready to be run in the body. From
    then on the connection opens no file and changes no setting. Raises `QueryError`, also for what the body runs into.
    """
    import duckdb

    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            found = " and ".join(str(one.type).rpartition(".")[2] for one in statements[:4]) or "none"
            raise QueryError(
                f"a single SELECT is wanted, this is {found}: {_first_lines(sql)}\nask one question a time"
            )
        for setting in ("enable_external_access = false", "python_enable_replacements = false"):
            connection.execute(f"SET {setting}")
        connection.execute("SET lock_configuration = true")
        yield connection.sql(sql)
    except (duckdb.IOException, duckdb.OutOfMemoryException):
        raise  # of the disk and the memory: `scratch_database` tells
    except duckdb.Error as error:
        raise QueryError(
            f"{_first_lines(str(error).partition(_EXCERPT)[0])}\n`DESCRIBE labels` tells what is there to ask for"
        ) from error


def _first_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][:3])[:500]
