"""Training: it learns, repeats itself exactly, and refuses labels that don't fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import Invoke
from conftest import Cli, digit_like, image_bytes, make_model, wait_until_gone

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import load_model
from pseudolabel.dataset import TrainingBatches, split_batch
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import Diverged, LabelError, OutputExists, SpecError, StoreMismatch
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import Store, open_store
from pseudolabel.layout import training_layout
from pseudolabel.losses import NO_LABEL
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard
from pseudolabel.students import build_student
from pseudolabel.teachers import parse_teacher
from pseudolabel.train import TrainResult, train
from pseudolabel.training.image_cache import CacheMode
from pseudolabel.training.inputs import TrainingData, check_annotated, check_labeled, gather
from pseudolabel.training.optim import learning_rate
from pseudolabel.training.order import RowOrder
from pseudolabel.views.image import square

SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=12, batch_size=16, eval_every=4)


@pytest.fixture
def store(corpus: Path, tmp_path: Path) -> Store:
    return _annotated(corpus, tmp_path / "store", make_model(tmp_path / "teacher"))


def _annotated(corpus: Path, out: Path, model: Path, encoding: str = "dense") -> Store:
    teacher = parse_teacher(f"checkpoint:{model}")
    settings = AnnotateSettings(precision="fp32", encoding=encoding)
    annotate(list_shards(corpus / "unlabeled"), teacher, out, engine=LocalEngine("cpu", 1), settings=settings)
    return open_store(out)


def _train(
    corpus: Path, out: Path, store: Store | None = None, settings: TrainSettings = SMALL, **options: object
) -> TrainResult:
    sets = {"labeled": list_shards(corpus / "labeled"), "val": list_shards(corpus / "val")}
    sets |= {"unlabeled": list_shards(corpus / "unlabeled")} if store is not None else {}
    return train(settings, out, **{**sets, "store": store, "threads": 1, **options})  # type: ignore[arg-type]


def test_a_student_learns_from_soft_labels_alone(corpus: Path, tmp_path: Path) -> None:
    """A teacher that knows the classes teaches a student that never sees a label."""
    no_flip = AugmentSettings(crop="none", flip=False)
    settings = SMALL.model_copy(update={"steps": 80, "lr": 1e-2, "augment": no_flip, "eval_every": 80})
    _train(corpus, tmp_path / "teacher", settings=settings)
    labels = _annotated(corpus, tmp_path / "store", tmp_path / "teacher", "topk:2")
    alone = settings.model_copy(update={"labeled_fraction": 0.0, "alpha": 1.0, "seed": 5})
    result = _train(corpus, tmp_path / "student", labels, alone, labeled=())
    assert result.val_accuracy is not None
    assert result.val_accuracy >= 0.9
    measured = evaluate(tmp_path / "student", list_shards(corpus / "val"))
    assert measured.accuracy == pytest.approx(result.val_accuracy)
    agreement = evaluate(tmp_path / "teacher", list_shards(corpus / "val"))
    assert agreement.accuracy >= 0.9


def test_same_seed_same_weights_other_seed_other_weights(corpus: Path, store: Store, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _train(corpus, tmp_path / name, store, SMALL.model_copy(update={"seed": seed}))
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_loader_processes_change_nothing(corpus: Path, store: Store, tmp_path: Path) -> None:
    """Augmentation is seeded by the step, not by the worker that happens to do it."""
    for workers in (0, 2):
        _train(corpus, tmp_path / f"{workers}", store, SMALL.model_copy(update={"steps": 5}), workers=workers)
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_from_a_checkpoint_is_exact(corpus: Path, store: Store, tmp_path: Path, optimizer: str) -> None:
    """Stopped by an exception after the second checkpoint; test_kill.py does it with SIGKILL."""
    settings = SMALL.model_copy(update={"optimizer": optimizer, "lr": 0.02})
    _train(corpus, tmp_path / "whole", store, settings, val=())  # without validation the last weights are kept

    def stop(progress: object) -> None:
        if progress.step == 10 or progress.step == 12:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "stopped", store, settings, on_progress=stop, val=())
    assert not (tmp_path / "stopped" / "run.json").exists()
    assert (tmp_path / "stopped" / "checkpoint" / "state.safetensors").exists()
    result = _train(corpus, tmp_path / "stopped", store, settings, val=())
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    logged = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged))
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    assert result.steps == 12


def test_a_finished_run_is_kept_and_another_is_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    first = _train(corpus, tmp_path / "run", store)
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert _train(corpus, tmp_path / "run", store) == first
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before
    other = SMALL.model_copy(update={"lr": 0.5})
    with pytest.raises(OutputExists, match=r"lr: 0\.002 there, 0\.5 now"):
        _train(corpus, tmp_path / "run", store, other)
    _train(corpus, tmp_path / "run", store, other, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(OutputExists, match=r"dear\.jpg"):
        _train(corpus, tmp_path / "photos", store, overwrite=True)


def test_best_weights_are_kept_not_the_last(corpus: Path, tmp_path: Path) -> None:
    """A learning rate that wrecks the model late: what is saved is what validated best."""
    settings = SMALL.model_copy(
        update={"steps": 40, "eval_every": 2, "lr": 0.3, "ema": 0.0, "clip_norm": 0.0, "optimizer": "sgd"}
    )
    result = _train(corpus, tmp_path / "run", settings=settings)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = {line["step"]: line["val_accuracy"] for line in lines if "val_accuracy" in line}
    assert result.val_accuracy == max(accuracies.values())
    assert accuracies[result.best_step] == result.val_accuracy
    assert evaluate(tmp_path / "run", list_shards(corpus / "val")).accuracy == pytest.approx(result.val_accuracy)


def test_divergence_is_an_error_not_a_model(corpus: Path, tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"lr": 1e30, "clip_norm": 0.0, "optimizer": "sgd", "steps": 40})
    with pytest.raises(Diverged, match="smaller --lr"):
        _train(corpus, tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "run.json").exists()


def test_each_row_meets_its_own_soft_label(corpus: Path, store: Store) -> None:
    """Batches as training sees them: the stored logits of a row equal the teacher's on that very image."""
    labeled, largest = check_labeled(list_shards(corpus / "labeled"), None)
    data = TrainingData(labeled, check_annotated(list_shards(corpus / "unlabeled"), store), store, 4)
    clean = AugmentSettings(crop="none", flip=False)
    batches = TrainingBatches(data, square(12, 1), clean, batch_size=20, labeled_fraction=0.25, seed=3, steps=9)
    model = load_model(store.root.parent / "teacher", torch.device("cpu"))
    assert largest == 4
    for step in range(9):
        batch = batches[step]
        assert batch.targets is not None
        assert (batch.labels_B[:5] >= 0).all()
        assert (batch.labels_B[5:] == NO_LABEL).all()
        logits = model.logits((batch.pixels_BCHW[5:],))
        teacher, student = batch.targets.log_probs(logits, 1.0)
        torch.testing.assert_close(teacher, student, rtol=2e-3, atol=2e-3)


def test_rejects_leave_the_join_intact(tmp_path: Path) -> None:
    """Rows are joined by position: a reject in the middle must not shift those behind it."""
    samples = [(f"k{i}", {"png": b"bad" if i in (0, 4, 9) else image_bytes(i)}) for i in range(10)]
    write_shard(tmp_path / "c" / "unlabeled" / "u.tar", samples)
    model = make_model(tmp_path / "teacher")
    annotate(
        list_shards(tmp_path / "c" / "unlabeled"),
        parse_teacher(f"checkpoint:{model}"),
        tmp_path / "s",
        engine=LocalEngine("cpu", 1),
        max_reject_fraction=1,
    )
    store = open_store(tmp_path / "s")
    data = TrainingData([], check_annotated(list_shards(tmp_path / "c" / "unlabeled"), store), store, 4)
    batch = TrainingBatches(
        data, square(12, 1), AugmentSettings(crop="none", flip=False), batch_size=7, labeled_fraction=0, seed=0, steps=1
    )[0]
    assert batch.targets is not None
    teacher, student = batch.targets.log_probs(load_model(model, torch.device("cpu")).logits((batch.pixels_BCHW,)), 1.0)
    torch.testing.assert_close(teacher, student, rtol=2e-3, atol=2e-3)


def test_labels_of_an_edited_or_swapped_shard_are_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    path = corpus / "unlabeled" / "unlabeled-1.tar"
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    spoiled[512 + 60] ^= 1  # one bit of one image: same size, same keys
    path.write_bytes(spoiled)
    with pytest.raises(StoreMismatch, match=r"unlabeled-1\.tar: its content is not what was annotated"):
        _train(corpus, tmp_path / "run", store)
    path.write_bytes((corpus / "unlabeled" / "unlabeled-2.tar").read_bytes())
    with pytest.raises(StoreMismatch, match=r"unlabeled-1\.tar"):
        _train(corpus, tmp_path / "run", store)
    path.write_bytes(whole)
    (store.root / "parts" / "unlabeled-1.parquet").unlink()
    with pytest.raises(StoreMismatch, match="not annotated"):
        _train(corpus, tmp_path / "run", store)


def test_class_counts_must_agree(corpus: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreMismatch, match="has 4 classes, 5 are asked for"):
        _train(corpus, tmp_path / "run", store, classes=list("abcde"))
    write_shard(corpus / "labeled" / "more.tar", [("x", {"png": digit_like(0, 0), "cls": b"4"})])
    with pytest.raises(LabelError, match=r"'x': its label is 4, but there are 4 classes \(0 to 3\)"):
        _train(corpus, tmp_path / "run", store)


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
        _train(corpus, tmp_path / "run")


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
        _train(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"precision": "fp16"}))


def test_labeled_shards_in_the_store_take_part_in_both_terms(corpus: Path, tmp_path: Path) -> None:
    """A row with a label and a soft label counts in CE and in KL."""
    model = make_model(tmp_path / "teacher")
    both = [*list_shards(corpus / "labeled"), *list_shards(corpus / "unlabeled")]
    annotate(both, parse_teacher(f"checkpoint:{model}"), tmp_path / "store", engine=LocalEngine("cpu", 1))
    store = open_store(tmp_path / "store")
    data, _ = gather(list_shards(corpus / "labeled"), list_shards(corpus / "unlabeled"), store)
    batch = TrainingBatches(
        data, square(12, 1), AugmentSettings(), batch_size=8, labeled_fraction=0.5, seed=0, steps=1
    )[0]
    assert batch.targets is not None
    assert len(batch.targets) == 8
    assert (batch.labels_B >= 0).sum() == 4
    assert _train(corpus, tmp_path / "run", store).steps == 12


@pytest.mark.parametrize("sizes", [[5], [3, 0, 7, 1], [1000, 1, 999]])
def test_an_epoch_has_every_row_once_and_epochs_differ(sizes: list[int]) -> None:
    order = RowOrder(sizes, seed=1)
    total = sum(sizes)
    epochs = [order.rows(epoch * total, total) for epoch in range(3)]
    wanted = sorted((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    assert all(sorted(map(tuple, epoch[:, :2].tolist())) == wanted for epoch in epochs)
    assert [set(epoch[:, 2].tolist()) for epoch in epochs] == [{0}, {1}, {2}]
    if total > 5:
        assert epochs[0][:, :2].tolist() != epochs[1][:, :2].tolist()


def test_any_piece_of_the_order_can_be_had_alone() -> None:
    """Resuming is arithmetic: no draw depends on an earlier one. Windows are forced small to cross their borders."""
    sizes = [70_000, 70_000, 30, 130_000, 5]
    whole = RowOrder(sizes, seed=2).rows(0, 600_000)
    fresh = RowOrder(sizes, seed=2)
    for start in (599_000, 130_990, 270_000, 0, 412_345):
        assert fresh.rows(start, 1000).tolist() == whole[start : start + 1000].tolist()


def test_the_windows_ahead_hold_the_shards_of_the_rows_ahead():
    order = RowOrder([1000] * 500, seed=3)
    for start in (0, 127_000, 129_000, 499_000, 777_777):
        here, *following = order.windows_from(start)
        assert set(order.rows(start, 500)[:, 0].tolist()) <= {
            *here,
            *(shard for window in following for shard in window),
        }
        assert order.rows(start, 1)[0, 0] in here
        assert len(here) == 128 or start >= 384_000


@pytest.mark.parametrize(
    ("batch_size", "fraction", "wanted"),
    [
        (256, 0.125, (32, 224)),
        (256, 0.0, (0, 256)),
        (4, 0.01, (1, 3)),
        (4, 1.0, (3, 1)),
        (1, 0.5, (0, 1)),
        (2, 0.9, (1, 1)),
    ],
)
def test_split_batch(batch_size: int, fraction: float, wanted: tuple[int, int]) -> None:
    assert split_batch(batch_size, fraction, has_labeled=True, has_pseudo=True) == wanted


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    settings = TrainSettings(lr=1.0, warmup_fraction=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_augmentations_keep_shape_and_type(corpus: Path, store: Store, crop: str) -> None:
    data = TrainingData([], check_annotated(list_shards(corpus / "unlabeled"), store), store, 4)
    augment = AugmentSettings(crop=crop, randaugment=9, erasing=1.0)  # type: ignore[arg-type]
    batch = TrainingBatches(data, square(16, 3), augment, batch_size=6, labeled_fraction=0, seed=0, steps=1)[0]
    assert batch.pixels_BCHW.shape == (6, 3, 16, 16)
    assert batch.pixels_BCHW.dtype == torch.uint8


def test_every_encoding_trains(corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "teacher")
    for name in ("dense", "topk:1", "topk:4"):
        labels = _annotated(corpus, tmp_path / f"store-{name}", model, name)
        assert parse_encoding(labels.identity.encoding).name == name
        assert _train(corpus, tmp_path / f"run-{name}", labels, SMALL.model_copy(update={"steps": 2})).steps == 2


def test_class_names_of_pack_and_teacher_must_agree(corpus: Path, tmp_path: Path) -> None:
    """Label 0 is "ant" in the labeled set and "class 0" to the teacher: another label space, whatever the count."""
    labels = _annotated(corpus, tmp_path / "store", make_model(tmp_path / "teacher"))
    (corpus / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    with pytest.raises(
        StoreMismatch,
        match=r"class 0 is 'class 0' to the teacher, 'ant' in the list of the corpus\nlabels .* don't reorder it",
    ):
        _train(corpus, tmp_path / "run", labels)
    _train(corpus, tmp_path / "alone")
    assert load_model(tmp_path / "alone", torch.device("cpu")).classes == ("ant", "bee", "cat", "dog")


def test_a_known_error_in_a_loader_process_stays_one(corpus: Path, tmp_path: Path) -> None:
    """The loader would wrap it in forty lines of traceback."""
    write_shard(corpus / "labeled" / "bad.tar", [("bad", {"png": b"no image", "cls": b"0"})])
    with pytest.raises(LabelError, match=r"^\S+bad\.tar: training sample 'bad' can't be decoded"):
        _train(corpus, tmp_path / "run", workers=1)


def test_overwrite_looks_before_it_clears(corpus: Path, tmp_path: Path) -> None:
    """A page beside the run is the run's own; a stranger's file stops it before anything is gone."""
    _train(corpus, tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("page")
    _train(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"lr": 0.1}), overwrite=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"notes\.txt"):
        _train(corpus, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_paths_will_do_for_the_api(corpus: Path, tmp_path: Path) -> None:
    import pseudolabel

    model = make_model(tmp_path / "teacher")
    pseudolabel.annotate(
        str(corpus / "unlabeled"), f"checkpoint:{model}", tmp_path / "store", engine=LocalEngine("cpu", 1)
    )
    sets = {name: str(corpus / name) for name in ("labeled", "unlabeled", "val")}
    pseudolabel.train(SMALL, tmp_path / "run", store=str(tmp_path / "store"), threads=1, **sets)
    assert pseudolabel.evaluate(tmp_path / "run", [corpus / "val"]).samples == 24


def test_nothing_to_learn_from_is_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="nothing to learn from"):
        _train(corpus, tmp_path / "run", store, SMALL.model_copy(update={"alpha": 0.0, "labeled_fraction": 0.0}))


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


def test_killed_beside_its_loader_process_it_goes_on_to_the_same_weights(
    cli: Cli, invoke: Invoke, corpus: Path, store: Store
) -> None:
    """SIGKILL to the command alone, after its first checkpoint; the loader process must not outlive it."""
    given = ("--labeled", corpus / "labeled", "--unlabeled", corpus / "unlabeled", "--labels", store.root)
    options = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1, "--batch-size", 16)
    place = ("--steps", 60, "--eval-every", 5, "--device", "cpu", "--workers", 1, "--threads", 1)
    arguments = ("train", *given, *options, *place)
    process = cli.start(*arguments, "--out", "killed")
    state = cli.cwd / "killed" / "checkpoint" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert state.exists()
    wait_until_gone(process.pid)
    for name in ("killed", "undisturbed"):
        code, _, err = invoke(*arguments, "--out", cli.cwd / name)
        assert code == 0, err
    killed, undisturbed = (cli.cwd / name / "model.safetensors" for name in ("killed", "undisturbed"))
    assert killed.read_bytes() == undisturbed.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_a_killed_loader_process_is_missed_soon(cli: Cli, corpus: Path) -> None:
    """As when memory runs out. It took five minutes until anything was said."""
    options = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1, "--batch-size", 16)
    place = ("--steps", 100_000, "--device", "cpu", "--workers", 1, "--threads", 1, "--out", "run")
    process = cli.start("train", "--labeled", corpus / "labeled", *options, *place)
    metrics = cli.cwd / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (loader,) = [own for server in _children(process.pid) for own in _children(server)]
    os.kill(loader, signal.SIGKILL)
    assert "a loader process ended" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


def _children(process: int) -> list[int]:
    return [int(own) for own in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_other_class_names_beside_test_or_validation_images_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Images of the same size and other classes gave an accuracy of nothing in particular."""
    _train(corpus, tmp_path / "run", classes=("a", "b", "c", "d"))
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(corpus / "val", tmp_path / "elsewhere" / "test")
    for names, said in (("b\nc\nd\na\n", "'b' where the model has 'a'"), ("a\nb\nc\n", "3, not 4")):
        (tmp_path / "elsewhere" / "classes.txt").write_text(names)
        with pytest.raises(LabelError, match=said):
            evaluate(tmp_path / "run", tmp_path / "elsewhere" / "test")
        with pytest.raises(LabelError, match=said):
            _train(corpus, tmp_path / "other", classes=("a", "b", "c", "d"), val=tmp_path / "elsewhere" / "test")
    (tmp_path / "elsewhere" / "classes.txt").write_text("a\nb\nc\nd\n")
    assert evaluate(tmp_path / "run", tmp_path / "elsewhere" / "test").samples == 24


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


def test_two_trainings_do_not_share_a_directory(corpus: Path, tmp_path: Path) -> None:
    """Both ended well, and one student was gone."""

    def second(_: object) -> None:
        with pytest.raises(OutputExists, match="another process is at work in it"):
            _train(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"seed": 1}))

    _train(corpus, tmp_path / "run", on_progress=second)


def test_a_model_or_recipe_of_ones_own_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "best")
    before = (model / "model.safetensors").read_bytes()
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "recipe.toml").write_text("# mine")
    for place in (model, tmp_path / "exp"):
        with pytest.raises(OutputExists, match="is not of a training run"):
            _train(corpus, place)
    assert (model / "model.safetensors").read_bytes() == before
    assert _train(corpus, model, overwrite=True).steps == SMALL.steps


def test_weights_that_end_infinite_are_an_error(corpus: Path, tmp_path: Path) -> None:
    """The loss of the last step was still finite; what it did to the weights was saved."""
    with pytest.raises(Diverged, match="no longer finite"):
        _train(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"steps": 1, "lr": 1e38, "ema": 0.0}), val=())
    assert not (tmp_path / "run" / "run.json").exists()


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
