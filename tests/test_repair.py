"""verify --repair: what is damaged costs one part, made again to the same bytes; what is foreign is never deleted."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from annotated_stores import Made, annotated_stores  # noqa: F401 (a fixture)
from commands import Invoke, annotated
from conftest import image_bytes
from spoiling import edit, edited_store, flipped, other_rows, users_table

from pseudolabel import verify
from pseudolabel.errors import StoreError
from pseudolabel.labels import schema
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import write_shard


def test_what_was_repaired_is_annotated_again_to_the_same_bytes(
    tmp_path: Path, corpus: Path, teacher_dir: Path, invoke: Invoke
) -> None:
    shards, teacher = corpus / "unlabeled", f"checkpoint:{teacher_dir}"
    write_shard(shards / "spoiled.tar", [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"})])
    root = annotated(shards, teacher_dir, tmp_path / "store")
    whole = {path: path.read_bytes() for path in root.glob("*/*.parquet")}
    parts, rejects = root / "parts", root / "rejects"
    (parts / "unlabeled-0.parquet").write_bytes(b"")
    (rejects / "spoiled.parquet").write_bytes(flipped(whole[rejects / "spoiled.parquet"], 99))
    shutil.copy(parts / "unlabeled-1.parquet", parts / "unlabeled-2.parquet")
    asking = ("verify", root, "--shards", shards, "--sample", 1, "--teacher", teacher, "--device", "cpu", "--json")
    code, out, err = invoke(*asking)
    assert (code, len(json.loads(out)["problems"])) == (1, 3), err
    assert {path: path.read_bytes() for path in root.glob("*/*.parquet")}.keys() == whole.keys()
    code, out, err = invoke(*asking, "--repair")
    result = json.loads(out)
    assert (code, result["ok"], result["problems"]) == (0, True, [])
    assert [one["part"] for one in result["repaired"]] == ["spoiled", "unlabeled-0", "unlabeled-2"]
    assert err.count("deleted, as ") == 3
    assert {path.stem for path in root.glob("*/*.parquet")} == {"unlabeled-1"}
    annotated(shards, teacher_dir, root)
    assert {path: path.read_bytes() for path in root.glob("*/*.parquet")} == whole
    code, out, _ = invoke(*asking)
    result = json.loads(out)
    assert (code, result["ok"], result["compared"], result["repaired"]) == (0, True, 74, [])
    assert result["worst_kl"] < 1e-5


def test_repair_deletes_labels_that_differ_and_parts_of_a_replaced_shard(
    tmp_path: Path, make_store: Callable[[str], Made]
) -> None:
    made = make_store("topk").copy(tmp_path / "store")
    edit(made.root, "a", other_rows)
    found = verify(made.root, made.shards, teacher=made.teacher, sample=1.0, repair=True)
    assert (found.ok, [(one.part, one.kind) for one in found.repaired]) == (True, [("a", "OtherLabels")])
    assert [path.name for path in made.root.glob("*/*.parquet")] == ["b.parquet"] * 2
    write_shard(tmp_path / "b.tar", [("new", {"png": image_bytes()})])
    replaced = Shard("b", str(tmp_path / "b.tar"))
    assert [one.kind for one in verify(made.root, [replaced]).problems] == ["StoreMismatch"]
    (tmp_path / "torn.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    torn = verify(made.root, [Shard("b", str(tmp_path / "torn.tar"))], repair=True)
    assert ([one.kind for one in torn.problems], torn.repaired) == (["DamagedShard"], ()), "the labels are not at fault"
    assert verify(made.root, [replaced], repair=True).ok
    assert list(made.root.glob("*/*.parquet")) == []


def test_repair_never_deletes_what_is_foreign(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    made = make_store("dense").copy(tmp_path / "store")
    strangers = [made.root / name for name in ("notes.txt", "parts/notes.txt", "rejects/.x.parquet")]
    for path in strangers:
        path.write_text("mine")
    users_table(made, random.Random(0))
    (made.root / "parts" / "a.parquet").write_bytes(b"torn")
    found = verify(made.root, repair=True)
    assert not found.ok
    assert {one.part for one in found.problems} == {"notes.txt", ".x.parquet", "mine"}
    assert {one.kind for one in found.problems} == {"ForeignFile"}
    assert [one.part for one in found.repaired] == ["a"]
    assert all(path.read_text() == "mine" for path in strangers)
    assert (made.root / "parts" / "mine.parquet").exists()
    edited_store(made, random.Random(0))
    (made.root / "parts" / "b.parquet").write_bytes(b"torn")
    with pytest.raises(StoreError):
        verify(made.root, repair=True)
    assert (made.root / "parts" / "b.parquet").read_bytes() == b"torn"


def test_a_shard_whose_annotation_was_killed_is_unfinished(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Rejects in place, no part yet, and a temporary file: no problem, and not repair's business."""
    made = make_store("dense").copy(tmp_path / "store")
    (made.root / "parts" / "b.parquet").unlink()
    (made.root / "parts" / ".b.parquet.tmp-0123456789ab").write_bytes(b"half")
    assert verify(made.root, repair=True).ok
    assert [one.kind for one in verify(made.root, made.shards, repair=True).problems] == ["MissingPart"]
    assert (made.root / "rejects" / "b.parquet").exists()
    (made.root / "rejects" / "b.parquet").write_bytes(b"torn")
    assert [one.part for one in verify(made.root, repair=True).repaired] == ["b"]
    assert not (made.root / "rejects" / "b.parquet").exists()


def test_repair_deletes_no_file_of_ours_that_is_no_part(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """What `leaks` or `select` made, put among the parts, is whole and sealed: it was taken for a damaged part."""
    made = make_store("dense").copy(tmp_path / "store")
    path = made.root / "parts" / "leaks.parquet"
    schema.write_sealed(path, pa.table({"index": [1]}), {"format_version": 1, "kind": "leaks"})
    found = verify(made.root, repair=True)
    assert [(one.part, one.kind) for one in found.problems] == [("leaks", "ForeignFile")]
    assert "no part of a store; move it away" in found.problems[0].detail
    assert path.exists()


def test_repair_gets_by_a_directory_in_the_place_of_rejects(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """The part was deleted, then the directory couldn't be, and what else was wrong nobody learned."""
    made = make_store("dense").copy(tmp_path / "store")
    (made.root / "rejects" / "b.parquet").unlink()
    (made.root / "rejects" / "b.parquet").mkdir()
    (made.root / "parts" / "a.parquet").write_bytes(b"torn")
    found = verify(made.root, repair=True)
    assert {one.kind for one in found.problems} == {"ForeignFile"}
    assert {one.part for one in found.repaired} == {"a", "b"}
