"""A store to select from, its rows, and which of them a selection chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stores import add_part, known, write_store

from pseudolabel.labels.store import Store
from pseudolabel.selection import open_selection
from pseudolabel.selection.select import SelectResult, select
from pseudolabel.settings import SelectSettings

CLASSES = 5
Row = tuple[str, int]


# Its name differs from the function's, so that a test that imports it can have a parameter of that name.
@pytest.fixture(name="store")
def store_to_select_from(tmp_path: Path) -> Store:
    """Two unlabeled shards, one with a reject's gap, and a validation shard."""
    made = write_store(tmp_path / "store", {"u-0": (known(300, CLASSES, 0)[0], [None] * 300)})
    add_part(made, "u-1", known(200, CLASSES, 1)[0], [None] * 200)
    add_part(made, "val", *known(400, CLASSES, 2))
    return made


def rows_of(store: Store, names: tuple[str, ...] = ("u-0", "u-1")) -> dict[Row, dict[str, float]]:
    return {(name, row["index"]): row for name in names for row in store.read(name).to_pylist()}


def chosen_rows(out: Path, store: Store) -> dict[Row, float]:
    opened = open_selection(out)
    tables = {name: opened.read(name, store.info(name).sha256) for name in opened.rows}
    assert {name: len(table) for name, table in tables.items()} == dict(opened.rows)
    return {(name, row["index"]): row["weight"] for name, table in tables.items() for row in table.to_pylist()}


def select_by(store: Store, out: Path, **settings: Any) -> tuple[dict[Row, float], SelectResult]:
    result = select(store, out, SelectSettings(**settings))
    return chosen_rows(out, store), result
