"""The store: identity, commit, seal, verify. Any changed byte is found; nothing that doesn't belong is accepted."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import image_bytes, make_model
from stores import known, write_store

from pseudolabel import storage
from pseudolabel.errors import DamagedPart, StorageError, StoreError, StoreMismatch
from pseudolabel.labeling.work import annotate_shard, identify
from pseudolabel.labels import schema, store
from pseudolabel.labels.store import Store, StoreIdentity
from pseudolabel.labels.summary import summarize_store
from pseudolabel.labels.verify import verify
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import write_shard
from pseudolabel.teachers import parse_teacher

FIXTURE = Path(__file__).parent / "fixtures" / "store-v1"


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Store, list[Shard]]:
    """A store of two shards, one with a reject, made without an engine."""
    return _fill(tmp_path, "topk:3")


def _fill(root: Path, encoding: str) -> tuple[Store, list[Shard]]:
    teacher = parse_teacher(f"checkpoint:{make_model(root / 'model', classes=7)}").load(torch.device("cpu"))
    settings = AnnotateSettings(precision="fp32", encoding=encoding, batch_size=4)
    opened = store.create(root / "store", identify(teacher, settings))
    shards = []
    for name in ("a", "b"):
        samples = [(f"{name}/{index}", {"png": image_bytes(index), "cls": b"3"}) for index in range(9)]
        if name == "b":
            samples[4] = ("b/4", {"png": b"broken"})
        write_shard(root / f"{name}.tar", samples)
        shards.append(Shard(name, str(root / f"{name}.tar")))
        annotated = annotate_shard(shards[-1], teacher, settings)
        opened.commit(annotated.info, annotated.part, annotated.rejects)
    return opened, shards


@pytest.mark.parametrize("encoding", ["dense", "topk:3"])
def test_a_part_has_the_promised_columns_and_metadata(tmp_path: Path, encoding: str) -> None:
    opened, shards = _fill(tmp_path, encoding)
    table = pq.read_table(opened.part_path("b"))
    tail = [("lse", pa.float32()), ("tail_mean", pa.float32()), ("tail_var", pa.float32())]
    sparse = [("topk_id", pa.list_(pa.uint16(), 3)), ("topk_logit", pa.list_(pa.float16(), 3)), *tail]
    wanted = [
        ("key", pa.string()),
        ("index", pa.int32()),
        ("view", pa.int16()),
        ("label", pa.int32()),
        ("pred", pa.int32()),
        ("confidence", pa.float32()),
        ("entropy", pa.float32()),
        ("margin", pa.float32()),
        *([("logits", pa.list_(pa.float16(), 7))] if encoding == "dense" else sparse),
    ]
    assert [(field.name, field.type) for field in table.schema] == wanted
    assert table["key"].to_pylist() == [f"b/{index}" for index in range(9) if index != 4]
    assert table["index"].to_pylist() == [0, 1, 2, 3, 5, 6, 7, 8]
    metadata = json.loads(pq.read_metadata(opened.part_path("b")).metadata[b"pseudolabel"])
    assert metadata["format_version"] == 1
    assert metadata["fingerprint"] == opened.fingerprint
    assert (metadata["shard"], metadata["samples"], metadata["rejects"]) == ("b", 9, 1)
    assert metadata["size"] == Path(shards[1].path).stat().st_size
    assert set(metadata["fidelity"]) == {"mean", "p99"}
    assert set(metadata["fidelity"]["mean"]) == {"1", "2", "4"}
    rejects = opened.read_rejects("b").to_pylist()
    assert [(r["shard"], r["index"], r["key"], r["stage"]) for r in rejects] == [("b", 4, "b/4", "decode")]
    assert not opened.rejects_path("a").exists()


def test_logit_columns_are_plain_and_pages_are_checksummed(filled: tuple[Store, list[Shard]]) -> None:
    """pyarrow's default (dictionary, no checksums) costs bytes, and lets a flipped bit through."""
    opened, _ = filled
    group = pq.ParquetFile(opened.part_path("a")).metadata.row_group(0)
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    for name in ("topk_logit.list.element", "topk_id.list.element"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings
        assert not columns[name].has_dictionary_page
        assert columns[name].compression == "ZSTD"


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    first, _ = _fill(tmp_path / "one", "topk:3")
    second, _ = _fill(tmp_path / "two", "topk:3")
    for name in ("a", "b"):
        assert first.part_path(name).read_bytes() == second.part_path(name).read_bytes()
    assert first.rejects_path("b").read_bytes() == second.rejects_path("b").read_bytes()


def test_every_flipped_byte_is_found(filled: tuple[Store, list[Shard]]) -> None:
    """Page checksums leave the footer open; the seal doesn't. Every position of a part, a bit at random in each."""
    opened, _ = filled
    path = opened.part_path("a")
    whole = path.read_bytes()
    bits = random.Random(0)
    for position in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1 << bits.randrange(8)
        path.write_bytes(spoiled)
        with pytest.raises(DamagedPart, match="damaged"):
            opened.read("a")
    path.write_bytes(whole)
    assert opened.read("a").num_rows == 9


@pytest.mark.parametrize("kept", [0, 3, 100, -1, -8, -200])
def test_a_torn_part_is_not_taken_for_a_whole_one(filled: tuple[Store, list[Shard]], kept: int) -> None:
    opened, _ = filled
    path = opened.part_path("a")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedPart):
        opened.read("a")
    result = verify(opened)
    assert not result.ok
    assert [(problem.part, problem.kind) for problem in result.problems] == [("a", "DamagedPart")]
    assert result.rows == 8


def test_verify_accepts_an_intact_store(filled: tuple[Store, list[Shard]]) -> None:
    opened, shards = filled
    result = verify(opened, shards)
    assert (result.ok, result.parts, result.rows, result.problems) == (True, 2, 17, ())


def test_verify_names_what_does_not_belong(filled: tuple[Store, list[Shard]], tmp_path: Path) -> None:
    """Swapped parts, a foreign file, lost rejects, an edited shard, an unfinished shard: each is named."""
    opened, shards = filled
    (opened.root / "parts" / "notes.txt").write_text("?")
    shutil.copy(opened.part_path("a"), opened.part_path("c"))
    opened.rejects_path("b").unlink()
    write_shard(
        Path(shards[0].path), [(f"a/{index}", {"png": image_bytes(index + 1), "cls": b"3"}) for index in range(9)]
    )
    write_shard(tmp_path / "new.tar", [("x", {"png": image_bytes()})])
    kinds = {
        problem.part: problem.kind
        for problem in verify(opened, [*shards, Shard("new", str(tmp_path / "new.tar"))]).problems
    }
    assert kinds == {
        "notes.txt": "ForeignFile",
        "c": "StoreMismatch",
        "b": "DamagedPart",
        "a": "StoreMismatch",
        "new": "MissingPart",
    }


def test_a_store_of_something_else_is_refused_with_what_differs(filled: tuple[Store, list[Shard]]) -> None:
    opened, _ = filled
    other = StoreIdentity(
        {**opened.identity.teacher, "weights_sha256": "0" * 64}, opened.identity.classes, "dense", {"count": 1}, "fp32"
    )
    with pytest.raises(StoreMismatch) as caught:
        store.create(opened.root, other)
    assert "teacher.weights_sha256" in str(caught.value)
    assert 'encoding: the store has "topk:3", this run "dense"' in str(caught.value)
    assert "another --out" in str(caught.value)


def test_fingerprint_hangs_on_all_of_the_identity() -> None:
    base = StoreIdentity({"architecture": "x", "weights_sha256": "y"}, ("a", "b"), "dense", {"count": 1}, "fp32")
    others = [
        StoreIdentity({"architecture": "x", "weights_sha256": "z"}, ("a", "b"), "dense", {"count": 1}, "fp32"),
        StoreIdentity(base.teacher, ("b", "a"), "dense", {"count": 1}, "fp32"),
        StoreIdentity(base.teacher, base.classes, "topk:1", {"count": 1}, "fp32"),
        StoreIdentity(base.teacher, base.classes, "dense", {"count": 2}, "fp32"),
        StoreIdentity(base.teacher, base.classes, "dense", {"count": 1}, "bf16"),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_an_edited_store_json_is_refused(filled: tuple[Store, list[Shard]]) -> None:
    opened, _ = filled
    path = opened.root / "store.json"
    whole = path.read_text()
    for spoiled in (whole.replace('"topk:3"', '"dense"'), whole[: len(whole) // 2], "[]", ""):
        path.write_text(spoiled)
        with pytest.raises(StoreError):
            store.open_store(opened.root)
    path.write_text(whole.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(StoreError, match="format version 2"):
        store.open_store(opened.root)


def test_a_stale_reject_file_goes_with_the_next_commit(filled: tuple[Store, list[Shard]]) -> None:
    """A crash between rejects and part, then a shard without rejects: no ghost stays."""
    opened, _ = filled
    info, part = opened.info("a"), opened.read("a")
    opened.rejects_path("a").write_bytes(opened.rejects_path("b").read_bytes())
    opened.commit(info, part, schema.REJECT_SCHEMA.empty_table())
    assert not opened.rejects_path("a").exists()


def test_view_columns_are_part_of_the_format(tmp_path: Path) -> None:
    fields = [pa.field("logits", pa.list_(pa.float16(), 2), nullable=False)]
    augmented = schema.part_schema(fields, augmented=True)
    assert augmented.names[:6] == ["key", "index", "view", "crop", "flip", "aug_seed"]
    rows = {
        "key": ["a", "a"],
        "index": [0, 0],
        "view": [0, 1],
        "crop": [[0.0, 0.0, 1.0, 1.0], [0.25, 0.125, 0.5, 0.5]],
        "flip": [False, True],
        "aug_seed": [0, (1 << 62) + 1],
        "label": [None, None],
        "pred": [1, 1],
        "confidence": [0.5, 0.75],
        "entropy": [0.1, 0.2],
        "margin": [0.0, 0.5],
        "logits": [np.array([0, -1], np.float16), np.array([-2, 0], np.float16)],
    }
    table = pa.Table.from_pydict(rows, schema=augmented)
    schema.write_sealed(tmp_path / "p.parquet", table, {"format_version": 1})
    assert schema.read_table(tmp_path / "p.parquet").equals(table)


def test_the_committed_v1_store_stays_readable(tmp_path: Path) -> None:
    """Format v1 is a promise: this store was written once and must read the same for good."""
    ours = shutil.ignore_patterns("FINGERPRINT", "expected.json")
    opened = store.open_store(shutil.copytree(FIXTURE, tmp_path / "store", ignore=ours))
    assert opened.fingerprint == (FIXTURE / "FINGERPRINT").read_text().strip()
    assert verify(opened).ok
    summary = summarize_store(opened)
    assert (summary.rows, summary.parts, summary.rejects, summary.num_classes) == (17, 2, 1, 7)
    expected = json.loads((FIXTURE / "expected.json").read_text())
    for name, rows in expected.items():
        assert opened.read(name).to_pylist() == rows


def test_parts_are_plain_parquet(filled: tuple[Store, list[Shard]]) -> None:
    """Readable as one data set by whatever reads Parquet, without our code."""
    opened, _ = filled
    plain = pq.read_table(opened.root / "parts")
    assert plain.num_rows == 17
    assert plain["topk_logit"].type == pa.list_(pa.float16(), 3)


def test_nothing_can_be_written_where_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    identity = StoreIdentity({"architecture": "x"}, ("a", "b"), "dense", {"count": 1}, "fp32")
    with pytest.raises(StorageError):
        store.create(tmp_path / "store", identity)


def make_fixture() -> None:
    """Write tests/fixtures/store-v1 anew: `python tests/test_store.py`. Only for a new format version."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        opened, _ = _fill(Path(scratch), "topk:3")
        shutil.rmtree(FIXTURE, ignore_errors=True)
        shutil.copytree(opened.root, FIXTURE)
        (FIXTURE / "FINGERPRINT").write_text(opened.fingerprint + "\n")
        expected = {name: opened.read(name).to_pylist() for name in opened.part_names()}
        (FIXTURE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    make_fixture()


def test_of_two_makers_of_a_store_one_wins(tmp_path: Path) -> None:
    """Both wrote store.json, the parts of one of them were worth nothing."""
    assert storage.write_new(tmp_path / "s" / "store.json", "one")
    assert not storage.write_new(tmp_path / "s" / "store.json", "two")
    assert (tmp_path / "s" / "store.json").read_text() == "one"
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["store.json"]


def test_a_relative_path_may_hold_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow takes `store-topk:5/parts/x.parquet` for a URL."""
    monkeypatch.chdir(tmp_path)
    logits, labels = known(20, 8, 0)
    made = write_store(Path("store-topk:5"), {"shard": (logits, labels)}, encoding="topk:5")
    assert made.read("shard")["label"].to_pylist() == labels
    assert made.read_columns("shard", ["label"])["label"].to_pylist() == labels
    assert summarize_store("store-topk:5").rows == 20
