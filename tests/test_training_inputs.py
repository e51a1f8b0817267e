"""What a training refuses: shards, labels and class names that don't fit each other, or of which nothing is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import digit_like, image_bytes, make_model
from small_trainings import SMALL, annotated_by, small_store, train_on  # noqa: F401 (a fixture)

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import load_model
from pseudolabel.dataset import TrainingBatches
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import LabelError, SpecError, StoreMismatch
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.store import Store
from pseudolabel.settings import AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard
from pseudolabel.train import train
from pseudolabel.training.image_cache import CacheMode
from pseudolabel.training.inputs import TrainingData, check_annotated
from pseudolabel.views.image import square


def test_labels_of_an_edited_or_swapped_shard_are_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    path = corpus / "unlabeled" / "unlabeled-1.tar"
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    spoiled[512 + 60] ^= 1  # one bit of one image: same size, same keys
    path.write_bytes(spoiled)
    with pytest.raises(StoreMismatch, match=r"unlabeled-1\.tar: its content is not what was annotated"):
        train_on(corpus, tmp_path / "run", store)
    path.write_bytes((corpus / "unlabeled" / "unlabeled-2.tar").read_bytes())
    with pytest.raises(StoreMismatch, match=r"unlabeled-1\.tar"):
        train_on(corpus, tmp_path / "run", store)
    path.write_bytes(whole)
    (store.root / "parts" / "unlabeled-1.parquet").unlink()
    with pytest.raises(StoreMismatch, match="not annotated"):
        train_on(corpus, tmp_path / "run", store)


def test_a_shard_replaced_during_training_is_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    """The same keys and other images: the labels would be of images that are no longer there."""
    path = corpus / "unlabeled" / "unlabeled-1.tar"
    checked = check_annotated(list_shards(corpus / "unlabeled"), store)
    samples = [(f"unlabeled/1-{index:03d}", {"png": digit_like(index % 4, index)}) for index in range(24)]
    same = path.read_bytes()
    data = TrainingData((), checked, store, 4)
    options = {"batch_size": 72, "labeled_fraction": 0.0, "seed": 0, "steps": 1}
    write_shard(path, samples)
    with pytest.raises(StoreMismatch, match=r"unlabeled-1.tar: was replaced since this training began"):
        TrainingBatches(data, square(12, 1), AugmentSettings(), **options)[0]  # type: ignore[arg-type]
    path.write_bytes(same)
    assert len(TrainingBatches(data, square(12, 1), AugmentSettings(), **options)[0].labels_B) == 72  # type: ignore[arg-type]


def test_class_counts_must_agree(corpus: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match="has 4 classes, 5 are asked for"):
        train_on(corpus, tmp_path / "run", store, classes=list("abcde"))
    write_shard(corpus / "labeled" / "more.tar", [("x", {"png": digit_like(0, 0), "cls": b"4"})])
    with pytest.raises(LabelError, match=r"'x': its label is 4, but there are 4 classes \(0 to 3\)"):
        train_on(corpus, tmp_path / "run", store)


def test_class_names_of_pack_and_teacher_must_agree(corpus: Path, tmp_path: Path) -> None:
    """Label 0 is "ant" in the labeled set and "class 0" to the teacher: another label space, whatever the count."""
    labels = annotated_by(corpus, tmp_path / "store", make_model(tmp_path / "teacher"))
    (corpus / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    with pytest.raises(
        StoreMismatch,
        match=r"class 0 is 'class 0' to the teacher, 'ant' in the list of the corpus\nlabels .* don't reorder it",
    ):
        train_on(corpus, tmp_path / "run", labels)
    train_on(corpus, tmp_path / "alone")
    assert load_model(tmp_path / "alone", torch.device("cpu")).classes == ("ant", "bee", "cat", "dog")


def test_other_class_names_beside_test_or_validation_images_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Images of the same size and other classes gave an accuracy of nothing in particular."""
    train_on(corpus, tmp_path / "run", classes=("a", "b", "c", "d"))
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(corpus / "val", tmp_path / "elsewhere" / "test")
    for names, said in (("b\nc\nd\na\n", "'b' where the model has 'a'"), ("a\nb\nc\n", "3, not 4")):
        (tmp_path / "elsewhere" / "classes.txt").write_text(names)
        with pytest.raises(LabelError, match=said):
            evaluate(tmp_path / "run", tmp_path / "elsewhere" / "test")
        with pytest.raises(LabelError, match=said):
            train_on(corpus, tmp_path / "other", classes=("a", "b", "c", "d"), val=tmp_path / "elsewhere" / "test")
    (tmp_path / "elsewhere" / "classes.txt").write_text("a\nb\nc\nd\n")
    assert evaluate(tmp_path / "run", tmp_path / "elsewhere" / "test").samples == 24


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"png": image_bytes()}, "has no label"),
        ({"png": image_bytes(), "cls": b"dog"}, "'dog'"),
        ({"png": image_bytes(), "cls": b"-1"}, "'-1'"),
    ],
)
def test_a_labeled_set_needs_labels(corpus: Path, tmp_path: Path, fields: dict[str, bytes], message: str) -> None:
    write_shard(corpus / "labeled" / "odd.tar", [("odd", fields)])
    with pytest.raises(LabelError, match=f"odd.tar.*{message}"):
        train_on(corpus, tmp_path / "run")


def test_a_known_error_in_a_loader_process_stays_one(corpus: Path, tmp_path: Path) -> None:
    """The loader would wrap it in forty lines of traceback."""
    write_shard(corpus / "labeled" / "bad.tar", [("bad", {"png": b"no image", "cls": b"0"})])
    with pytest.raises(LabelError, match=r"^\S+bad\.tar: training sample 'bad' can't be decoded"):
        train_on(corpus, tmp_path / "run", workers=1)


def test_missing_inputs_say_what_is_missing(corpus: Path, store: Store, tmp_path: Path) -> None:
    unlabeled = list_shards(corpus / "unlabeled")
    with pytest.raises(LabelError, match="nothing to train on"):
        train(SMALL, tmp_path / "run")
    with pytest.raises(LabelError, match="--labels"):
        train(SMALL, tmp_path / "run", unlabeled=unlabeled)
    with pytest.raises(LabelError, match="--unlabeled"):
        train(SMALL, tmp_path / "run", store=store, labeled=list_shards(corpus / "labeled"))
    with pytest.raises(LabelError, match="both as"):
        train(
            SMALL,
            tmp_path / "run",
            store=store,
            labeled=unlabeled[:1],
            unlabeled=unlabeled,
        )
    with pytest.raises(SpecError, match="fp16 needs a GPU"):
        train_on(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"precision": "fp16"}))


def test_nothing_to_learn_from_is_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="nothing to learn from"):
        train_on(corpus, tmp_path / "run", store, SMALL.model_copy(update={"alpha": 0.0, "labeled_fraction": 0.0}))


def test_a_store_without_rows_teaches_nothing(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """It ended in an assertion."""
    write_shard(tmp_path / "broken" / "b.tar", [(f"{index}", {"png": b"none"}) for index in range(4)])
    annotate(
        tmp_path / "broken",
        f"checkpoint:{teacher_dir}",
        tmp_path / "none",
        max_reject_fraction=1,
        engine=LocalEngine("cpu", 1),
    )
    settings = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, batch_size=4, steps=1)
    with pytest.raises(LabelError, match="has no rows for the --unlabeled shards"):
        train(
            settings,
            tmp_path / "run",
            labeled=corpus / "labeled",
            unlabeled=tmp_path / "broken",
            store=tmp_path / "none",
        )


@pytest.mark.parametrize("cache", ["off", "ram"])
def test_labeled_shards_of_which_nothing_is_left_are_refused(
    corpus: Path, teacher_dir: Path, tmp_path: Path, cache: CacheMode
) -> None:
    """Annotated, but all rejected: it ended in an assertion, or an index out of range."""
    write_shard(tmp_path / "broken" / "b.tar", [(f"{index}", {"png": b"none", "cls": b"1"}) for index in range(4)])
    shards = [tmp_path / "broken" / "b.tar", *sorted((corpus / "unlabeled").glob("*.tar"))]
    engine = LocalEngine("cpu", 1)
    annotate(shards, f"checkpoint:{teacher_dir}", tmp_path / "s", max_reject_fraction=1, engine=engine)
    sets = {"labeled": tmp_path / "broken", "unlabeled": corpus / "unlabeled", "store": tmp_path / "s"}
    with pytest.raises(LabelError, match="all samples of the --labeled shards were rejected"):
        train(SMALL, tmp_path / "run", cache=cache, **sets)  # type: ignore[arg-type]
