"""Tables as columns, from CSV or Parquet files, and a column of labels as class numbers."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from pseudolabel.classes.numbers import MAX_CLASSES
from pseudolabel.errors import SourceError


def csv_columns(path: Path, delimiter: str) -> dict[str, list[Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns: dict[str, list[Any]] = {name: [] for name in rows.fieldnames or ()}
            for row in rows:
                if None in row or None in row.values():
                    raise SourceError(
                        f"{path}: line {rows.line_num} has another number of fields than the header's {len(columns)}"
                    )
                for name, value in row.items():
                    columns[name].append(value)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: can't be read as CSV: {error}") from error
    return columns


def parquet_columns(path: Path) -> dict[str, list[Any] | Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path.absolute())
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: can't be read as Parquet: {str(error).splitlines()[0]}") from error
    return {name: table[name] for name in table.column_names}


def number_labels(path: Path, column: Any) -> tuple[list[int | None], list[str]]:
    """Numbers stay as they are, names are numbered in sorted order; empty cells have no label."""
    values = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    values = [None if value in (None, "") or value != value else value for value in values]  # NaN is not itself
    present = [value for value in values if value is not None]
    try:
        numbers = [_whole(value) for value in present if not isinstance(value, float) or value.is_integer()]
    except ValueError:
        numbers = []
    except TypeError as error:
        raise SourceError(f"{path}: a label is neither a number nor a name: {error}") from error
    if len(numbers) == len(present):
        if min(numbers, default=0) < 0:
            raise SourceError(
                f"{path}: a label is {min(numbers)}; class numbers start at 0 (leave the cell empty "
                "where there is no label)"
            )
        if max(numbers, default=0) >= MAX_CLASSES:
            raise SourceError(f"{path}: a label is {max(numbers)}: are these ids? choose another --label-column")
        classes = [str(index) for index in range(max(numbers, default=-1) + 1)]
        return [None if value is None else _whole(value) for value in values], classes
    names = sorted({str(value) for value in present})
    number = {name: index for index, name in enumerate(names)}
    return [None if value is None else number[str(value)] for value in values], names


def _whole(value: Any) -> int:
    """A class number. Raises `ValueError` for text that only int() takes for one: 1_0 is a name."""
    if isinstance(value, str) and not (value.strip().removeprefix("-").isdecimal() and value.isascii()):
        raise ValueError(value)
    return int(value)
