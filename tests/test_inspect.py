"""Looking into a store: columns, histograms, SQL. Answers equal those of numpy and pyarrow; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from object_stores import Bucket

from pseudolabel import storage
from pseudolabel.decoding import DecodedBatch, ShardEnd
from pseudolabel.errors import DamagedPart, StoreError, StoreMismatch
from pseudolabel.labels.encodings import Dense, summarize
from pseudolabel.labels.part import PartBuilder
from pseudolabel.labels.store import Store, StoreIdentity, create, open_store
from pseudolabel.views.draw import View

SMALL_COLUMNS = ["margin", "key", "pred", "confidence"]


def chunk(path: Path, column: str) -> slice:
    """Where a column of the first row group lies in the file."""
    group = pq.read_metadata(path).row_group(0)
    found = next(
        one for one in map(group.column, range(group.num_columns)) if one.path_in_schema.split(".")[0] == column
    )
    start = found.dictionary_page_offset if found.has_dictionary_page else found.data_page_offset
    return slice(start, start + found.total_compressed_size)


def made_store(root: Path, *, rows: Sequence[int], num_classes: int = 4, num_views: int = 1) -> Store:
    """A store without an annotation: a part `s-0`, `s-1`, … of so many samples each, every third without a label."""
    classes = tuple(f"class {index}" for index in range(num_classes))
    store = create(root, StoreIdentity({}, classes, "dense", {"count": num_views}, "fp32"))
    encoding = Dense()
    for part, count in enumerate(rows):
        builder = PartBuilder(f"s-{part}", encoding, num_classes, store.fingerprint, num_views)
        logits_BC = 2 * torch.randn(count * num_views, num_classes, generator=torch.Generator().manual_seed(part))
        columns = {**encoding.encode(logits_BC), **summarize(logits_BC), "finite": torch.ones(len(logits_BC))}
        numbers = range(count)
        views = [tuple(View(view) for view in range(num_views)) for _ in numbers]
        labels = [None if number % 3 == 2 else number % num_classes for number in numbers]
        builder.add(DecodedBatch([f"key-{n}" for n in numbers], list(numbers), labels, views=views), columns)
        made = builder.finish(ShardEnd(size=0, sha256="0" * 64, samples=count))
        store.commit(made.info, made.part, made.rejects)
    return store


# --- columns


def test_columns_are_those_of_the_whole_table(store: Path) -> None:
    opened = open_store(store)
    found = opened.read_columns("unlabeled-1", SMALL_COLUMNS)
    assert found.column_names == SMALL_COLUMNS
    assert found == opened.read("unlabeled-1").select(SMALL_COLUMNS)


def test_other_columns_are_not_touched(store: Path) -> None:
    """Garbage over the logits: those who look at confidence alone need not know, those who read all are told."""
    opened = open_store(store)
    path = opened.part_path("unlabeled-1")
    wanted = opened.read("unlabeled-1", ["confidence"])
    content = bytearray(path.read_bytes())
    where = chunk(path, "logits")
    content[where] = b"\xa5" * (where.stop - where.start)
    path.write_bytes(content)
    assert opened.read_columns("unlabeled-1", ["confidence"]) == wanted
    for read in (opened.read, opened.read_columns):
        with pytest.raises(DamagedPart, match=r"unlabeled-1.parquet: this file of the store is damaged.*\ndelete it"):
            read("unlabeled-1", ["logits"])


@pytest.mark.parametrize("column", SMALL_COLUMNS)
def test_a_flipped_bit_of_a_page_is_found(store: Path, column: str) -> None:
    """Of any byte behind the page's header, in every column that is read, dictionaries included."""
    opened = open_store(store)
    path = opened.part_path("unlabeled-0")
    whole = path.read_bytes()
    where = chunk(path, column)
    for position in (where.stop - 1, where.stop - 9):
        content = bytearray(whole)
        content[position] ^= 4
        path.write_bytes(content)
        with pytest.raises(DamagedPart, match=r"unlabeled-0.parquet"):
            opened.read_columns("unlabeled-0", SMALL_COLUMNS)
    path.write_bytes(whole[:-30])
    with pytest.raises(DamagedPart, match=r"unlabeled-0.parquet"):
        opened.read_columns("unlabeled-0", SMALL_COLUMNS)


def test_columns_of_a_part_that_does_not_belong_are_refused(store: Path) -> None:
    opened = open_store(store)
    with pytest.raises(StoreError, match=r"unlabeled-0.parquet: has no column 'crop'; it has key, index, view, label"):
        opened.read_columns("unlabeled-0", ["crop"])
    with pytest.raises(StoreError, match=r"nowhere.parquet: no such file"):
        opened.read_columns("nowhere", ["pred"])
    opened.part_path("unlabeled-0").rename(opened.part_path("other"))
    with pytest.raises(StoreMismatch, match="holds the labels of shard 'unlabeled-0', not 'other'"):
        opened.read_columns("other", ["pred"])
    whole = (store / "store.json").read_text()
    assert '"precision": "fp32"' in whole
    (store / "store.json").unlink()
    foreign = type(opened)(opened.root, type(opened.identity)({}, ("a",), "dense", {"count": 1}, "fp32"))
    with pytest.raises(StoreMismatch, match="made with fingerprint"):
        foreign.read_columns("unlabeled-1", ["pred"])


def test_of_a_remote_part_only_its_columns_are_fetched(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_store(tmp_path / "made", rows=[2000], num_classes=100)
    for path in ("store.json", "parts/s-0.parquet"):
        storage.write_atomic(storage.location(f"{bucket.url}/store/{path}"), (made.root / path).read_bytes())
    found = open_store(f"{bucket.url}/store")
    read_range = storage.RemotePath.read_range
    fetched: list[int] = []

    def counted(self: storage.RemotePath, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return read_range(self, start, stop)

    monkeypatch.setattr(storage.RemotePath, "read_range", counted)
    assert found.read_columns("s-0", ["confidence", "pred"]) == made.read("s-0", ["confidence", "pred"])
    assert sum(fetched) < 100_000 < 300_000 < storage.entry(made.part_path("s-0")).size
    assert len(fetched) <= 3
