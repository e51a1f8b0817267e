"""The rows of each batch: in which order they come, and that each comes with its own image, label and soft label."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import image_bytes, make_model
from small_trainings import small_store, train_on  # noqa: F401 (a fixture)

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import load_model
from pseudolabel.dataset import TrainingBatches, split_batch
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.store import Store, open_store
from pseudolabel.losses import NO_LABEL
from pseudolabel.settings import AugmentSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard
from pseudolabel.teachers import parse_teacher
from pseudolabel.training.inputs import TrainingData, check_annotated, check_labeled, gather
from pseudolabel.training.order import RowOrder
from pseudolabel.views.image import square


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
    assert train_on(corpus, tmp_path / "run", store).steps == 12


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_augmentations_keep_shape_and_type(corpus: Path, store: Store, crop: str) -> None:
    data = TrainingData([], check_annotated(list_shards(corpus / "unlabeled"), store), store, 4)
    augment = AugmentSettings(crop=crop, randaugment=9, erasing=1.0)  # type: ignore[arg-type]
    batch = TrainingBatches(data, square(16, 3), augment, batch_size=6, labeled_fraction=0, seed=0, steps=1)[0]
    assert batch.pixels_BCHW.shape == (6, 3, 16, 16)
    assert batch.pixels_BCHW.dtype == torch.uint8
