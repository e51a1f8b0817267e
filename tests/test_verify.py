"""verify: nothing is wrong with an intact store, and labels of other rows are found by annotating again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from annotated_stores import CASES, CLASSES, Made, annotated_stores  # noqa: F401 (a fixture)
from commands import Invoke
from conftest import make_model
from spoiling import cell, edit, other_rows

from pseudolabel import verify
from pseudolabel.errors import SpecError, StoreMismatch
from pseudolabel.labels import schema
from pseudolabel.labels.store import open_store
from pseudolabel.teachers import parse_teachers


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_wrong_with_an_intact_store(case: str, make_store: Callable[[str], Made]) -> None:
    """Alone, beside its shards, and every sample of it annotated again."""
    made = make_store(case)
    rows = 22 * CASES[case].get("views", 1)
    for found in (verify(made.root), verify(made.root, made.shards)):
        assert (found.ok, found.problems, found.parts, found.rows) == (True, (), 2, rows)
        assert (found.compared, found.worst_kl, found.worst_row) == (0, None, None)
    again = verify(made.root, made.shards, teacher=made.teacher, sample=1.0)
    assert (again.ok, again.compared) == (True, 24), again.problems
    assert again.worst_kl is not None
    assert again.worst_kl < 1e-5
    assert verify(made.root, made.shards, repair=True).repaired == ()


@pytest.mark.parametrize("case", CASES)
def test_labels_of_other_rows_are_found_by_annotating_again(
    case: str, tmp_path: Path, make_store: Callable[[str], Made]
) -> None:
    made = make_store(case).copy(tmp_path / "store")
    edit(made.root, "a", other_rows)
    assert verify(made.root, made.shards).ok
    found = verify(made.root, made.shards, teacher=made.teacher, sample=1.0)
    (problem,) = found.problems
    assert (problem.part, problem.kind, found.ok, found.compared) == ("a", "OtherLabels", False, 24)
    assert "2 of " in problem.detail
    assert found.worst_kl is not None
    assert found.mean_kl is not None
    assert found.worst_kl > 0.01 > found.mean_kl / 22
    assert "a.tar: view" in str(found.worst_row)
    lenient = verify(made.root, made.shards, teacher=made.teacher, sample=1.0, tolerance=found.worst_kl + 1)
    assert lenient.ok, lenient.problems


def test_what_must_be_equal_is_compared_exactly(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """A view's seed, a summary, and a sample that is said to be rejected."""
    made = make_store("views")
    row = schema.read_table(made.root / "parts" / "a.parquet").slice(4, 1).to_pylist()[0]
    for name, value in (("aug_seed", 5), ("flip", not row["flip"]), ("entropy", 0.0), ("margin", row["confidence"])):
        spoiled = made.copy(tmp_path / "store")
        edit(spoiled.root, "a", cell(name, value, row=4))
        assert verify(spoiled.root, made.shards).ok
        (problem,) = verify(spoiled.root, made.shards, teacher=made.teacher, sample=1.0).problems
        assert problem.kind == "OtherLabels"
        assert f"another {name}" in problem.detail
    spoiled = made.copy(tmp_path / "store")
    opened = open_store(spoiled.root)
    info, part = opened.info("a"), opened.read("a")
    invented = [{"shard": "a", "index": 0, "key": "a/0", "stage": "decode", "error": "ValueError", "detail": "?"}]
    opened.commit(replace(info, rejects=1), part.slice(3), pa.Table.from_pylist(invented, schema=schema.REJECT_SCHEMA))
    assert verify(opened, made.shards).ok
    (problem,) = verify(opened, made.shards, teacher=made.teacher, sample=1.0).problems
    assert "sample 'a/0' was rejected, made again it is labeled" in problem.detail


def test_the_sample_is_the_same_in_every_run_and_never_empty(make_store: Callable[[str], Made]) -> None:
    made = make_store("topk")

    def compared(sample: float, seed: int = 0, shards: slice = slice(None)) -> int:
        return verify(made.root, made.shards[shards], teacher=made.teacher, sample=sample, seed=seed).compared

    assert compared(1e-9) == 1
    assert [compared(0.5) for _ in range(2)] == [compared(0.5)] * 2
    assert compared(0.5) == compared(0.5, shards=slice(0, 1)) + compared(0.5, shards=slice(1, 2))
    assert len({compared(0.5, seed) for seed in range(8)}) > 1
    assert compared(0.25) < compared(0.75)


def test_another_teacher_is_refused(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Before anything is compared, and nothing is deleted."""
    made = make_store("dense").copy(tmp_path / "store")
    stranger = parse_teachers(f"checkpoint:{make_model(tmp_path / 'model', classes=CLASSES)}")
    with pytest.raises(StoreMismatch, match=r"would not give these labels:\n +teacher.weights_sha256: the store has"):
        verify(made.root, made.shards, teacher=stranger, sample=1.0, repair=True)
    shutil.copy(made.other / "store.json", made.root / "store.json")
    with pytest.raises(StoreMismatch, match="name the store's own teacher"):
        verify(made.root, made.shards, teacher=made.teacher, sample=1.0)
    assert {problem.kind for problem in verify(made.root).problems} == {"StoreMismatch"}
    assert len(list(made.root.glob("parts/*"))) == 2


def test_requests_that_make_no_sense(make_store: Callable[[str], Made]) -> None:
    made = make_store("dense")
    for arguments, said in (
        ({"sample": 0.5}, "needs --shards and --teacher"),
        ({"sample": 0.5, "teacher": made.teacher}, "needs --shards and --teacher"),
        ({"teacher": made.teacher, "shards": made.shards}, "only asked with --sample"),
        ({"sample": 1.5, "teacher": made.teacher, "shards": made.shards}, "sample is 1.5"),
        ({"sample": 1, "teacher": made.teacher, "shards": made.shards, "tolerance": 0}, "tolerance is 0"),
    ):
        with pytest.raises(SpecError, match=said):
            verify(made.root, **arguments)  # type: ignore[arg-type]


def test_verify_on_the_command_line(tmp_path: Path, make_store: Callable[[str], Made], invoke: Invoke) -> None:
    made = make_store("dense").copy(tmp_path / "store")
    shards = Path(made.shards[0].path).parent
    asking = ("verify", made.root, "--shards", shards, "--teacher", made.teacher.uri, "--sample", 0.5)
    code, out, err = invoke(*asking, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "worst KL" in out
    edit(made.root, "a", other_rows)
    code, out, err = invoke(*asking[:-1], 1, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert err.startswith("OtherLabels: ")
    code, out, err = invoke(*asking[:-2])
    assert (code, out) == (1, "")
    assert "only asked with --sample" in err
    code, _, err = invoke("verify", made.root, "--sample", 0.5, "--tolerance", 1)
    assert code == 1
    assert "needs --shards and --teacher" in err
    assert "--class-map has no effect" in invoke("verify", made.root, "--class-map", "x.toml")[2]
