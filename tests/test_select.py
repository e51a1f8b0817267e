"""Selecting: the rules do what they say against numpy, threads change nothing, and what is promised is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Invoke, Refuse
from conftest import Cli
from object_stores import Bucket
from stores import add_part, known, write_store
from torch import Tensor

from pseudolabel import storage
from pseudolabel.calibration import read_calibration
from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.duplicates.ledger import Leak, Leaks, write_leaks
from pseudolabel.errors import OutputExists, SelectionError, StoreError, StoreMismatch
from pseudolabel.labels.store import Store
from pseudolabel.selection import Selection, open_selection
from pseudolabel.selection.precision import lowest_threshold, upper_tail
from pseudolabel.selection.select import SelectResult, repeated, select
from pseudolabel.settings import CalibrateSettings, SelectSettings

CLASSES = 5
Row = tuple[str, int]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two unlabeled shards, one with a reject's gap, and a validation shard."""
    made = write_store(tmp_path / "store", {"u-0": (known(300, CLASSES, 0)[0], [None] * 300)})
    add_part(made, "u-1", known(200, CLASSES, 1)[0], [None] * 200)
    add_part(made, "val", *known(400, CLASSES, 2))
    return made


def _rows(store: Store, names: tuple[str, ...] = ("u-0", "u-1")) -> dict[Row, dict[str, float]]:
    return {(name, row["index"]): row for name in names for row in store.read(name).to_pylist()}


def _chosen(out: Path, store: Store) -> dict[Row, float]:
    opened = open_selection(out)
    tables = {name: opened.read(name, store.info(name).sha256) for name in opened.rows}
    assert {name: len(table) for name, table in tables.items()} == dict(opened.rows)
    return {(name, row["index"]): row["weight"] for name, table in tables.items() for row in table.to_pylist()}


def _select(store: Store, out: Path, **settings: Any) -> tuple[dict[Row, float], SelectResult]:
    result = select(store, out, SelectSettings(**settings))
    return _chosen(out, store), result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_confidence": 0.9},
        {"min_margin": 0.5, "max_entropy": 0.8},
        {"max_entropy": 0.3, "min_confidence": 0.5, "min_margin": 0.1},
    ],
)
def test_filters_keep_just_the_rows_they_say(store: Store, tmp_path: Path, settings: Mapping[str, float]) -> None:
    chosen, result = _select(store, tmp_path / "s", **settings)
    rows = _rows(store)
    limits = {"min_confidence": ("confidence", 1), "min_margin": ("margin", 1), "max_entropy": ("entropy", -1)}
    given = {limits[limit]: value for limit, value in settings.items()}

    def passes(row: dict[str, float]) -> bool:
        return all(np.float32(sign * row[name]) >= np.float32(sign * value) for (name, sign), value in given.items())

    wanted = {key for key, row in rows.items() if passes(row)}
    assert chosen.keys() == wanted
    assert set(chosen.values()) == {1.0}
    assert (result.rows, result.selected, result.labeled_rows, result.excluded) == (500, len(wanted), 400, 0)
    assert sum(one.selected for one in result.classes) == len(wanted)
    assert [one.rows for one in result.classes] == [sum(r["pred"] == c for r in rows.values()) for c in range(CLASSES)]


def test_top_per_class_takes_the_most_confident_of_each(store: Store, tmp_path: Path) -> None:
    chosen, result = _select(store, tmp_path / "s", top_per_class=7)
    rows = _rows(store)
    for pred in range(CLASSES):
        own = sorted((row["confidence"] for row in rows.values() if row["pred"] == pred), reverse=True)[:7]
        assert sorted((rows[key]["confidence"] for key in chosen if rows[key]["pred"] == pred), reverse=True) == own
        assert result.classes[pred].threshold == pytest.approx(own[-1])


def test_ties_are_broken_by_entropy_then_by_the_stores_order(tmp_path: Path) -> None:
    """Float32 confidences of a sure teacher are 1.0 by the thousand."""
    logits = torch.zeros(50, 3)
    logits[:, 1] = 60.0
    logits[10:20, 0] = 40.0  # the same confidence in float32, a larger entropy
    store = write_store(tmp_path / "store", {"b": (logits, [None] * 50), "a": (logits[:5], [None] * 5)})
    assert len({row["confidence"] for row in _rows(store, ("a", "b")).values()}) == 1
    chosen, _ = _select(store, tmp_path / "s", top_per_class=8)
    assert sorted(chosen) == [*(("a", index) for index in range(5)), *(("b", index) for index in range(3))]
    chosen, _ = _select(store, tmp_path / "t", top_per_class=46)
    assert not {("b", index) for index in range(11, 20)} & chosen.keys()


def test_balance_cuts_large_classes_and_weighs_small_ones(store: Store, tmp_path: Path) -> None:
    """Each class counts for as much, up to the largest weight; the mean weight of all rows is 1."""
    chosen, result = _select(store, tmp_path / "s", min_confidence=0.8, balance=50, max_weight=1.1)
    rows = _rows(store)
    sizes = [sum(row["pred"] == c and row["confidence"] >= 0.8 for row in rows.values()) for c in range(CLASSES)]
    assert min(sizes) < 50 < max(sizes)
    raw = {key: min(50 / min(sizes[rows[key]["pred"]], 50), 1.1) for key in chosen}
    mean = np.mean(list(raw.values()))
    assert [one.selected for one in result.classes] == [min(size, 50) for size in sizes]
    for key, weight in chosen.items():
        assert weight == pytest.approx(raw[key] / mean, rel=1e-5)
    assert np.mean(list(chosen.values())) == pytest.approx(1, abs=1e-5)
    _, mean_result = _select(store, tmp_path / "m", balance="mean")
    assert max(one.selected for one in mean_result.classes) == 100


@pytest.mark.parametrize("how", ["confidence", "entropy"])
def test_soft_weights_follow_the_row(store: Store, tmp_path: Path, how: str) -> None:
    chosen, _ = _select(store, tmp_path / "s", weight=how)
    rows = _rows(store)
    values = {"confidence": lambda row: row["confidence"], "entropy": lambda row: 1 - row["entropy"] / np.log(CLASSES)}
    raw = {key: values[how](rows[key]) for key in chosen}
    mean = np.mean(list(raw.values()))
    assert len(chosen) == 500
    for key, weight in chosen.items():
        assert weight == pytest.approx(raw[key] / mean, rel=1e-4)


def test_the_same_bytes_at_every_call_and_from_its_own_json(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pseudolabel.selection import scores

    calibration = calibrate(store, settings=CalibrateSettings(prior="labels")).calibration
    rules = SelectSettings(target_precision=0.7, balance="mean", weight="entropy", align_prior=True)
    select(store, tmp_path / "a", rules, calibration=calibration, evidence=["val"])
    monkeypatch.setattr(scores, "_INSERTED", 50)
    monkeypatch.setattr(scores, "_AT_ONCE", 33)
    select(store, tmp_path / "b", **repeated(open_selection(tmp_path / "a").facts))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_calibration_decides_by_what_it_makes_of_the_logits(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"u": (known(500, CLASSES, 0, overconfident=3.0)[0], [None] * 500)})
    add_part(store, "val", *known(2000, CLASSES, 1, overconfident=3.0))
    calibration = calibrate(store).calibration
    result = select(store, tmp_path / "s", SelectSettings(min_confidence=0.9), calibration=calibration)
    logits = torch.from_numpy(np.stack(store.read("u")["logits"].to_numpy(zero_copy_only=False)).astype(np.float32))
    confident = (logits / calibration.temperature).softmax(-1).amax(-1) >= 0.9
    assert {index for _, index in _chosen(tmp_path / "s", store)} == set(confident.nonzero().squeeze(-1).tolist())
    assert result.selected < select(store, tmp_path / "t", SelectSettings(min_confidence=0.9)).selected
    other = write_store(tmp_path / "other", {"u": known(10, CLASSES, 0)}, teacher="another")
    with pytest.raises(StoreMismatch, match="calibrate this store"):
        select(other, tmp_path / "x", calibration=calibration)
    with pytest.raises(SelectionError, match="needs a calibration with a prior correction"):
        select(store, tmp_path / "x", SelectSettings(align_prior=True), calibration=calibration)


def test_excluded_samples_are_neither_selected_nor_evidence(store: Store, tmp_path: Path) -> None:
    exclude = {"u-0": [0, 5, 299], "val": list(range(200)), "elsewhere": [1]}
    result = select(store, tmp_path / "s", SelectSettings(), exclude=exclude)
    chosen = _chosen(tmp_path / "s", store)
    assert len(chosen) == 497
    assert not {("u-0", 0), ("u-0", 5), ("u-0", 299)} & chosen.keys()
    assert (result.excluded, result.checked) == (203, 200)


def test_the_estimate_is_the_share_of_right_labels_among_those_like_the_selected(tmp_path: Path) -> None:
    """Against the truth of the selected rows, which the estimate doesn't see; without a label it is the confidence."""
    logits, truth = known(20_000, CLASSES, 3)
    store = write_store(tmp_path / "store", {"u": (logits, [None] * 20_000)})
    without = select(store, tmp_path / "w", SelectSettings(min_confidence=0.8))
    assert (without.estimated_from, without.precision_interval, without.checked) == ("confidence", None, 0)
    add_part(store, "val", *known(4000, CLASSES, 4))
    for settings in ({"min_confidence": 0.8}, {"top_per_class": 500}, {"target_precision": 0.9}):
        result = select(store, tmp_path / "s", SelectSettings(**settings), overwrite=True)
        chosen = _chosen(tmp_path / "s", store)
        pred = store.read("u")["pred"].to_numpy()
        actual = np.mean([pred[index] == truth[index] for _, index in chosen])
        assert result.estimated_from == "labels"
        assert result.precision_interval is not None
        assert result.precision_interval[0] - 0.005 <= actual <= result.precision_interval[1] + 0.005
    assert without.estimated_precision == pytest.approx(0.93, abs=0.02)


# --- the target precision


def test_the_binomial_tail_is_exact() -> None:
    for rows, probability in ((1, 0.5), (20, 0.95), (300, 0.9)):
        pmf = [_choose(rows, k) * probability**k * (1 - probability) ** (rows - k) for k in range(rows + 1)]
        for right in (0, 1, rows // 2, rows - 1, rows):
            assert upper_tail(right, rows, probability) == pytest.approx(sum(pmf[right:]), rel=1e-9)


def _choose(n: int, k: int) -> float:
    import math

    return float(math.comb(n, k))


@pytest.mark.parametrize("overconfident", [0.7, 1.0, 1.6])
def test_the_target_is_reached_as_often_as_is_said(overconfident: float) -> None:
    """200 draws of 400 labeled rows from a population whose true precision above every confidence is known. A
    certainty of 90 % may fail in 20 of them on average; 35 has a chance of 1 in 2,000.
    """
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 100_000)
    chance = confidence**overconfident
    order = np.argsort(-confidence)
    precision = np.cumsum(chance[order]) / np.arange(1, len(order) + 1)
    falls_short = found = 0
    for _ in range(200):
        rows = rng.integers(0, len(confidence), 400)
        threshold = lowest_threshold(confidence[rows], rng.random(400) < chance[rows], 0.9, 0.9)
        if threshold is not None:
            above = np.searchsorted(-confidence[order], -threshold.confidence, side="right")
            found += 1
            falls_short += precision[above - 1] < 0.9
    assert falls_short < 35
    assert found > 100


def test_more_labels_bring_the_threshold_down_to_where_it_belongs() -> None:
    """With few rows none passes; with many it comes near the lowest that reaches the target."""
    rng = np.random.default_rng(1)
    confidence = rng.random(40_000)
    right = rng.random(40_000) < confidence
    ideal = 0.8  # the mean of uniform confidences above 0.8 is 0.9
    found = [lowest_threshold(confidence[:n], right[:n], 0.9, 0.95) for n in (20, 6000, 40_000)]
    assert found[0] is None
    assert found[1] is not None
    assert found[2] is not None
    assert ideal < found[2].confidence < found[1].confidence < 1
    assert found[2].confidence < ideal + 0.03
    above = confidence >= found[2].confidence
    assert (found[2].rows, found[2].right) == (above.sum(), right[above].sum())


def test_a_threshold_for_each_class(tmp_path: Path) -> None:
    """The teacher is worse at class 0, which so needs a higher confidence than one threshold for all gives it."""
    logits, labels = known(20_000, 4, 5)
    wrong = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) < 0.3
    labels = [(1 if w and label == 0 else label) for w, label in zip(wrong.tolist(), labels, strict=True)]
    parts: dict[str, tuple[Tensor, list[int | None]]] = {
        "val": (logits[:10_000], list(labels[:10_000])),
        "u": (logits[10_000:], [None] * 10_000),
    }
    store = write_store(tmp_path / "store", parts)
    _, one = _select(store, tmp_path / "one", target_precision=0.85)
    chosen, own = _select(store, tmp_path / "own", target_precision=0.85, per_class=True)
    thresholds = open_selection(tmp_path / "own").facts["thresholds"]
    pred = store.read("u")["pred"].to_numpy()
    truth = np.array(labels[10_000:])
    for name in thresholds:
        rows = [index for _, index in chosen if pred[index] == int(name)]
        assert np.mean(truth[rows] == int(name)) > 0.83
    assert own.classes[0].selected < one.classes[0].selected / 2
    assert own.classes[1].selected > one.classes[1].selected


# --- what is refused


def test_selecting_nothing_is_refused_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    for settings, said in (
        (
            {"min_confidence": 1.0, "max_entropy": 0.0},
            r"none of 500 rows passes --min-confidence 1; the largest confidence of these is 0.\d+\nloosen --min-conf",
        ),
        ({"target_precision": 0.9999}, r"no confidence is known to reach a precision of 0.9999 .* of 400 labeled rows"),
        ({"max_disagreement": 0.1}, "annotate with --keep-members"),
    ):
        with pytest.raises(SelectionError, match=said):
            select(store, tmp_path / "s", SelectSettings(**settings))
    with pytest.raises(SelectionError, match=r"needs|are excluded"):
        select(store, tmp_path / "s", exclude={name: range(400) for name in ("u-0", "u-1", "val")})
    with pytest.raises(StoreError, match="shard 'nowhere', named as evidence"):
        select(store, tmp_path / "s", evidence=["nowhere"])
    labeled = write_store(tmp_path / "labeled", {"val": known(60, 3, 0)})
    with pytest.raises(SelectionError, match=r"all 60 rows carry a label.*--include-labeled"):
        select(labeled, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert select(labeled, tmp_path / "s", SelectSettings(include_labeled=True)).selected == 60


def test_a_selection_is_not_overwritten_and_another_one_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s")
    with pytest.raises(OutputExists, match="--overwrite"):
        select(store, tmp_path / "s")
    (tmp_path / "store" / "parts" / "u-1.parquet").unlink()
    select(store, tmp_path / "s", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "s" / "parts").iterdir()) == ["u-0.parquet", "val.parquet"]


def test_all_labeled_rows_that_pass_are_checked(tmp_path: Path) -> None:
    """Without a cut none is left out, though no selected row is as unsure: it were the wrong ones that went."""
    sure = known(50, 3, 0, scale=20.0)[0]
    store = write_store(tmp_path / "store", {"u": (sure, [None] * 50), "val": known(400, 3, 1, scale=1.0)})
    result = select(store, tmp_path / "s")
    part = store.read("val")
    right = part["pred"].to_numpy() == part["label"].to_numpy()
    assert result.checked == 400
    share = [one.selected / 50 for one in result.classes]
    of_class = [right[part["pred"].to_numpy() == number].mean() for number in range(3)]
    assert result.estimated_precision == pytest.approx(
        sum(a * b for a, b in zip(share, of_class, strict=True)), abs=1e-5
    )
    assert select(store, tmp_path / "cut", SelectSettings(top_per_class=2)).checked < 200
    with pytest.raises(SelectionError, match="no row of the 1 shards named as evidence carries a label"):
        select(store, tmp_path / "x", evidence=["u"])


def test_limits_beyond_all_rows_keep_all(store: Store, tmp_path: Path) -> None:
    """DuckDB's own limits: a million values of an aggregate, and float32."""
    for number, settings in enumerate(({"top_per_class": 10**6}, {"balance": 10**15}, {"max_entropy": 1e300})):
        chosen, _ = _select(store, tmp_path / f"s{number}", **settings)
        assert len(chosen) == 500
    few = _select(store, tmp_path / "few", top_per_class=3)[0]
    assert len(few) == 15


def test_at_a_url_it_is_the_same(store: Store, tmp_path: Path, bucket: Bucket) -> None:
    """Store, calibration and selection in an object storage give the bytes that they give on a disk."""
    for path in (tmp_path / "store").rglob("*.*"):
        place = storage.location(f"{bucket.url}/store/{path.relative_to(tmp_path / 'store')}")
        storage.write_atomic(place, path.read_bytes())
    for root in (str(tmp_path), bucket.url):
        calibrate(f"{root}/store", f"{root}/c.json")
        rules = SelectSettings(top_per_class=9)
        select(f"{root}/store", f"{root}/s", rules, calibration=read_calibration(f"{root}/c.json"))
        with pytest.raises(OutputExists, match="--overwrite"):
            select(f"{root}/store", f"{root}/s")
        with pytest.raises(OutputExists, match="which is not of a selection"):
            select(f"{root}/store", f"{root}/store", overwrite=True)
    for name in ("c.json", "s/selection.json", "s/parts/u-0.parquet", "s/parts/val.parquet"):
        assert storage.location(f"{bucket.url}/{name}").read_bytes() == (tmp_path / name).read_bytes()


def test_what_is_no_selection_is_never_written_over(store: Store, tmp_path: Path) -> None:
    """The parts of a store have the names that a selection's would have: `--out store` lost all labels."""
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match=r"store: holds '.*', which is not of a selection"):
            select(store, tmp_path / "store", overwrite=overwrite)
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")} == before
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "parts" / "u-9.parquet").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("mine", "file"):
        with pytest.raises(OutputExists):
            select(store, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "parts" / "u-9.parquet").read_text() == "mine"


def test_a_selection_that_was_killed_is_made_again(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "whole", SelectSettings(min_confidence=0.8))
    select(store, tmp_path / "s")
    (tmp_path / "s" / "begun.json").write_text("{}")
    (tmp_path / "s" / "parts" / "mine.parquet").write_text("mine")
    (tmp_path / "s" / "selection.json").unlink()  # as killed while it was being replaced
    with pytest.raises(SelectionError, match="no selection here"):
        open_selection(tmp_path / "s")
    select(store, tmp_path / "s", SelectSettings(min_confidence=0.8))
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert not (tmp_path / "s" / "begun.json").exists()
    assert (tmp_path / "s" / "parts" / "mine.parquet").read_text() == "mine"


def test_an_edited_or_foreign_selection_is_refused(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s")
    select(store, tmp_path / "t", SelectSettings(min_confidence=0.9))
    opened = open_selection(tmp_path / "s")
    with pytest.raises(SelectionError, match="was replaced since this was selected"):
        opened.read("u-0", "0" * 64)
    shutil.copy(tmp_path / "t" / "parts" / "u-0.parquet", tmp_path / "s" / "parts" / "u-0.parquet")
    with pytest.raises(SelectionError, match="isn't of this selection"):
        opened.read("u-0", store.info("u-0").sha256)
    path = tmp_path / "s" / "selection.json"
    path.write_text(path.read_text().replace('"selected": 500', '"selected": 501'))
    with pytest.raises(SelectionError, match="was edited"):
        open_selection(tmp_path / "s")
    with pytest.raises(SelectionError, match="no selection here"):
        open_selection(tmp_path / "nowhere")


def test_the_manifest_is_plain_parquet(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s", SelectSettings(min_confidence=0.9))
    table = pq.read_table(tmp_path / "s" / "parts" / "u-0.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "index": "int32",
        "view": "int16",
        "weight": "float",
    }
    assert table["index"].to_pylist() == sorted(table["index"].to_pylist())
    assert isinstance(open_selection(tmp_path / "s"), Selection)


def test_the_command(store: Store, tmp_path: Path, cli: Cli, invoke: Invoke, refuse: Refuse) -> None:
    found, err = cli("select", "store", "--out", "s", "--min-confidence", 0.7, "--top-per-class", 20)
    assert found["selected"] == sum(one["selected"] for one in found["classes"]) <= 100
    assert found["estimated_from"] == "labels"
    for shown in ("class 4", "estimated precision", "from confidence", f"selected             {found['selected']}"):
        assert shown in err
    again, _ = cli("select", "store", "--out", "t", "--like", "s")
    assert again["fingerprint"] == found["fingerprint"]
    here = tmp_path / "store", "--out", tmp_path / "u"
    refuse(
        "select", *here, "--like", tmp_path / "s", "--min-margin", 0.5, kind="SelectionError", said="--like takes all"
    )
    refuse("select", *here, "--min-confidence", 1.5, kind="RecipeError", said="  --min-confidence: must be less")
    told = "--per-class is about --target-precision, which isn't given"
    refuse("select", *here, "--per-class", kind="RecipeError", said=told)
    for wrong in ("median", 0, "1.5", 1 << 62):
        refuse("select", *here, "--balance", wrong, kind="RecipeError", said="--balance: must be a number of rows from")
    code, _, err = invoke("select", *here, "--certainty", 0.9, "--json")
    assert code == 0
    assert "without --target-precision, --certainty has no effect" in err
    assert json.loads((tmp_path / "u" / "selection.json").read_text())["selected"] == 500


def test_leaks_are_excluded_if_they_are_of_these_shards(store: Store, tmp_path: Path) -> None:
    sha256 = {name: store.info(name).sha256 for name in ("u-0", "u-1")}
    against = {"val": store.info("val").sha256}
    found = Leak("u-0", 7, "u-0/000007", "near", 2, 0.99, "val", "val/000001", 1)
    write_leaks(tmp_path / "leaks.parquet", [found], {"shards": sha256, "against": against})
    result = select(store, tmp_path / "s", exclude=tmp_path / "leaks.parquet")
    assert (result.selected, result.excluded) == (499, 1)
    assert ("u-0", 7) not in _chosen(tmp_path / "s", store)
    assert open_selection(tmp_path / "s").facts["excluded"]["samples"] == 1
    with pytest.warns(UserWarning, match="1 of 3 shards of the store were not looked through for leaks, such as u-1"):
        select(store, tmp_path / "t", exclude=Leaks({}, {"u-0": sha256["u-0"]}, against))
    with pytest.raises(SelectionError, match="'u-1': leaks were looked for in another content"):
        select(store, tmp_path / "x", exclude=Leaks({}, {**sha256, "u-1": "0" * 64}, against))


def test_the_limit_that_left_nothing_is_told_with_what_would_have_passed(tmp_path: Path) -> None:
    """It was always the largest confidence that was told, which passed."""
    store = write_store(tmp_path / "store", {"u": (known(300, CLASSES, 0)[0], [None] * 300)})
    add_part(store, "val", *known(400, CLASSES, 2))
    rows = store.read("u").to_pylist()
    sure = [row for row in rows if row["confidence"] >= np.float32(0.9)]

    def refused(**settings: Any) -> str:
        with pytest.raises(SelectionError) as caught:
            select(store, tmp_path / "s", SelectSettings(**settings))
        return str(caught.value)

    told = refused(max_entropy=1e-7, min_confidence=0.9)
    least = np.float32(min(row["entropy"] for row in sure))
    assert f"none of the {len(sure)} rows left passes --max-entropy 1e-07; the smallest entropy of these" in told
    assert told.endswith(f"is {least!s}\nloosen --max-entropy")
    widest = np.float32(max(row["margin"] for row in rows))
    assert f"none of 300 rows passes --min-margin 1; the largest margin of these is {widest!s}" in refused(min_margin=1)
    rules = SelectSettings(max_entropy=float(str(least)), min_confidence=0.9)
    assert select(store, tmp_path / "s", rules).selected == 1
    unsure = write_store(tmp_path / "unsure", {"u": (torch.zeros(20, CLASSES), [None] * 20)})
    add_part(unsure, "val", *known(400, CLASSES, 2))
    with pytest.raises(
        SelectionError, match=r"none of 20 rows reaches the confidence of 0.\d+ from .* is 0.1\d+\nlower"
    ):
        select(unsure, tmp_path / "t", SelectSettings(target_precision=0.7))
    with pytest.raises(SelectionError, match=r"its class's threshold .*: \d of 5 classes have one\nlower"):
        select(unsure, tmp_path / "t", SelectSettings(target_precision=0.7, per_class=True))
    with pytest.raises(SelectionError, match="--weight entropy gives every row that passes the weight 0"):  # a crash
        select(unsure, tmp_path / "t", SelectSettings(weight="entropy"))
    with pytest.raises(SelectionError, match="all 20 rows that could be selected are excluded"):
        select(unsure, tmp_path / "t", exclude={"u": range(20)})


def test_of_two_at_once_one_wins_and_the_other_says_so(store: Store, tmp_path: Path) -> None:
    """Both found the place empty; the second one's parts took the place of the first one's, which nobody told."""
    from pseudolabel.selection import write_selection

    sha256 = {name: store.info(name).sha256 for name in store.part_names()}
    refused = []

    def parts() -> Iterator[tuple[str, pa.Table]]:
        for overwrite in (False, True):
            with pytest.raises(OutputExists, match=r"s: another process is at work in it; wait for it") as caught:
                select(store, tmp_path / "s", SelectSettings(min_confidence=0.9), overwrite=overwrite)
            refused.append(caught)
        yield from ()

    write_selection(tmp_path / "s", {"store": store.fingerprint, "shards": {}}, parts(), sha256, overwrite=False)
    assert len(refused) == 2
    with pytest.raises(OutputExists, match="holds a selection; add --overwrite"):  # it was written meanwhile
        write_selection(tmp_path / "s", {}, iter(()), sha256, overwrite=False)
    assert open_selection(tmp_path / "s").facts["store"] == store.fingerprint


def test_what_a_killed_one_left_half_written_is_removed(store: Store, tmp_path: Path) -> None:
    select(store, tmp_path / "s")
    for name in (".begun.json.tmp-0123456789ab", "parts/.u-0.parquet.tmp-0123456789ab"):
        (tmp_path / "s" / name).write_text("half")
    select(store, tmp_path / "s", overwrite=True)
    assert not list((tmp_path / "s").rglob(".*"))
