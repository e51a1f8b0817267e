"""What `train` is given from Python: wrong values end in one clear error, and leave nothing behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from small_trainings import SMALL, annotated_by, small_store, train_on  # noqa: F401 (a fixture)

from pseudolabel.errors import LabelError, SpecError, StoreMismatch
from pseudolabel.labels.store import Store
from pseudolabel.selection.select import select
from pseudolabel.settings import SelectSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.train import train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"student": "small:resnet8"}}, "pass TrainSettings"),
        ({"workers": -1}, "workers: -1 is less than 0"),
        ({"threads": 0}, "threads: 0 is less than 1"),
        ({"log_every": 0}, "log_every: 0 is less than 1"),
        ({"cache": "foo"}, "'foo' is none of auto, ram, off"),
        ({"trackers": "tensorboard"}, r"pass \[parse_tracker\('tensorboard'\)\]"),
        ({"trackers": ["tensorboard"]}, r"pass \[parse_tracker\('tensorboard'\)\]"),
        ({"device": "gpu"}, "--device gpu: not usable here"),
    ],
)
def test_wrong_arguments_are_told(corpus: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        train(**{"settings": SMALL, "out": tmp_path / "run", "labeled": corpus / "labeled", **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "update", [{"student": "torchvision:vit_b_16", "channels": 3}, {"student": "torchvision:resnet18"}]
)
def test_a_student_that_can_not_be_built_leaves_no_directory(
    corpus: Path, tmp_path: Path, update: dict[str, Any]
) -> None:
    with pytest.raises(SpecError):
        train_on(corpus, tmp_path / "run", settings=SMALL.model_copy(update=update))
    assert not (tmp_path / "run").exists()


def test_the_callers_random_numbers_go_on(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    train_on(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"steps": 2}))
    assert torch.equal(torch.rand(4), wanted)


def test_auto_is_a_device(corpus: Path, tmp_path: Path) -> None:
    assert train_on(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"steps": 2}), device="auto").steps == 2


def test_without_unlabeled_rows_there_is_nothing_to_select_or_replay(corpus: Path, tmp_path: Path) -> None:
    """Both were without effect, and nothing said so."""
    (tmp_path / "labeled").symlink_to(corpus / "labeled")
    (corpus / "unlabeled").rename(corpus / "others")
    (corpus / "unlabeled").symlink_to(corpus / "labeled")  # what `annotated_by` annotates
    store = annotated_by(corpus, tmp_path / "store", make_model(tmp_path / "teacher"))
    select(store.root, tmp_path / "selection", settings=SelectSettings(include_labeled=True))
    common = {"labeled": list_shards(corpus / "labeled"), "store": store, "threads": 1}
    with pytest.raises(LabelError, match="a selection is of --unlabeled shards"):
        train(SMALL, tmp_path / "run", selection=tmp_path / "selection", **common)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="--replay: is of --unlabeled shards"):
        train(SMALL.model_copy(update={"replay": "all"}), tmp_path / "run", **common)  # type: ignore[arg-type]
    plain = SMALL.model_copy(update={"alpha": 0.0, "labeled_fraction": 0.0, "steps": 2})
    assert train(plain, tmp_path / "run", **common).steps == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("update", "labeled", "message"),
    [
        ({"alpha": 0.0}, False, "there are no labels: nothing to learn from"),
        ({"alpha": 0.0, "labeled_fraction": 0.0}, True, "labeled fraction 0 the labels"),
        ({"alpha": 1.0, "label_smoothing": 0.1}, True, "which --alpha 1 leaves out"),
    ],
)
def test_what_would_teach_nothing_is_refused(
    corpus: Path, store: Store, tmp_path: Path, update: dict[str, Any], labeled: bool, message: str
) -> None:
    sets = {} if labeled else {"labeled": ()}
    with pytest.raises((LabelError, SpecError), match=message):
        train_on(corpus, tmp_path / "run", store, SMALL.model_copy(update=update), **sets)


def test_labels_mended_after_annotating_make_it_another_shard(corpus: Path, tmp_path: Path) -> None:
    """All labeled shards lost their soft labels then, and nothing said so."""
    both = annotated_by_all(corpus, tmp_path)
    (shard,) = list_shards(corpus / "labeled")
    samples = [(sample.key, {**sample.fields, "cls": b"0"}) for sample in read_samples(shard)]
    write_shard(Path(shard.path), samples)
    with pytest.raises(StoreMismatch, match="its content is not what was annotated"):
        train_on(corpus, tmp_path / "run", both)


def test_labeled_shards_of_which_some_are_annotated_are_told(corpus: Path, store: Store, tmp_path: Path) -> None:
    shards = list_shards(corpus / "unlabeled")
    labeled = [*list_shards(corpus / "val"), *list_shards(corpus / "labeled")]
    both = annotated_by_all(corpus, tmp_path)
    settings = SMALL.model_copy(update={"steps": 2})
    with pytest.warns(UserWarning, match="1 of 2 labeled shards have soft labels in .*, and these are not used"):
        train(settings, tmp_path / "run", labeled=labeled, unlabeled=shards, store=both, threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(settings, tmp_path / "none", labeled=labeled, unlabeled=shards, store=store, threads=1)


def annotated_by_all(corpus: Path, tmp_path: Path) -> Store:
    """A store of the unlabeled shards and the labeled one, but not of the validation shard."""
    root, mixed = tmp_path / "mixed", tmp_path / "mixed" / "unlabeled"
    mixed.mkdir(parents=True)
    for split in ("labeled", "unlabeled"):
        for path in (corpus / split).iterdir():
            (mixed / path.name).symlink_to(path)
    return annotated_by(root, tmp_path / "both", make_model(tmp_path / "teacher-of-both"))
