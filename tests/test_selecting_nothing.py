"""A selection of nothing is refused and told which limit left nothing; the command refuses what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Invoke, Refuse
from conftest import Cli
from selecting import CLASSES, store_to_select_from  # noqa: F401 (a fixture)
from stores import add_part, known, write_store

from pseudolabel.errors import SelectionError, StoreError
from pseudolabel.labels.store import Store
from pseudolabel.selection.select import select
from pseudolabel.settings import SelectSettings


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
