"""Looking into a store: columns, histograms, SQL. Answers equal those of numpy and pyarrow; nothing is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Invoke, Refuse, annotated
from conftest import Cli, digit_like
from object_stores import Bucket

from pseudolabel import storage
from pseudolabel.database import scratch_database
from pseudolabel.decoding import DecodedBatch, ShardEnd
from pseudolabel.errors import DamagedPart, QueryError, StoreError, StoreMismatch
from pseudolabel.labels.encodings import Dense
from pseudolabel.labels.facts import summarize
from pseudolabel.labels.histograms import _bins, store_histograms
from pseudolabel.labels.part import PartBuilder
from pseudolabel.labels.query import query_store
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
        columns = {
            **encoding.encode(logits_BC, torch.zeros(len(logits_BC)).long()),
            **summarize(logits_BC),
            "finite": torch.ones(len(logits_BC)),
        }
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


# --- histograms


def test_histograms_equal_a_direct_count(tmp_path: Path) -> None:
    made = made_store(tmp_path / "store", rows=[500, 0, 301], num_classes=7)
    found = store_histograms(made.root)
    whole = pa.concat_tables([made.read(name) for name in made.part_names()])
    limits = {"confidence": 1.0, "entropy": math.log(7), "margin": 1.0}
    for name, limit in limits.items():
        counts, edges = np.histogram(whole[name].to_numpy().astype(np.float64), bins=20, range=(0.0, limit))
        histogram = getattr(found, name)
        assert histogram.counts == tuple(counts.tolist())
        assert np.allclose(histogram.edges, edges, rtol=0, atol=1e-12)
    assert (found.rows, found.view) == (801, 0)
    pred, label = whole["pred"].to_numpy(), np.array(whole["label"].fill_null(-1))
    assert found.classes == tuple(int((pred == number).sum()) for number in range(7))
    assert found.labeled is not None
    assert found.labeled.rows == int((label >= 0).sum())
    assert found.labeled.accuracy == float((pred == label)[label >= 0].mean())
    inside = np.histogram(whole["confidence"].to_numpy()[pred == label], bins=20, range=(0.0, 1.0))[0]
    assert found.labeled.agreeing_counts == tuple(inside.tolist())


def test_values_at_and_beyond_the_limits_count_at_the_edge() -> None:
    values = pa.chunked_array([pa.array([0.0, -1e-7, 1.0, 1.0000001, 0.05, 0.95], pa.float32())])
    assert _bins(values, 1.0).tolist() == [0, 0, 19, 19, 1, 18]


def test_one_view_is_counted(tmp_path: Path) -> None:
    made = made_store(tmp_path / "store", rows=[50], num_views=3)
    for view in range(3):
        found = store_histograms(made, view=view)
        wanted = made.read_view("s-0", ["pred"], view=view)["pred"].to_pylist()
        assert found.classes == tuple(wanted.count(number) for number in range(4))
    with pytest.raises(StoreError, match="has no view 3; its views are 0 to 2"):
        store_histograms(made, view=3)


def test_histograms_of_nothing(tmp_path: Path, invoke: Invoke) -> None:
    made = made_store(tmp_path / "store", rows=[])
    found = store_histograms(made)
    assert (found.rows, found.labeled, sum(found.entropy.counts)) == (0, None, 0)
    code, out, _ = invoke("inspect", made.root, "--histograms")
    assert (code, "0 rows of view 0" in out) == (0, True)


def test_a_remote_store_is_counted_alike(bucket: Bucket, tmp_path: Path) -> None:
    made = made_store(tmp_path / "made", rows=[20, 30])
    for path in ("store.json", "parts/s-0.parquet", "parts/s-1.parquet"):
        storage.write_atomic(storage.location(f"{bucket.url}/store/{path}"), (made.root / path).read_bytes())
    assert store_histograms(f"{bucket.url}/store") == store_histograms(made)
    sql = "SELECT shard, count(*), max(logits[1]) FROM labels GROUP BY 1 ORDER BY 1"
    assert query_store(f"{bucket.url}/store", sql) == query_store(made, sql)


def test_what_inspect_prints(tmp_path: Path, invoke: Invoke, answer: Callable[..., dict[str, Any]]) -> None:
    made = made_store(tmp_path / "store", rows=[3000], num_classes=30)
    code, out, _ = invoke("inspect", made.root, "--histograms")
    assert code == 0
    counts = store_histograms(made).confidence.counts
    lines = out[out.index("confidence (bars: logarithm") :].splitlines()[1:21]
    assert [int(line.split()[3].replace(",", "")) for line in lines] == list(counts)
    assert lines[counts.index(max(counts))].endswith(" " + "█" * 32)
    assert "predicted classes, 30 of 30; the 10 most frequent and the 10 rarest" in out
    assert re.search(r"agreement with labels: \d\.\d\d% of 2,000 rows", out)
    found = answer("inspect", made.root, "--histograms")
    assert found["rows"] == 3000
    assert found["histograms"]["confidence"]["counts"] == list(counts)
    assert len(found["histograms"]["classes"]["pred"]) == 30
    assert set(found["histograms"]["labeled"]) == {
        "rows", "agreeing", "accuracy", "edges", "counts", "agreeing_counts"
    }  # fmt: skip
    assert "histograms" not in answer("inspect", made.root)


def test_options_that_would_have_no_effect_are_refused(store: Path, invoke: Invoke) -> None:
    for options in (("--view", 0), ("--sql", "SELECT 1", "--histograms"), ("--sql", "SELECT 1", "--rejects")):
        code, _, err = invoke("inspect", store, *options)
        assert code == 2, err


# --- SQL


def test_answers_are_those_of_pyarrow(tmp_path: Path, answer: Callable[..., dict[str, Any]]) -> None:
    made = made_store(tmp_path / "store", rows=[40, 25])
    parts = {name: made.read(name) for name in made.part_names()}
    whole = pa.concat_tables(
        table.append_column("shard", pa.array([name] * table.num_rows)) for name, table in parts.items()
    )
    everything = answer("inspect", made.root, "--sql", "FROM labels ORDER BY shard, index;")
    assert everything["columns"] == whole.column_names
    assert everything["rows"] == [list(row.values()) for row in whole.to_pylist()]
    by_class = answer("inspect", made.root, "--sql", "SELECT pred, count(*) FROM labels GROUP BY 1 ORDER BY 1 -- all")
    counted = whole.group_by("pred").aggregate([("pred", "count")]).sort_by("pred").to_pylist()
    assert by_class["rows"] == [[one["pred"], one["pred_count"]] for one in counted]
    # a filter on columns that aren't in the answer
    sql = "SELECT key FROM labels WHERE shard = 's-1' AND label IS NULL AND confidence > 0.5 ORDER BY key"
    wanted = [row for row in parts["s-1"].to_pylist() if row["label"] is None and row["confidence"] > 0.5]
    assert 0 < len(wanted) < 25
    assert answer("inspect", made.root, "--sql", sql)["rows"] == sorted([row["key"]] for row in wanted)


def test_classes_and_rejects_are_there(
    tmp_path: Path, make_shard: Callable[..., Path], teacher_dir: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    make_shard("a", [("good", {"png": digit_like(1, 0)}), ("bad", {"png": b"no image"})])
    make_shard("b", [(f"fine {number}", {"png": digit_like(2, 0)}) for number in range(9)])
    store = annotated(tmp_path / "shards", teacher_dir, tmp_path / "store")
    found = answer("inspect", store, "--sql", "SELECT shard, key, index, stage FROM rejects")
    assert found == {"columns": ["shard", "key", "index", "stage"], "rows": [["a", "bad", 1, "decode"]]}
    sql = "SELECT key, name FROM labels JOIN classes ON number = pred WHERE index = 0 ORDER BY key"
    preds = {name: open_store(store).read(name)["pred"][0].as_py() for name in "ab"}
    rows = answer("inspect", store, "--sql", sql)["rows"]
    assert rows == [["fine 0", f"class {preds['b']}"], ["good", f"class {preds['a']}"]]


def test_values_that_json_does_not_know(store: Path, answer: Callable[..., dict[str, Any]]) -> None:
    sql = (
        "SELECT 'nan'::FLOAT, '-inf'::DOUBLE, DATE '2026-01-02', 1.5, [1, NULL], {'a': 'nan'::FLOAT}, NULL, true, "
        "'ab'::BLOB, 170141183460469231731687303715884105727"
    )
    row = answer("inspect", store, "--sql", sql)["rows"][0]
    assert row == [None, None, "2026-01-02", 1.5, [1, None], {"a": None}, None, True, "6162", 2**127 - 1]


def test_people_see_some_rows_and_how_many_more(store: Path, invoke: Invoke) -> None:
    code, out, _ = invoke(
        "inspect", store, "--sql", "SELECT key AS \"[bold]k\", '[red]x' AS v FROM labels ORDER BY key"
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["[bold]k", "v"]
    assert [line.split()[0] for line in lines[1:21]] == [f"unlabeled/0-{number:03d}" for number in range(20)]
    assert lines[1].split()[1] == "[red]x"
    assert lines[21:] == ["… and 52 more rows; ORDER BY and LIMIT choose"]


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", "syntax error at or near"),
        ("SELECT nothing FROM labels", "nothing"),
        ("SELECT * FROM label", "Table with name label does not exist"),
        ("SELECT 'x'::INT", "Could not convert string 'x'"),
        ("", "a single SELECT is wanted, this is none"),
        ("SELECT 1; SELECT 2", "this is SELECT and SELECT"),
        ("DELETE FROM labels", "this is DELETE"),
        ("COPY labels TO 'x.csv'", "this is COPY"),
        ("EXPLAIN ANALYZE COPY labels TO 'x.csv'", "this is EXPLAIN"),
        ("ATTACH 'x.db'", "this is ATTACH"),
        ("SET enable_external_access = true", "this is SET"),
        ("INSTALL httpfs", "this is LOAD"),
        ("CREATE TABLE t AS SELECT 1", "this is CREATE"),
        ("EXPORT DATABASE 'x'", "this is EXPORT"),
        ("WITH a AS (INSERT INTO labels VALUES (1) RETURNING *) FROM a", "Error"),
        ("FROM read_csv('{store}/store.json')", "file system operations are disabled"),
        ("FROM read_text('{store}/store.json')", "file system operations are disabled"),
        ("FROM '{store}/parts/unlabeled-0.parquet'", "does not exist|disabled"),
        ("FROM glob('{store}/*')", "file system operations are disabled"),
        ("FROM query('COPY labels TO ''x.csv''')", "Error"),
        ("SELECT * FROM tables", "Table with name tables does not exist"),
    ],
)
def test_sql_only_reads_and_only_the_store(store: Path, refuse: Refuse, sql: str, said: str) -> None:
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    refuse("inspect", store, "--sql", sql.format(store=store), kind="QueryError", said=said)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_an_answer_larger_than_memory_should_hold_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pseudolabel.labels.query.MOST_VALUES", 100)
    assert len(query_store(store, "SELECT key, pred FROM labels LIMIT 50").rows) == 50
    for sql in ("SELECT key, pred FROM labels", "SELECT logits FROM labels"):
        with pytest.raises(QueryError, match="more than 100 values"):
            query_store(store, sql)


def test_a_query_tells_of_a_damaged_part(store: Path, refuse: Refuse) -> None:
    path = open_store(store).part_path("unlabeled-1")
    content = bytearray(path.read_bytes())
    content[chunk(path, "logits").stop - 5] ^= 1
    path.write_bytes(content)
    said = r"unlabeled-1.parquet: this file of the store is damaged"
    refuse("inspect", store, "--sql", "SELECT max(logits[1]) FROM labels", kind="DamagedPart", said=said)
    with pytest.raises(DamagedPart, match=said):
        query_store(store, "SELECT logits FROM labels")
    assert query_store(store, "SELECT count(confidence) FROM labels").rows == [[72]]


def test_a_query_that_stops_early_ends_well(tmp_path: Path, cli: Cli) -> None:
    """pyarrow's scanner would still read ahead in its threads when the process ends, and crash it."""
    made = made_store(tmp_path / "store", rows=[3000] * 4, num_classes=200)
    found, _ = cli("inspect", made.root, "--sql", "SELECT key, logits FROM labels LIMIT 1")
    assert len(found["rows"][0][1]) == 200


def test_ctrl_c_is_not_an_error_of_a_query() -> None:
    """DuckDB makes a RuntimeError of it."""
    with pytest.raises(KeyboardInterrupt), scratch_database():
        raise RuntimeError("Query interrupted")
