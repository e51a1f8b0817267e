"""The precision that a selection promises or estimates is that of the rows it chose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from selecting import CLASSES, chosen_rows, select_by
from stores import add_part, known, write_store
from torch import Tensor

from pseudolabel.errors import SelectionError
from pseudolabel.selection import open_selection
from pseudolabel.selection.precision import lowest_threshold, upper_tail
from pseudolabel.selection.select import select
from pseudolabel.settings import SelectSettings


def test_the_estimate_is_the_share_of_right_labels_among_those_like_the_selected(tmp_path: Path) -> None:
    """Against the truth of the selected rows, which the estimate doesn't see; without a label it is the confidence."""
    logits, truth = known(20_000, CLASSES, 3)
    store = write_store(tmp_path / "store", {"u": (logits, [None] * 20_000)})
    without = select(store, tmp_path / "w", SelectSettings(min_confidence=0.8))
    assert (without.estimated_from, without.precision_interval, without.checked) == ("confidence", None, 0)
    add_part(store, "val", *known(4000, CLASSES, 4))
    for settings in ({"min_confidence": 0.8}, {"top_per_class": 500}, {"target_precision": 0.9}):
        result = select(store, tmp_path / "s", SelectSettings(**settings), overwrite=True)
        chosen = chosen_rows(tmp_path / "s", store)
        pred = store.read("u")["pred"].to_numpy()
        actual = np.mean([pred[index] == truth[index] for _, index in chosen])
        assert result.estimated_from == "labels"
        assert result.precision_interval is not None
        assert result.precision_interval[0] - 0.005 <= actual <= result.precision_interval[1] + 0.005
    assert without.estimated_precision == pytest.approx(0.93, abs=0.02)


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
    _, one = select_by(store, tmp_path / "one", target_precision=0.85)
    chosen, own = select_by(store, tmp_path / "own", target_precision=0.85, per_class=True)
    thresholds = open_selection(tmp_path / "own").facts["thresholds"]
    pred = store.read("u")["pred"].to_numpy()
    truth = np.array(labels[10_000:])
    for name in thresholds:
        rows = [index for _, index in chosen if pred[index] == int(name)]
        assert np.mean(truth[rows] == int(name)) > 0.83
    assert own.classes[0].selected < one.classes[0].selected / 2
    assert own.classes[1].selected > one.classes[1].selected
