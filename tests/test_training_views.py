"""What a student is shown: augmented, replayed, from memory; the same whoever makes it."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_bytes, make_model
from torch import Tensor

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import load_model
from pseudolabel.dataset import Batch, TrainingBatches
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import SpecError, StoreMismatch
from pseudolabel.labels.store import Store, open_store
from pseudolabel.replay import open_replay
from pseudolabel.selection import open_selection
from pseudolabel.selection.select import select
from pseudolabel.settings import AnnotateSettings, AugmentSettings, SelectSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples
from pseudolabel.train import train
from pseudolabel.training.inputs import TrainingData, gather
from pseudolabel.training.views import Augmented, random_boxes
from pseudolabel.uniforms import uniforms
from pseudolabel.views.image import square

VIEWS = 4  # the clean one and three augmented
SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=6, batch_size=16, eval_every=3)


@pytest.fixture
def store(corpus: Path, tmp_path: Path) -> Store:
    settings = AnnotateSettings(precision="fp32", views=VIEWS)
    teacher = f"checkpoint:{make_model(tmp_path / 'teacher')}"
    annotate(corpus / "unlabeled", teacher, tmp_path / "store", engine=LocalEngine("cpu", 1), settings=settings)
    return open_store(tmp_path / "store")


@pytest.fixture
def data(corpus: Path, store: Store) -> TrainingData:
    return gather(list_shards(corpus / "labeled"), list_shards(corpus / "unlabeled"), store)[0]


def _batches(data: TrainingData, augment: AugmentSettings | None = None, **options: int) -> TrainingBatches:
    given = {"batch_size": 24, "seed": 3, "steps": 40} | options
    return TrainingBatches(data, square(12, 1), augment or AugmentSettings(), labeled_fraction=0.25, **given)  # type: ignore[arg-type]


def _same(one: Batch, other: Batch) -> bool:
    assert one.targets is not None
    assert other.targets is not None
    columns = other.targets.columns
    return (
        torch.equal(one.pixels_BCHW, other.pixels_BCHW)
        and torch.equal(one.labels_B, other.labels_B)
        and all(torch.equal(column, columns[name]) for name, column in one.targets.columns.items())
    )


def test_replayed_rows_are_what_the_teacher_labeled(data: TrainingData, store: Store) -> None:
    """The teacher's logits on the student's pixels are the stored ones; each view's label comes with its pixels."""
    model = load_model(store.root.parent / "teacher", torch.device("cpu"))
    batches = _batches(dataclasses.replace(data, replay=3))
    for step in range(8):
        batch = batches[step]
        assert batch.targets is not None
        assert not {"view", "crop"} & batch.targets.columns.keys()
        teacher, student = batch.targets.log_probs(model.logits((batch.pixels_BCHW[6:],)), 1.0)
        torch.testing.assert_close(teacher, student, rtol=2e-3, atol=2e-3)


def test_every_epoch_shows_another_view_until_all_were_seen(corpus: Path, data: TrainingData, store: Store) -> None:
    replay = open_replay(store.identity, square(12, 1))
    seen: dict[bytes, tuple[str, int]] = {}
    for shard in list_shards(corpus / "unlabeled"):
        images = {sample.key: sample.fields["png"] for sample in read_samples(shard)}
        for row in store.read(shard.name, ["key", "view", "crop", "flip", "aug_seed"]).to_pylist():
            seen[replay(images[row["key"]], row).numpy().tobytes()] = row["key"], row["view"]
    batches = _batches(dataclasses.replace(data, replay=3))
    found = [seen[one.numpy().tobytes()] for step in range(12) for one in batches[step].pixels_BCHW[6:]]
    assert set(Counter(found).values()) == {1}  # three epochs of 72 rows
    assert {view for _, view in found} == {1, 2, 3}
    first_epoch = [seen[one.numpy().tobytes()][0] for step in range(4) for one in batches[step].pixels_BCHW[6:]]
    assert len(set(first_epoch)) == 72


def test_labeled_rows_are_augmented_beside_replayed_ones(data: TrainingData) -> None:
    batches, plain = _batches(dataclasses.replace(data, replay=1)), _batches(data)
    assert torch.equal(batches[0].pixels_BCHW[:6], plain[0].pixels_BCHW[:6])
    assert not torch.equal(batches[0].pixels_BCHW[6:], plain[0].pixels_BCHW[6:])


def test_a_selection_of_the_clean_view_takes_the_others_along(
    corpus: Path, data: TrainingData, store: Store, tmp_path: Path
) -> None:
    select(store, tmp_path / "selection", SelectSettings(top_per_class=5))
    chosen, _ = gather((), list_shards(corpus / "unlabeled"), store, selection=open_selection(tmp_path / "selection"))
    model = load_model(store.root.parent / "teacher", torch.device("cpu"))
    rows = sum(source.rows for source in chosen.unlabeled)
    batch = _batches(dataclasses.replace(chosen, replay=2), batch_size=rows)[1]
    assert batch.targets is not None
    teacher, student = batch.targets.log_probs(model.logits((batch.pixels_BCHW,)), 1.0)
    torch.testing.assert_close(teacher, student, rtol=2e-3, atol=2e-3)


def test_large_jpegs_are_replayed_as_small_as_the_teacher_saw_them(
    make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a store made with --fast-jpeg."""
    photo = image_bytes(size=(200, 160), mode="RGB", kind="JPEG")
    shard = make_shard("photos", [("a", {"jpg": photo})])
    settings = AnnotateSettings(precision="fp32", views=2, fast_jpeg=True)
    teacher = f"checkpoint:{make_model(tmp_path / 'teacher')}"
    annotate(shard, teacher, tmp_path / "store", engine=LocalEngine("cpu", 1), settings=settings)
    store = open_store(tmp_path / "store")
    row = store.read("photos", ["key", "view", "crop", "flip", "aug_seed"]).to_pylist()[1]
    wanted = open_replay(store.identity, square(12, 1))(photo, row)
    data = dataclasses.replace(gather((), list_shards(str(shard)), store)[0], replay=1)
    for mode in ("off", "ram"):
        batches = _batches(data, batch_size=2)
        batches.keep_images(mode, workers=0, on_note=lambda note: None)
        assert torch.equal(batches[0].pixels_BCHW[0], wanted)


def test_a_replay_the_store_has_not_is_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    sets = {"unlabeled": corpus / "unlabeled", "store": store, "threads": 1}
    with pytest.raises(SpecError, match=r"--replay 4: \S+ has 3 augmented views of a sample\nannotate with --views 5"):
        train(SMALL.model_copy(update={"replay": 4}), tmp_path / "run", **sets)  # type: ignore[arg-type]
    result = train(SMALL.model_copy(update={"replay": "all"}), tmp_path / "run", **sets)  # type: ignore[arg-type]
    assert result.steps == 6


def test_views_out_of_order_are_refused(data: TrainingData, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which row is which view is read, not assumed."""
    read = Store.read
    monkeypatch.setattr(
        Store, "read", lambda self, *given: (table := read(self, *given)).take(list(range(len(table)))[::-1])
    )
    with pytest.raises(StoreMismatch, match="run `verify`"):
        _batches(dataclasses.replace(data, replay=3))[0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("augment", "replay"),
    [(AugmentSettings(erasing=0.5), 0), (AugmentSettings(crop="resized"), 0), (AugmentSettings(), 3)],
)
def test_images_from_memory_make_the_same_batches(
    data: TrainingData, augment: AugmentSettings, replay: int, workers: int
) -> None:
    data = dataclasses.replace(data, replay=replay)
    fresh, kept = _batches(data, augment), _batches(data, augment)
    notes: list[str] = []
    kept.keep_images("ram", workers=workers, on_note=notes.append)
    assert notes == ["96 images decoded once and kept in memory: 14 kB (--cache off decodes them anew)"]
    for source in (*data.labeled, *data.unlabeled):
        assert source.rows
    assert all(_same(fresh[step], kept[step]) for step in (0, 5, 17))


def test_auto_keeps_what_is_used_twice(data: TrainingData) -> None:
    for steps, told in ((4, 0), (40, 1)):
        notes: list[str] = []
        _batches(data, steps=steps, batch_size=12).keep_images("auto", workers=0, on_note=notes.append)
        assert len(notes) == told


def test_what_does_not_fit_is_refused_or_left_out(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pseudolabel.training.image_cache._free_memory", lambda: 10_000)
    batches = _batches(data)
    with pytest.raises(SpecError, match=r"--cache ram: .* about 14 kB, free are 10 kB; use --cache off or auto"):
        batches.keep_images("ram", workers=0, on_note=pytest.fail)
    batches.keep_images("auto", workers=0, on_note=pytest.fail)
    assert batches[0].pixels_BCHW.shape == (24, 1, 12, 12)


def test_batches_pickle_for_loader_processes(data: TrainingData) -> None:
    batches = _batches(data)
    assert _same(pickle.loads(pickle.dumps(batches))[7], batches[7])  # noqa: S301 (our own bytes)


def test_any_share_of_a_batch_is_what_the_whole_has(data: TrainingData) -> None:
    """A row's augmentation follows from the row, not from who makes it or beside which others."""
    settings = AugmentSettings(randaugment=5, erasing=0.5)
    one, images = Augmented(settings, square(12, 1)), torch.randint(256, (9, 1, 12, 12), dtype=torch.uint8)
    seeds = torch.arange(100, 109)
    whole = one.present(images, seeds, {})
    for rows in ([0], [3, 8], [8, 3, 1]):
        assert torch.equal(one.present(images[rows], seeds[rows], {}), whole[rows])


def test_shifts_and_flips_move_pixels_and_nothing_else() -> None:
    images = torch.arange(1, 145, dtype=torch.uint8).view(1, 1, 12, 12).repeat(4000, 1, 1, 1)
    seen = Augmented(AugmentSettings(), square(12, 1)).present(images, torch.arange(4000), {})
    counts = Counter(one.numpy().tobytes() for one in seen)
    assert len(counts) == 18  # by −1, 0 or 1 down and right, flipped or not
    assert min(counts.values()) > 4000 / 18 * 0.7
    clean = images[0, 0].numpy()
    wanted = np.zeros((12, 12), np.uint8)
    wanted[1:, :-1] = clean[:-1, 1:]
    assert wanted.tobytes() in counts
    assert np.ascontiguousarray(wanted[:, ::-1]).tobytes() in counts


def test_only_flips_where_crops_are_off() -> None:
    images = torch.randint(256, (200, 3, 5, 5), dtype=torch.uint8)
    seen = Augmented(AugmentSettings(crop="none"), square(5, 3)).present(images, torch.arange(200), {})
    kept, flipped = (seen == images).flatten(1).all(1), (seen == images.flip(-1)).flatten(1).all(1)
    assert bool((kept | flipped).all())
    assert 60 < int(flipped.sum()) < 140
    still = Augmented(AugmentSettings(crop="none", flip=False), square(5, 3))
    assert torch.equal(still.present(images, torch.arange(200), {}), images)


def test_erasing_blackens_one_box_of_so_many_images() -> None:
    images = torch.full((1000, 1, 20, 20), 9, dtype=torch.uint8)
    seen = Augmented(AugmentSettings(crop="none", flip=False, erasing=0.3), square(20, 1))
    share = (seen.present(images, torch.arange(1000), {}) == 0).flatten(1).double().mean(1)
    assert 230 < int((share > 0).sum()) < 370
    assert float(share[share > 0].min()) > 0.01
    assert float(share.max()) < 0.25


def _boxes(sides: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> np.ndarray:
    return random_boxes(uniforms(torch.arange(len(sides)), 22).numpy(), sides.numpy(), scale, ratio)


def test_random_boxes_follow_the_law_of_random_resized_crops() -> None:
    sides = torch.tensor([60, 60]).repeat(5000, 1)
    top, left, height, width = _boxes(sides, (0.25, 1.0), (3 / 4, 4 / 3)).T
    area, ratio = height * width / 3600, width / height
    assert ((top >= 0) & (top + height <= 60) & (left >= 0) & (left + width <= 60)).all()
    assert 0.24 < area.min() < 0.27
    assert 0.7 < ratio.min() < ratio.max() < 1.4
    assert abs(np.log(ratio).mean()) < 0.02
    free = height < 60
    assert abs((top[free] / (60 - height[free])).mean() - 0.5) < 0.02


@pytest.mark.parametrize(("side", "wanted"), [((3, 300), (3, 4)), ((300, 3), (4, 3)), ((1, 1), (1, 1))])
def test_a_strip_gets_the_largest_box_that_fits(side: tuple[int, int], wanted: tuple[int, int]) -> None:
    boxes = _boxes(torch.tensor([side]).repeat(50, 1), (0.9, 1.0), (3 / 4, 4 / 3))
    assert {tuple(box) for box in boxes[:, 2:].tolist()} == {wanted}
