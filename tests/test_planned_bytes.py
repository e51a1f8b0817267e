"""The bytes that plan foretells are within a tenth of what annotate writes, and its table is what stores say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import image_bytes, make_model
from planning import (
    MakeShard,
    annotated_bytes,
    bytes_of,
    no_scratch_left,  # noqa: F401 (a fixture)
    plan_of,
    some_samples,
)

from pseudolabel.annotate import annotate
from pseudolabel.demo import bundled, pack_bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.plan import EncodingPlan, plan, recommend
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.teachers import parse_teachers


def test_members_that_are_kept_are_paid_for_in_every_row_of_the_table(tmp_path: Path, make_shard: MakeShard) -> None:
    make_shard("s", some_samples(300))
    uris = [f"checkpoint:{make_model(tmp_path / f'teacher-{seed}', classes=60, seed=seed)}" for seed in range(2)]
    teacher, engine = parse_teachers(uris), LocalEngine("cpu", 1)
    settings = AnnotateSettings(precision="fp32", encoding="topk:7", keep_members=True, batch_size=32)
    found = plan(tmp_path / "shards", teacher, engine=engine, settings=settings, probe_seconds=0, label_seconds=100)
    for row in found.encodings:
        if row.encoding in ("topk:7", "topk:20", "dense"):
            out, chosen = tmp_path / row.encoding, settings.model_copy(update={"encoding": row.encoding})
            annotate(tmp_path / "shards", teacher, out, engine=engine, settings=chosen)
            assert row.store_bytes == pytest.approx(bytes_of(out), rel=0.02)


@pytest.mark.parametrize(
    ("classes", "encoding", "probe"),
    [(10, "dense", 400), (10, "topk:5", 400), (1000, "dense", 200), (1000, "topk:20", 200)],
)
def test_bytes_are_within_a_tenth_of_what_annotate_writes(
    tmp_path: Path, make_shard: MakeShard, classes: int, encoding: str, probe: int
) -> None:
    """Also though the probe has a fraction of a part's rows, and shards differ in length."""
    for number, rows in enumerate((700, 900, 500)):
        make_shard(f"s-{number}", some_samples(rows, start=1000 * number))
    teacher = make_model(tmp_path / "teacher", classes=classes)
    found = plan_of(tmp_path / "shards", teacher, encoding, probe_samples=probe)
    actual = annotated_bytes(tmp_path / "shards", teacher, tmp_path / "store", encoding)
    assert found.probe_samples == -(-probe // 3) * 3 < found.samples / 4
    assert found.store_bytes == pytest.approx(actual, rel=0.1)
    assert found.bytes_to_write == found.store_bytes
    assert (found.samples, found.rows, found.rejects) == (2100, 2100, 0)


def test_bytes_of_real_images_and_a_trained_teacher(tmp_path: Path) -> None:
    """Trained logits are peaked and so compress better than random ones, the better the more there are."""
    pack_bundled(tmp_path / "data")
    images = [one.fields["png"] for one in read_samples(list_shards(tmp_path / "data" / "val")[0])]
    write_shard(tmp_path / "shards" / "s.tar", ((f"{row:06d}", {"png": png}) for row, png in enumerate(images)))
    teacher = bundled("data/fashion-mnist") / "teacher"
    found = plan_of(tmp_path / "shards", teacher, probe_samples=len(images) // 4)
    assert [row.encoding for row in found.encodings] == ["topk:5", "dense8", "dense"]
    for row in found.encodings:
        actual = annotated_bytes(tmp_path / "shards", teacher, tmp_path / row.encoding, row.encoding)
        assert row.store_bytes == pytest.approx(actual, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*random")
def test_bytes_of_a_teacher_whose_logits_are_all_but_equal(tmp_path: Path, make_shard: MakeShard) -> None:
    """Random torchvision weights give such: float16 makes them equal, while top-k's order is of the full ones."""
    make_shard("s", ((f"{index}", {"jpg": image_bytes(index, mode="RGB", kind="JPEG")}) for index in range(60)))
    uri = "torchvision:mobilenet_v3_small"
    settings, engine = AnnotateSettings(precision="fp32", encoding="topk:20", batch_size=30), LocalEngine("cpu", 1)
    found = plan(tmp_path / "shards", uri, engine=engine, settings=settings, probe_seconds=0, label_seconds=100)
    annotate(tmp_path / "shards", uri, tmp_path / "store", engine=engine, settings=settings)
    assert found.store_bytes == pytest.approx(bytes_of(tmp_path / "store"), rel=0.1)
    assert [row.encoding for row in found.encodings][-3:] == ["topk:100", "dense8", "dense"]


def test_bytes_of_many_short_shards(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    """Here the cost of a part as such is nearly all."""
    for number in range(40):
        make_shard(f"s-{number:02d}", some_samples(4 + number % 5, start=10 * number))
    found = plan_of(tmp_path / "shards", teacher_dir)
    assert found.samples_exact
    assert found.store_bytes == pytest.approx(
        annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store"), rel=0.05
    )


def test_bytes_include_the_lists_of_rejects(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    for number in range(3):
        make_shard(f"s-{number}", some_samples(400, bad_every=2, start=1000 * number))
    found = plan_of(tmp_path / "shards", teacher_dir, probe_samples=400)
    actual = annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store")
    lists = sum(path.stat().st_size for path in (tmp_path / "store" / "rejects").iterdir())
    assert lists > 0.2 * actual, "otherwise this shows nothing"
    assert found.store_bytes == pytest.approx(actual, rel=0.1)


def test_a_row_of_the_table_is_what_a_store_in_that_encoding_says_of_itself(
    tmp_path: Path, make_shard: MakeShard
) -> None:
    """Bytes a row and KL as `inspect` gives them, for encodings that were not asked for, too."""
    from pseudolabel.labels.store import open_store
    from pseudolabel.labels.summary import summarize_store

    make_shard("s", some_samples(300))
    teacher = make_model(tmp_path / "teacher", classes=60)
    found = plan_of(tmp_path / "shards", teacher, "topk:7")
    kept = [f"topk:{number}" for number in (5, 7, 10, 20, 50)]
    assert [row.encoding for row in found.encodings] == [*kept, "dense8", "dense"]
    assert [row.encoding for row in found.encodings if row.chosen] == ["topk:7"]
    for row in found.encodings:
        if row.encoding in ("topk:7", "topk:50", "dense8", "dense"):
            annotated_bytes(tmp_path / "shards", teacher, tmp_path / row.encoding, row.encoding)
            summary = summarize_store(open_store(tmp_path / row.encoding))
            assert row.bytes_per_row == pytest.approx(summary.bytes_per_row, rel=0.02)
            assert row.kl == pytest.approx(summary.fidelity["mean"], rel=0.01, abs=2e-6)


def test_the_recommendation_is_the_smallest_that_loses_little() -> None:
    rows = [
        EncodingPlan("topk:5", 40.0, 0, {"1": 0.0, "2": 0.2, "4": 0.5}, True),
        EncodingPlan("topk:20", 90.0, 0, {"1": 0.0, "2": 0.009, "4": 0.3}, False),
        EncodingPlan("topk:50", 150.0, 0, {"1": 0.0, "2": 0.001, "4": 0.1}, False),
        EncodingPlan("dense", 1400.0, 0, {"1": 0.0, "2": 0.0, "4": 0.0}, False),
    ]
    best, reason = recommend(rows)
    assert best == "topk:20"
    assert "0.009" in reason
    assert "6% of dense" in reason
    assert recommend(rows[:1] + rows[3:])[0] == "dense"
    few = replace(rows[3], bytes_per_row=30.0)
    assert recommend([*rows[:3], few])[0] == "dense", "where dense is smaller than topk"
