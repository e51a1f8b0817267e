"""Selecting: the rules do what they say against numpy, and threads change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from selecting import CLASSES, chosen_rows, rows_of, select_by, store_to_select_from  # noqa: F401 (a fixture)
from stores import add_part, known, write_store

from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.duplicates.ledger import Leak, Leaks, write_leaks
from pseudolabel.errors import SelectionError, StoreMismatch
from pseudolabel.labels.store import Store
from pseudolabel.selection import open_selection
from pseudolabel.selection.select import repeated, select
from pseudolabel.settings import CalibrateSettings, SelectSettings


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
    chosen, result = select_by(store, tmp_path / "s", **settings)
    rows = rows_of(store)
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
    chosen, result = select_by(store, tmp_path / "s", top_per_class=7)
    rows = rows_of(store)
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
    assert len({row["confidence"] for row in rows_of(store, ("a", "b")).values()}) == 1
    chosen, _ = select_by(store, tmp_path / "s", top_per_class=8)
    assert sorted(chosen) == [*(("a", index) for index in range(5)), *(("b", index) for index in range(3))]
    chosen, _ = select_by(store, tmp_path / "t", top_per_class=46)
    assert not {("b", index) for index in range(11, 20)} & chosen.keys()


def test_balance_cuts_large_classes_and_weighs_small_ones(store: Store, tmp_path: Path) -> None:
    """Each class counts for as much, up to the largest weight; the mean weight of all rows is 1."""
    chosen, result = select_by(store, tmp_path / "s", min_confidence=0.8, balance=50, max_weight=1.1)
    rows = rows_of(store)
    sizes = [sum(row["pred"] == c and row["confidence"] >= 0.8 for row in rows.values()) for c in range(CLASSES)]
    assert min(sizes) < 50 < max(sizes)
    raw = {key: min(50 / min(sizes[rows[key]["pred"]], 50), 1.1) for key in chosen}
    mean = np.mean(list(raw.values()))
    assert [one.selected for one in result.classes] == [min(size, 50) for size in sizes]
    for key, weight in chosen.items():
        assert weight == pytest.approx(raw[key] / mean, rel=1e-5)
    assert np.mean(list(chosen.values())) == pytest.approx(1, abs=1e-5)
    _, mean_result = select_by(store, tmp_path / "m", balance="mean")
    assert max(one.selected for one in mean_result.classes) == 100


@pytest.mark.parametrize("how", ["confidence", "entropy"])
def test_soft_weights_follow_the_row(store: Store, tmp_path: Path, how: str) -> None:
    chosen, _ = select_by(store, tmp_path / "s", weight=how)
    rows = rows_of(store)
    values = {"confidence": lambda row: row["confidence"], "entropy": lambda row: 1 - row["entropy"] / np.log(CLASSES)}
    raw = {key: values[how](rows[key]) for key in chosen}
    mean = np.mean(list(raw.values()))
    assert len(chosen) == 500
    for key, weight in chosen.items():
        assert weight == pytest.approx(raw[key] / mean, rel=1e-4)


def test_limits_beyond_all_rows_keep_all(store: Store, tmp_path: Path) -> None:
    """DuckDB's own limits: a million values of an aggregate, and float32."""
    for number, settings in enumerate(({"top_per_class": 10**6}, {"balance": 10**15}, {"max_entropy": 1e300})):
        chosen, _ = select_by(store, tmp_path / f"s{number}", **settings)
        assert len(chosen) == 500
    few = select_by(store, tmp_path / "few", top_per_class=3)[0]
    assert len(few) == 15


def test_a_calibration_decides_by_what_it_makes_of_the_logits(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"u": (known(500, CLASSES, 0, overconfident=3.0)[0], [None] * 500)})
    add_part(store, "val", *known(2000, CLASSES, 1, overconfident=3.0))
    calibration = calibrate(store).calibration
    result = select(store, tmp_path / "s", SelectSettings(min_confidence=0.9), calibration=calibration)
    logits = torch.from_numpy(np.stack(store.read("u")["logits"].to_numpy(zero_copy_only=False)).astype(np.float32))
    confident = (logits / calibration.temperature).softmax(-1).amax(-1) >= 0.9
    assert {index for _, index in chosen_rows(tmp_path / "s", store)} == set(confident.nonzero().squeeze(-1).tolist())
    assert result.selected < select(store, tmp_path / "t", SelectSettings(min_confidence=0.9)).selected
    other = write_store(tmp_path / "other", {"u": known(10, CLASSES, 0)}, teacher="another")
    with pytest.raises(StoreMismatch, match="calibrate this store"):
        select(other, tmp_path / "x", calibration=calibration)
    with pytest.raises(SelectionError, match="needs a calibration with a prior correction"):
        select(store, tmp_path / "x", SelectSettings(align_prior=True), calibration=calibration)


def test_excluded_samples_are_neither_selected_nor_evidence(store: Store, tmp_path: Path) -> None:
    exclude = {"u-0": [0, 5, 299], "val": list(range(200)), "elsewhere": [1]}
    result = select(store, tmp_path / "s", SelectSettings(), exclude=exclude)
    chosen = chosen_rows(tmp_path / "s", store)
    assert len(chosen) == 497
    assert not {("u-0", 0), ("u-0", 5), ("u-0", 299)} & chosen.keys()
    assert (result.excluded, result.checked) == (203, 200)


def test_leaks_are_excluded_if_they_are_of_these_shards(store: Store, tmp_path: Path) -> None:
    sha256 = {name: store.info(name).sha256 for name in ("u-0", "u-1")}
    against = {"val": store.info("val").sha256}
    found = Leak("u-0", 7, "u-0/000007", "near", 2, 0.99, "val", "val/000001", 1)
    write_leaks(tmp_path / "leaks.parquet", [found], {"shards": sha256, "against": against})
    result = select(store, tmp_path / "s", exclude=tmp_path / "leaks.parquet")
    assert (result.selected, result.excluded) == (499, 1)
    assert ("u-0", 7) not in chosen_rows(tmp_path / "s", store)
    assert open_selection(tmp_path / "s").facts["excluded"]["samples"] == 1
    with pytest.warns(UserWarning, match="1 of 3 shards of the store were not looked through for leaks, such as u-1"):
        select(store, tmp_path / "t", exclude=Leaks({}, {"u-0": sha256["u-0"]}, against))
    with pytest.raises(SelectionError, match="'u-1': leaks were looked for in another content"):
        select(store, tmp_path / "x", exclude=Leaks({}, {**sha256, "u-1": "0" * 64}, against))


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
