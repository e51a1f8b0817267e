"""plan: odd corpora, a store to go on with, the same answer again, the command; and it only reads.

Times are measured by benchmarks/plan.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, make_model
from planning import (
    MakeShard,
    annotated_bytes,
    bytes_of,
    no_scratch_left,  # noqa: F401 (a fixture)
    plan_of,
    some_samples,
)

from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import ShardListError, SpecError, StoreMismatch
from pseudolabel.plan import plan
from pseudolabel.settings import AnnotateSettings

TIMES = {"seconds", "startup_seconds", "samples_per_second", "device_hours", "probe_seconds"}


def test_one_sample(tmp_path: Path, make_shard: MakeShard) -> None:
    """Fewer samples than classes, than a batch, than anything; one shard keeps one worker busy whatever there are."""
    make_shard("only", some_samples(1))
    teacher = make_model(tmp_path / "teacher", classes=30)
    found = plan_of(tmp_path / "shards", teacher, engine=LocalEngine("cpu", 1))
    assert (found.samples, found.samples_interval, found.rows, found.workers) == (1, (1, 1), 1, 1)
    assert found.seconds >= found.startup_seconds > 0
    assert found.samples_per_second > 0
    assert found.store_bytes == pytest.approx(annotated_bytes(tmp_path / "shards", teacher, tmp_path / "s"), rel=0.02)


def test_two_classes_leave_little_to_drop(tmp_path: Path, make_shard: MakeShard) -> None:
    make_shard("s", some_samples(20))
    teacher = make_model(tmp_path / "teacher", classes=2)
    found = plan_of(tmp_path / "shards", teacher)
    assert [row.encoding for row in found.encodings] == ["dense8", "dense"]
    assert found.recommended == "dense", "four bytes of scale are more than two of logits"
    drawn = plan_of(tmp_path / "shards", teacher, "sampled:9")
    assert [row.encoding for row in drawn.encodings] == ["sampled:9", "dense8", "dense"]
    assert list(drawn.encodings[0].kl) == ["1"]


def test_the_store_to_go_on_with_is_subtracted(
    tmp_path: Path, corpus: Path, teacher_dir: Path, make_shard: MakeShard
) -> None:
    """Also its settings are compared; nothing in it is touched."""
    shards, store = corpus / "unlabeled", tmp_path / "store"
    everything = annotated_bytes(shards, teacher_dir, store)
    for name in ("unlabeled-0", "unlabeled-2"):
        (store / "parts" / f"{name}.parquet").unlink()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    found = plan_of(shards, teacher_dir, out=store)
    assert (found.shards, found.shards_done, found.samples) == (3, 1, 48)
    assert found.store_bytes == pytest.approx(everything, rel=0.02)
    assert found.bytes_to_write == pytest.approx(everything - bytes_of(store), rel=0.03)
    with pytest.raises(StoreMismatch, match="encoding differ"):
        plan_of(shards, teacher_dir, "topk:2", out=store)
    with pytest.raises(StoreMismatch, match="teacher differ"):
        plan_of(shards, make_model(tmp_path / "other", seed=5), out=store)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    annotated_bytes(shards, teacher_dir, store)
    done = plan_of(shards, teacher_dir, out=store)
    assert (done.shards_done, done.samples, done.seconds, done.bytes_to_write) == (3, 0, 0.0, 0)
    assert done.store_bytes == bytes_of(store)
    assert not (tmp_path / "absent").exists()
    assert plan_of(shards, teacher_dir, out=tmp_path / "absent").samples == 72
    assert not (tmp_path / "absent").exists()


def test_all_but_the_times_is_the_same_again(corpus: Path, teacher_dir: Path) -> None:
    """Another seed probes other samples."""

    def facts(**options: Any) -> dict[str, Any]:
        found = asdict(plan_of(corpus / "unlabeled", teacher_dir, "topk:3", probe_samples=30, **options))
        return {name: value for name, value in found.items() if name not in TIMES}

    first = facts()
    assert first == facts()
    assert facts(seed=1)["encodings"] != first["encodings"]


def test_a_slow_teacher_is_cut_short_but_sees_every_shard(corpus: Path, teacher_dir: Path) -> None:
    found = plan_of(corpus / "unlabeled", teacher_dir, label_seconds=0.0)
    assert found.probe_shards == 3
    assert 24 <= found.probe_samples < 72
    assert "time was up" in found.notes[0]


def test_the_users_data_is_only_read(tmp_path: Path, corpus: Path, teacher_dir: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    plan_of(corpus / "unlabeled", teacher_dir)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


def test_the_command_and_its_json(tmp_path: Path, corpus: Path, teacher_dir: Path, cli: Cli) -> None:
    """In a real process with two workers: one object on stdout, the bill and the stages on stderr. What no
    clock decides is what one worker finds in this process.
    """
    probe = ("--probe-seconds", 0, "--label-seconds", 200)
    command = ("plan", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", *probe)
    found, err = cli(*command, "--workers", 2, "--encoding", "topk:3")
    assert (found["samples"], found["rejects"], found["shards"], found["workers"]) == (72, 0, 3, 2)
    assert found["seconds"] > found["startup_seconds"] > 0
    assert found["device_hours"] == pytest.approx(2 * found["seconds"] / 3600, abs=1e-5)
    assert [row["encoding"] for row in found["encodings"]] == ["topk:3", "dense8", "dense"]
    assert set(found["encodings"][0]["kl"]) == {"1", "2", "4"}
    for shown in ("samples       72 (counted)", "topk:3    chosen", "recommended: ", "counting the samples"):
        assert shown in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "scratch", "teacher"]
    here = json.loads(json.dumps(asdict(plan_of(corpus / "unlabeled", teacher_dir, "topk:3"))))
    fixed = ("fingerprint", "samples", "samples_interval", "num_classes", "encoding", "shards", "shard_bytes")
    assert {name: here[name] for name in fixed} == {name: found[name] for name in fixed}  # no clock decides these


@pytest.mark.parametrize(
    ("shards", "teacher", "more", "kind"),
    [
        ("nowhere", "checkpoint:teacher", (), "ShardListError"),
        ("corpus/unlabeled", "checkpiont:teacher", (), "SpecError"),
        ("corpus/unlabeled", "checkpoint:nowhere", (), "DamagedModel"),
        ("corpus/unlabeled", "checkpoint:teacher", ("--encoding", "topk:9"), "SpecError"),
        ("corpus/unlabeled", "checkpoint:teacher", ("--slice", "5/3"), "ShardListError"),
        ("corpus/unlabeled", "checkpoint:teacher", ("--device", "abacus"), "SpecError"),
    ],
)
def test_what_annotate_would_refuse(
    corpus: Path,
    teacher_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shards: str,
    teacher: str,
    more: tuple[str, ...],
    kind: str,
) -> None:
    from pseudolabel.cli import main

    monkeypatch.chdir(corpus.parent)
    monkeypatch.setattr("sys.argv", ["pseudolabel", "plan", shards, "--teacher", teacher, *more, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out = json.loads(capsys.readouterr().out)
    assert out["error"]["kind"] == kind
    assert 1 <= len(out["error"]["message"].splitlines()) <= 5


def test_the_same_errors_from_the_function(tmp_path: Path, corpus: Path, teacher_dir: Path) -> None:
    with pytest.raises(ShardListError):
        plan_of(tmp_path / "nowhere", teacher_dir)
    with pytest.raises(SpecError, match="only 4 classes"):
        plan_of(corpus / "unlabeled", teacher_dir, "topk:5")


class Watched(LocalEngine):
    """Remembers the batch sizes of the work that it was given."""

    def map(self, work: Any, items: Any) -> Any:
        if isinstance(size := getattr(getattr(getattr(work, "work", None), "settings", None), "batch_size", None), int):
            SIZES.append(size)
        return super().map(work, items)


SIZES: list[int] = []


def test_an_automatic_batch_size_is_tried_or_the_stores_and_nothing_is_written(
    tmp_path: Path, corpus: Path, teacher_dir: Path
) -> None:
    how: Any = {
        "engine": Watched("cpu", 1),
        "settings": AnnotateSettings(precision="fp32", batch_size="auto"),
        "out": tmp_path / "store",
        "probe_seconds": 0,
    }
    SIZES.clear()
    plan(corpus / "unlabeled", f"checkpoint:{teacher_dir}", **how)
    assert set(SIZES) <= {8 << doublings for doublings in range(8)}
    assert len(set(SIZES)) == 1
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "annotate.json").write_text('{"batch_size": 3}')
    SIZES.clear()
    plan(corpus / "unlabeled", f"checkpoint:{teacher_dir}", **how)
    assert set(SIZES) == {3}
