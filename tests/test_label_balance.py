"""Labels that are unevenly spread or not all right: sampled, weighed, adjusted, smoothed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from pydantic import ValidationError

from pseudolabel.annotate import annotate
from pseudolabel.dataset import TrainingBatches
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import LabelError, SpecError
from pseudolabel.settings import AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.train import train
from pseudolabel.training.inputs import gather
from pseudolabel.training.label_balance import label_loss
from pseudolabel.training.order import BalancedOrder
from pseudolabel.views.image import square

SMALL = TrainSettings(student="small:resnet8?width=8", image_size=12, channels=1, steps=6, batch_size=16, eval_every=3)


def test_balanced_order_takes_all_classes_in_turn() -> None:
    """A hundred of one class, three of another, one of the last: each a third, none twice before all once."""
    labels = [np.repeat([0, 1], [60, 1]), np.repeat([0, 1, 5], [40, 2, 1])]
    order = BalancedOrder(labels, seed=4)
    rows = order.rows(0, 900)
    classes = np.array([labels[shard][row] for shard, row, _ in rows])
    assert Counter(classes.tolist()) == {0: 300, 1: 300, 5: 300}
    assert all(sorted(classes[start : start + 3].tolist()) == [0, 1, 5] for start in range(0, 900, 3))
    of_first = [tuple(row) for row, label in zip(rows[:, :2].tolist(), classes.tolist(), strict=True) if label == 0]
    assert len(set(of_first[:100])) == 100
    assert of_first[:100] != of_first[100:200]
    assert BalancedOrder(labels, seed=4).rows(123, 7).tolist() == rows[123:130].tolist()


def test_balanced_batches_are_balanced(corpus: Path) -> None:
    data, _ = gather(list_shards(corpus / "labeled"), (), None, num_classes=4)
    batches = TrainingBatches(
        dataclasses.replace(data, balanced=True),
        square(12, 1),
        AugmentSettings(),
        batch_size=8,
        labeled_fraction=1.0,
        seed=0,
        steps=2,
    )
    assert Counter(batches[1].labels_B.tolist()) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_class_weights_average_one_over_the_labeled_rows() -> None:
    counts = np.array([90, 9, 1])
    for spec in ("balanced", "effective:0.9", "3,2,1"):
        weight = label_loss(SMALL.model_copy(update={"class_weights": spec}), counts).weight_C
        assert weight is not None
        assert float((weight * torch.from_numpy(counts)).sum()) == pytest.approx(100)
    balanced = label_loss(SMALL.model_copy(update={"class_weights": "balanced"}), counts).weight_C
    assert balanced is not None
    assert balanced.tolist() == pytest.approx([100 / 270, 100 / 27, 100 / 3])
    effective = label_loss(SMALL.model_copy(update={"class_weights": "effective:0.9"}), counts).weight_C
    assert effective is not None
    assert float(effective[2] / effective[1]) == pytest.approx((1 - 0.9**9) / (1 - 0.9))


def test_rows_drawn_evenly_weigh_one_on_average() -> None:
    """Weights scaled by the counts made a labeled row weigh five times as much: it was drawn otherwise."""
    update = {"class_weights": "3,2,1", "label_sampling": "balanced"}
    weight = label_loss(SMALL.model_copy(update=update), np.array([90, 9, 1])).weight_C
    assert weight is not None
    assert weight.tolist() == pytest.approx([1.5, 1.0, 0.5])


@pytest.mark.parametrize("again", [{"class_weights": "balanced"}, {"logit_adjustment": 1.0}])
def test_classes_are_evened_once(again: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=f"evens the classes already; leave `{next(iter(again))}` out"):
        TrainSettings(label_sampling="balanced", **again)  # type: ignore[arg-type]


def test_logit_adjustment_adds_the_log_of_the_shares() -> None:
    found = label_loss(SMALL.model_copy(update={"logit_adjustment": 2.0}), np.array([90, 9, 1])).adjustment_C
    assert found is not None
    assert found.tolist() == pytest.approx([2 * np.log(0.9), 2 * np.log(0.09), 2 * np.log(0.01)])


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"class_weights": "even"}, "write none, balanced, effective:0.999, or a number for each class"),
        ({"class_weights": "effective:1"}, "from 0 to below 1"),
        ({"class_weights": "effective:0.9,0.99"}, "from 0 to below 1"),
        ({"class_weights": "1,2"}, "2 numbers for 3 classes"),
        ({"class_weights": "1,-2,3"}, "numbers from 0"),
        ({"class_weights": "0,0,0"}, "weigh nothing"),
    ],
)
def test_class_weights_that_are_none_are_refused(update: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        label_loss(SMALL.model_copy(update=update), np.array([5, 6, 7]))


def test_adjusting_for_a_class_without_labels_is_refused() -> None:
    with pytest.raises(LabelError, match="1 of 3 classes, such as class 1, have no labeled row"):
        label_loss(SMALL.model_copy(update={"logit_adjustment": 1.0}), np.array([5, 0, 7]))


@pytest.mark.parametrize(
    "update", [{"label_sampling": "balanced"}, {"label_smoothing": 0.1}, {"class_weights": "1,1,1,1"}]
)
def test_options_about_labels_want_labels(corpus: Path, tmp_path: Path, update: dict[str, object]) -> None:
    annotate(
        corpus / "unlabeled", f"checkpoint:{make_model(tmp_path / 't')}", tmp_path / "s", engine=LocalEngine("cpu", 1)
    )
    with pytest.raises(SpecError, match=f"--{next(iter(update)).replace('_', '-')}: is about labeled rows"):
        train(SMALL.model_copy(update=update), tmp_path / "run", unlabeled=corpus / "unlabeled", store=tmp_path / "s")
