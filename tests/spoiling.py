"""Ways to spoil a store: its bytes, its files, and parts edited by someone who knows how to seal them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_stores import Made

from pseudolabel.labels import schema

Spoil = Callable[[Made, random.Random], None]


def flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def edit(root: Path, shard: str, change: Callable[[pa.Table, random.Random], pa.Table], **facts: object) -> None:
    path = root / "parts" / f"{shard}.parquet"
    info = schema.read_info(path)
    table = change(schema.read_table(path), random.Random(0))
    schema.write_sealed(path, table, {**info.to_json(), **facts})


def other_rows(table: pa.Table, _: random.Random) -> pa.Table:
    """Rows 2 and 3 with each other's labels: sealed, and nothing in the store contradicts it."""
    first = table.schema.names.index("pred")
    turned = table.take([0, 1, 3, 2, *range(4, table.num_rows)])
    return pa.table([*table.columns[:first], *turned.columns[first:]], schema=table.schema)


def _file(made: Made, chance: random.Random) -> Path:
    return chance.choice(sorted(made.root.glob("*/*.parquet")))


def changed_bytes(change: Callable[[bytes, random.Random], bytes]) -> Spoil:
    def spoil(made: Made, chance: random.Random) -> None:
        path = _file(made, chance)
        whole = path.read_bytes()
        path.write_bytes(change(whole, chance))
        assert path.read_bytes() != whole

    return spoil


def zeroed(content: bytes, chance: random.Random) -> bytes:
    start = chance.choice([at for at, byte in enumerate(content) if byte])
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def resealed(change: Callable[[pa.Table, random.Random], pa.Table], **facts: object) -> Spoil:
    """A part that was edited by someone who knows how to seal it."""

    def spoil(made: Made, chance: random.Random) -> None:
        path = made.root / "parts" / f"{chance.choice('ab')}.parquet"
        info, table = schema.read_info(path), schema.read_table(path)
        schema.write_sealed(path, change(table, chance), {**info.to_json(), **facts})

    return spoil


def cell(name: str, value: object, row: int | None = None) -> Callable[[pa.Table, random.Random], pa.Table]:
    """Another value in a row; of a list, in its first element."""

    def change(table: pa.Table, chance: random.Random) -> pa.Table:
        values, at = table[name].to_pylist(), chance.randrange(table.num_rows) if row is None else row
        values[at] = [value, *values[at][1:]] if isinstance(values[at], list) and not isinstance(value, list) else value
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return change


def unchanged(table: pa.Table, _: random.Random) -> pa.Table:
    return table


def swapped_rows(table: pa.Table, chance: random.Random) -> pa.Table:
    order = list(range(table.num_rows))
    one, two = chance.sample(order, 2)
    order[one], order[two] = two, one
    return table.take(order)


def row_twice(table: pa.Table, chance: random.Random) -> pa.Table:
    row = chance.randrange(table.num_rows)
    return pa.concat_tables([table.slice(0, row), table.slice(row, 1), table.slice(row)])


def one_key(table: pa.Table, chance: random.Random) -> pa.Table:
    return cell("key", table["key"][0].as_py(), row=chance.randrange(3, table.num_rows))(table, chance)


def turned_labels(table: pa.Table, _: random.Random) -> pa.Table:
    """All columns of logits one row on: a writer's bug that hashes don't see."""
    first = table.schema.names.index("margin") + 1
    turned = table.take([*range(1, table.num_rows), 0])
    return pa.table([*table.columns[:first], *turned.columns[first:]], schema=table.schema)


def of_type(name: str, kind: pa.DataType) -> Callable[[pa.Table, random.Random], pa.Table]:
    def change(table: pa.Table, _: random.Random) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, pa.field(name, kind, nullable=False), table[name].cast(kind))

    return change


def resealed_rejects(change: Callable[[pa.Table, random.Random], pa.Table]) -> Spoil:
    def spoil(made: Made, chance: random.Random) -> None:
        path = made.root / "rejects" / "b.parquet"
        metadata, table = schema.read_metadata(path), schema.read_table(path)
        schema.write_sealed(path, change(table, chance), metadata)

    return spoil


def moved(kind: str, old: str, new: str) -> Spoil:
    return lambda made, _: made.root.joinpath(kind, f"{old}.parquet").rename(made.root / kind / f"{new}.parquet")


def copied(kind: str, old: str, new: str, *, other: bool = False) -> Spoil:
    def spoil(made: Made, _: random.Random) -> None:
        shutil.copy((made.other if other else made.root) / kind / f"{old}.parquet", made.root / kind / f"{new}.parquet")

    return spoil


def swapped_parts(made: Made, _: random.Random) -> None:
    one, two = (made.root / "parts" / f"{name}.parquet" for name in "ab")
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def rewritten(made: Made, chance: random.Random) -> None:
    path = _file(made, chance)
    pq.write_table(pq.read_table(path), path)


def stranger(where: str, content: bytes | None = b"?") -> Spoil:
    def spoil(made: Made, _: random.Random) -> None:
        path = made.root / where
        path.mkdir() if content is None else path.write_bytes(content)

    return spoil


def users_table(made: Made, _: random.Random) -> None:
    pq.write_table(pa.table({"mine": [1, 2]}), made.root / "parts" / "mine.parquet")


def edited_store(made: Made, _: random.Random) -> None:
    path = made.root / "store.json"
    path.write_text(path.read_text().replace('"class 1"', '"class one"'))
