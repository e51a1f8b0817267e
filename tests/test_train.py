"""Training: it learns, repeats itself exactly, keeps the best weights, and diverges with an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from small_trainings import SMALL, annotated_by, small_store, train_on  # noqa: F401 (a fixture)

from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import Diverged
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import Store
from pseudolabel.layout import training_layout
from pseudolabel.settings import AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.students import build_student
from pseudolabel.training.optim import learning_rate


def test_a_student_learns_from_soft_labels_alone(corpus: Path, tmp_path: Path) -> None:
    """A teacher that knows the classes teaches a student that never sees a label."""
    no_flip = AugmentSettings(crop="none", flip=False)
    settings = SMALL.model_copy(update={"steps": 80, "lr": 1e-2, "augment": no_flip, "eval_every": 80})
    train_on(corpus, tmp_path / "teacher", settings=settings)
    labels = annotated_by(corpus, tmp_path / "store", tmp_path / "teacher", "topk:2")
    alone = settings.model_copy(update={"labeled_fraction": 0.0, "alpha": 1.0, "seed": 5})
    result = train_on(corpus, tmp_path / "student", labels, alone, labeled=())
    assert result.val_accuracy is not None
    assert result.val_accuracy >= 0.9
    measured = evaluate(tmp_path / "student", list_shards(corpus / "val"))
    assert measured.accuracy == pytest.approx(result.val_accuracy)
    agreement = evaluate(tmp_path / "teacher", list_shards(corpus / "val"))
    assert agreement.accuracy >= 0.9


def test_same_seed_same_weights_other_seed_other_weights(corpus: Path, store: Store, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_on(corpus, tmp_path / name, store, SMALL.model_copy(update={"seed": seed}))
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_loader_processes_change_nothing(corpus: Path, store: Store, tmp_path: Path) -> None:
    """Augmentation is seeded by the step, not by the worker that happens to do it."""
    for workers in (0, 2):
        train_on(corpus, tmp_path / f"{workers}", store, SMALL.model_copy(update={"steps": 5}), workers=workers)
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()


def test_every_encoding_trains(corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "teacher")
    for name in ("dense", "topk:1", "topk:4"):
        labels = annotated_by(corpus, tmp_path / f"store-{name}", model, name)
        assert parse_encoding(labels.identity.encoding).name == name
        assert train_on(corpus, tmp_path / f"run-{name}", labels, SMALL.model_copy(update={"steps": 2})).steps == 2


def test_paths_will_do_for_the_api(corpus: Path, tmp_path: Path) -> None:
    import pseudolabel

    model = make_model(tmp_path / "teacher")
    pseudolabel.annotate(
        str(corpus / "unlabeled"), f"checkpoint:{model}", tmp_path / "store", engine=LocalEngine("cpu", 1)
    )
    sets = {name: str(corpus / name) for name in ("labeled", "unlabeled", "val")}
    pseudolabel.train(SMALL, tmp_path / "run", store=str(tmp_path / "store"), threads=1, **sets)
    assert pseudolabel.evaluate(tmp_path / "run", [corpus / "val"]).samples == 24


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    settings = TrainSettings(lr=1.0, warmup_fraction=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_best_weights_are_kept_not_the_last(corpus: Path, tmp_path: Path) -> None:
    """A learning rate that wrecks the model late: what is saved is what validated best."""
    settings = SMALL.model_copy(
        update={"steps": 40, "eval_every": 2, "lr": 0.3, "ema": 0.0, "clip_norm": 0.0, "optimizer": "sgd"}
    )
    result = train_on(corpus, tmp_path / "run", settings=settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = {line["step"]: line["val_accuracy"] for line in lines if "val_accuracy" in line}
    assert result.val_accuracy == max(accuracies.values())
    assert accuracies[result.best_step] == result.val_accuracy
    assert evaluate(tmp_path / "run", list_shards(corpus / "val")).accuracy == pytest.approx(result.val_accuracy)


def test_divergence_is_an_error_not_a_model(corpus: Path, tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"lr": 1e30, "clip_norm": 0.0, "optimizer": "sgd", "steps": 40})
    with pytest.raises(Diverged, match="smaller --lr"):
        train_on(corpus, tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "run.json").exists()


def test_weights_that_end_infinite_are_an_error(corpus: Path, tmp_path: Path) -> None:
    """The loss of the last step was still finite; what it did to the weights was saved."""
    with pytest.raises(Diverged, match="no longer finite"):
        train_on(
            corpus, tmp_path / "run", settings=SMALL.model_copy(update={"steps": 1, "lr": 1e38, "ema": 0.0}), val=()
        )
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(("width", "layout"), [(4, torch.contiguous_format), (8, torch.channels_last)])
def test_a_strided_pointwise_convolution_of_few_channels_does_not_crash(
    width: int, layout: torch.memory_format
) -> None:
    """oneDNN corrupted the heap in its backward pass, channels last, on CPUs without AVX-512: the process died."""
    body = build_student(f"small:resnet8?width={width}", num_classes=4, channels=1)
    assert training_layout(body) is layout
    body.to(memory_format=layout)
    for _ in range(10):
        body(torch.randn(16, 1, 12, 12).contiguous(memory_format=layout)).sum().backward()
