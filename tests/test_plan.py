"""The bill beforehand: bytes within a tenth of what annotate writes, counts exact or within their interval, and
nothing left behind. Times are measured by benchmarks/plan.py.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, image_bytes, make_model

from pseudolabel.annotate import annotate
from pseudolabel.demo import bundled, pack_bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import DamagedShard, ShardListError, SpecError, StoreMismatch
from pseudolabel.estimates import effective, makespan, mean_interval, t_quantile, wilson
from pseudolabel.plan import EncodingPlan, Plan, plan, recommend
from pseudolabel.plan.census import draw, take_census
from pseudolabel.plan.probe import doubling
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.teachers import parse_teachers

MakeShard = Callable[..., Path]
TIMES = {"seconds", "startup_seconds", "samples_per_second", "device_hours", "probe_seconds"}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; a plan leaves none, whatever its end."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


def _plan(shards: Path, teacher: Path, encoding: str = "dense", **options: Any) -> Plan:
    options = {"engine": LocalEngine("cpu", 1), "probe_seconds": 0.0, "label_seconds": 100.0, **options}
    settings = AnnotateSettings(precision="fp32", encoding=encoding, batch_size=32)
    return plan(shards, f"checkpoint:{teacher}", settings=settings, **options)


def _annotated_bytes(shards: Path, teacher: Path, out: Path, encoding: str = "dense") -> int:
    settings = AnnotateSettings(precision="fp32", encoding=encoding, batch_size=32)
    annotate(
        shards,
        f"checkpoint:{teacher}",
        out,
        engine=LocalEngine("cpu", 1),
        settings=settings,
        max_reject_fraction=1.0,
    )
    return _bytes_of(out)


def _bytes_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.parent.name != "log")


def _some(count: int, *, bad_every: int = 0, start: int = 0) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index in range(start, start + count):
        bad = bad_every and index % bad_every == bad_every // 2
        yield f"sample-{index:06d}", {"png": b"no image" if bad else image_bytes(index)}


# --- bytes


def test_members_that_are_kept_are_paid_for_in_every_row_of_the_table(tmp_path: Path, make_shard: MakeShard) -> None:
    make_shard("s", _some(300))
    uris = [f"checkpoint:{make_model(tmp_path / f'teacher-{seed}', classes=60, seed=seed)}" for seed in range(2)]
    teacher, engine = parse_teachers(uris), LocalEngine("cpu", 1)
    settings = AnnotateSettings(precision="fp32", encoding="topk:7", keep_members=True, batch_size=32)
    found = plan(tmp_path / "shards", teacher, engine=engine, settings=settings, probe_seconds=0, label_seconds=100)
    for row in found.encodings:
        if row.encoding in ("topk:7", "topk:20", "dense"):
            out, chosen = tmp_path / row.encoding, settings.model_copy(update={"encoding": row.encoding})
            annotate(tmp_path / "shards", teacher, out, engine=engine, settings=chosen)
            assert row.store_bytes == pytest.approx(_bytes_of(out), rel=0.02)


@pytest.mark.parametrize(
    ("classes", "encoding", "probe"),
    [(10, "dense", 400), (10, "topk:5", 400), (1000, "dense", 200), (1000, "topk:20", 200)],
)
def test_bytes_are_within_a_tenth_of_what_annotate_writes(
    tmp_path: Path, make_shard: MakeShard, classes: int, encoding: str, probe: int
) -> None:
    """Also though the probe has a fraction of a part's rows, and shards differ in length."""
    for number, rows in enumerate((700, 900, 500)):
        make_shard(f"s-{number}", _some(rows, start=1000 * number))
    teacher = make_model(tmp_path / "teacher", classes=classes)
    found = _plan(tmp_path / "shards", teacher, encoding, probe_samples=probe)
    actual = _annotated_bytes(tmp_path / "shards", teacher, tmp_path / "store", encoding)
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
    found = _plan(tmp_path / "shards", teacher, probe_samples=len(images) // 4)
    assert [row.encoding for row in found.encodings] == ["topk:5", "dense8", "dense"]
    for row in found.encodings:
        actual = _annotated_bytes(tmp_path / "shards", teacher, tmp_path / row.encoding, row.encoding)
        assert row.store_bytes == pytest.approx(actual, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*random")
def test_bytes_of_a_teacher_whose_logits_are_all_but_equal(tmp_path: Path, make_shard: MakeShard) -> None:
    """Random torchvision weights give such: float16 makes them equal, while top-k's order is of the full ones."""
    make_shard("s", ((f"{index}", {"jpg": image_bytes(index, mode="RGB", kind="JPEG")}) for index in range(60)))
    uri = "torchvision:mobilenet_v3_small"
    settings, engine = AnnotateSettings(precision="fp32", encoding="topk:20", batch_size=30), LocalEngine("cpu", 1)
    found = plan(tmp_path / "shards", uri, engine=engine, settings=settings, probe_seconds=0, label_seconds=100)
    annotate(tmp_path / "shards", uri, tmp_path / "store", engine=engine, settings=settings)
    assert found.store_bytes == pytest.approx(_bytes_of(tmp_path / "store"), rel=0.1)
    assert [row.encoding for row in found.encodings][-3:] == ["topk:100", "dense8", "dense"]


def test_bytes_of_many_short_shards(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    """Here the cost of a part as such is nearly all."""
    for number in range(40):
        make_shard(f"s-{number:02d}", _some(4 + number % 5, start=10 * number))
    found = _plan(tmp_path / "shards", teacher_dir)
    assert found.samples_exact
    assert found.store_bytes == pytest.approx(
        _annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store"), rel=0.05
    )


def test_a_row_of_the_table_is_what_a_store_in_that_encoding_says_of_itself(
    tmp_path: Path, make_shard: MakeShard
) -> None:
    """Bytes a row and KL as `inspect` gives them, for encodings that were not asked for, too."""
    from pseudolabel.labels.store import open_store
    from pseudolabel.labels.summary import summarize_store

    make_shard("s", _some(300))
    teacher = make_model(tmp_path / "teacher", classes=60)
    found = _plan(tmp_path / "shards", teacher, "topk:7")
    kept = [f"topk:{number}" for number in (5, 7, 10, 20, 50)]
    assert [row.encoding for row in found.encodings] == [*kept, "dense8", "dense"]
    assert [row.encoding for row in found.encodings if row.chosen] == ["topk:7"]
    for row in found.encodings:
        if row.encoding in ("topk:7", "topk:50", "dense8", "dense"):
            _annotated_bytes(tmp_path / "shards", teacher, tmp_path / row.encoding, row.encoding)
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


# --- counting


def _skewed(directory: Path) -> int:
    """Long shards of tiny samples beside short ones of large samples, in no order: densities differ by 20."""
    rng, total = random.Random(3), 0
    for number in range(60):
        rows, size = (rng.randint(40, 120), 100) if number % 3 else (rng.randint(5, 30), 20_000)
        write_shard(directory / f"s-{number:03d}.tar", ((str(row), {"txt": bytes(size)}) for row in range(rows)))
        total += rows
    return total


def test_counts_are_exact_or_within_their_interval(tmp_path: Path) -> None:
    """On a skewed corpus, for many seeds: the interval holds the truth about as often as it says, and isn't idle."""
    total = _skewed(tmp_path / "shards")
    shards = list_shards(tmp_path / "shards")
    counted = take_census(shards, probe_shards=8, seed=0)
    assert (counted.samples, counted.low, counted.high, counted.exact, counted.indexed) == (
        total,
        total,
        total,
        True,
        60,
    )
    assert sum(counted.by_shard) == total
    seeds = [take_census(shards, probe_shards=12, seed=seed, exact=False) for seed in range(40)]
    assert all(not one.exact and one.indexed <= 12 for one in seeds)
    assert sum(one.low <= total <= one.high for one in seeds) >= 36
    assert len({one.samples for one in seeds}) > 20, "the seed draws"
    mean = sum(one.samples for one in seeds) / 40
    assert mean == pytest.approx(total, abs=3 * seeds[0].standard_error / math.sqrt(40)), "unbiased"
    assert all(sum(one.by_shard) == pytest.approx(one.samples, abs=1) for one in seeds)
    for one in seeds:  # what the picks stand for is the corpus
        assert sum(pick.stands_for * pick.samples for pick in one.picks) == pytest.approx(one.samples, abs=1)


def test_an_estimated_corpus_is_said_to_be_estimated(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    for number in range(9):
        make_shard(f"s-{number}", _some(30 + 3 * number, start=100 * number))
    found = _plan(tmp_path / "shards", teacher_dir, probe_shards=4, exact=False, probe_samples=100)
    total = sum(30 + 3 * number for number in range(9))
    assert not found.samples_exact
    assert 0 < found.samples_standard_error < total / 20
    assert found.samples_interval[0] <= total <= found.samples_interval[1]
    assert found.shards_indexed <= 4
    actual = _annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store")
    assert found.store_bytes == pytest.approx(actual, rel=0.1)


def test_a_shard_is_drawn_as_often_as_its_size_says() -> None:
    rng = random.Random(0)
    times = [0, 0, 0, 0]
    for _ in range(2000):
        for position in draw([1, 0, 2, 7], 2, rng):
            times[position] += 1
    assert times[1] == 0
    assert [n / 4000 for n in times] == pytest.approx([0.1, 0, 0.2, 0.7], abs=0.02)
    assert draw([5, 5], 2, rng) == [0, 1]
    sizes = [50, 50, 600, 50, 600, 50]  # Horvitz–Thompson: what the draws stand for is as many shards as there are
    stood_for = sum(sum(sizes) / (3 * sizes[position]) for _ in range(4000) for position in draw(sizes, 3, rng))
    assert stood_for / 4000 == pytest.approx(len(sizes), rel=0.05)


# --- what samples are worth: closed forms and tables


def test_intervals() -> None:
    for degrees, wanted in ((1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (30, 2.042), (1000, 1.962)):
        assert t_quantile(degrees) == pytest.approx(wanted, rel=2e-3)
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, 1.0, 12.706), rel=1e-4)
    low, high = wilson(0.1, 100)  # Wilson (1927) for 10 of 100
    assert (low, high) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0.0, 1000) == pytest.approx((0.0, 3.84 / 1003.84), abs=1e-5)
    assert wilson(1.0, 10)[1] == 1.0
    assert effective([1.0, 1.0, 1.0]) == 3.0
    assert effective([1.0, 0.0]) == 1.0


def test_makespan() -> None:
    assert makespan([1, 1, 1], 2) == 2
    assert makespan([5, 1, 1, 1], 2) == 5
    assert makespan([1, 1, 1, 5], 2) == 6
    assert makespan([2.5], 4) == 2.5
    assert makespan([], 4) == 0


@pytest.mark.parametrize("total", [1, 7, 8, 23, 24, 100, 512, 513])
def test_pieces_start_small_and_sum_up(total: int) -> None:
    lengths = doubling(total)
    assert sum(lengths) == total
    assert lengths == sorted(lengths)
    assert lengths[0] <= 23


# --- rejects and damage


def test_rejects_to_expect(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    """Every tenth sample of one shard of three; the probe sees half of each."""
    for number, bad in enumerate((10, 0, 0)):
        make_shard(f"s-{number}", _some(400, bad_every=bad, start=1000 * number))
    found = _plan(tmp_path / "shards", teacher_dir, probe_samples=600)
    assert found.rejects == pytest.approx(40, abs=2)
    assert found.reject_fraction == pytest.approx(40 / 1200, abs=2e-3)
    assert found.reject_interval[0] < 40 / 1200 < found.reject_interval[1]
    assert found.rows == pytest.approx(1160, abs=2)
    assert found.notes == ()
    actual = _annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store")
    assert found.store_bytes == pytest.approx(actual, rel=0.1)
    assert found.reject_interval[1] < 0.1
    (note,) = _plan(tmp_path / "shards", teacher_dir, probe_samples=600, max_reject_fraction=0.01).notes
    assert "annotate would stop" in note


def test_bytes_include_the_lists_of_rejects(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    for number in range(3):
        make_shard(f"s-{number}", _some(400, bad_every=2, start=1000 * number))
    found = _plan(tmp_path / "shards", teacher_dir, probe_samples=400)
    actual = _annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store")
    lists = sum(path.stat().st_size for path in (tmp_path / "store" / "rejects").iterdir())
    assert lists > 0.2 * actual, "otherwise this shows nothing"
    assert found.store_bytes == pytest.approx(actual, rel=0.1)


def test_nothing_that_can_be_labeled(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    make_shard("s", _some(12, bad_every=1))
    found = _plan(tmp_path / "shards", teacher_dir)
    assert (found.samples, found.rejects, found.rows) == (12, 12, 0)
    assert (found.encodings, found.recommended) == ((), None)
    assert found.store_bytes == pytest.approx(
        _annotated_bytes(tmp_path / "shards", teacher_dir, tmp_path / "store"), rel=0.1
    )


def test_damaged_shards_are_named_and_the_others_planned(
    tmp_path: Path, make_shard: MakeShard, teacher_dir: Path
) -> None:
    for name in "abcde":
        path = make_shard(name, _some(50))
        if name in "bd":
            path.write_bytes(path.read_bytes()[: 3 * 1024 + 100])
    (tmp_path / "shards" / "e.tar").write_bytes(b"")
    found = _plan(tmp_path / "shards", teacher_dir)
    assert [Path(line.partition(": ")[0]).name for line in found.damaged] == ["b.tar", "d.tar", "e.tar"]
    assert "truncated" in found.damaged[0]
    assert "3 of 5" in found.notes[0]
    assert (found.samples, found.shards) == (100, 5)
    with pytest.raises(DamagedShard):
        annotate(tmp_path / "shards", f"checkpoint:{teacher_dir}", tmp_path / "store", engine=LocalEngine("cpu", 1))
    assert found.store_bytes == pytest.approx(_bytes_of(tmp_path / "store"), rel=0.1)


def test_no_whole_shard_is_an_error(tmp_path: Path, make_shard: MakeShard, teacher_dir: Path) -> None:
    path = make_shard("a", _some(5))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DamagedShard, match=r"a\.tar: this shard is truncated.*\n.*none of the 1 shards"):
        _plan(tmp_path / "shards", teacher_dir)


# --- odd corpora, resuming, repeatability


def test_one_sample(tmp_path: Path, make_shard: MakeShard) -> None:
    """Fewer samples than classes, than a batch, than anything; one shard keeps one worker busy whatever there are."""
    make_shard("only", _some(1))
    teacher = make_model(tmp_path / "teacher", classes=30)
    found = _plan(tmp_path / "shards", teacher, engine=LocalEngine("cpu", 1))
    assert (found.samples, found.samples_interval, found.rows, found.workers) == (1, (1, 1), 1, 1)
    assert found.seconds >= found.startup_seconds > 0
    assert found.samples_per_second > 0
    assert found.store_bytes == pytest.approx(_annotated_bytes(tmp_path / "shards", teacher, tmp_path / "s"), rel=0.02)


def test_two_classes_leave_little_to_drop(tmp_path: Path, make_shard: MakeShard) -> None:
    make_shard("s", _some(20))
    teacher = make_model(tmp_path / "teacher", classes=2)
    found = _plan(tmp_path / "shards", teacher)
    assert [row.encoding for row in found.encodings] == ["dense8", "dense"]
    assert found.recommended == "dense", "four bytes of scale are more than two of logits"
    drawn = _plan(tmp_path / "shards", teacher, "sampled:9")
    assert [row.encoding for row in drawn.encodings] == ["sampled:9", "dense8", "dense"]
    assert list(drawn.encodings[0].kl) == ["1"]


def test_the_store_to_go_on_with_is_subtracted(
    tmp_path: Path, corpus: Path, teacher_dir: Path, make_shard: MakeShard
) -> None:
    """Also its settings are compared; nothing in it is touched."""
    shards, store = corpus / "unlabeled", tmp_path / "store"
    everything = _annotated_bytes(shards, teacher_dir, store)
    for name in ("unlabeled-0", "unlabeled-2"):
        (store / "parts" / f"{name}.parquet").unlink()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    found = _plan(shards, teacher_dir, out=store)
    assert (found.shards, found.shards_done, found.samples) == (3, 1, 48)
    assert found.store_bytes == pytest.approx(everything, rel=0.02)
    assert found.bytes_to_write == pytest.approx(everything - _bytes_of(store), rel=0.03)
    with pytest.raises(StoreMismatch, match="encoding differ"):
        _plan(shards, teacher_dir, "topk:2", out=store)
    with pytest.raises(StoreMismatch, match="teacher differ"):
        _plan(shards, make_model(tmp_path / "other", seed=5), out=store)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    _annotated_bytes(shards, teacher_dir, store)
    done = _plan(shards, teacher_dir, out=store)
    assert (done.shards_done, done.samples, done.seconds, done.bytes_to_write) == (3, 0, 0.0, 0)
    assert done.store_bytes == _bytes_of(store)
    assert not (tmp_path / "absent").exists()
    assert _plan(shards, teacher_dir, out=tmp_path / "absent").samples == 72
    assert not (tmp_path / "absent").exists()


def test_all_but_the_times_is_the_same_again(corpus: Path, teacher_dir: Path) -> None:
    """Another seed probes other samples."""

    def facts(**options: Any) -> dict[str, Any]:
        found = asdict(_plan(corpus / "unlabeled", teacher_dir, "topk:3", probe_samples=30, **options))
        return {name: value for name, value in found.items() if name not in TIMES}

    first = facts()
    assert first == facts()
    assert facts(seed=1)["encodings"] != first["encodings"]


def test_a_slow_teacher_is_cut_short_but_sees_every_shard(corpus: Path, teacher_dir: Path) -> None:
    found = _plan(corpus / "unlabeled", teacher_dir, label_seconds=0.0)
    assert found.probe_shards == 3
    assert 24 <= found.probe_samples < 72
    assert "time was up" in found.notes[0]


def test_the_users_data_is_only_read(tmp_path: Path, corpus: Path, teacher_dir: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    _plan(corpus / "unlabeled", teacher_dir)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


# --- the command


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
    here = json.loads(json.dumps(asdict(_plan(corpus / "unlabeled", teacher_dir, "topk:3"))))
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
        _plan(tmp_path / "nowhere", teacher_dir)
    with pytest.raises(SpecError, match="only 4 classes"):
        _plan(corpus / "unlabeled", teacher_dir, "topk:5")


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
