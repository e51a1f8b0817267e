"""What settings make of the data before the first step: how rows are presented, how many steps, what the run is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.checkpoint import ModelCard
from pseudolabel.classes.space import check_names
from pseudolabel.dataset import split_batch
from pseudolabel.errors import LabelError, LaunchError, SpecError
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.sampled import Sampled
from pseudolabel.labels.store import Store, open_store
from pseudolabel.losses import SoftLabels, check_loss, parse_loss
from pseudolabel.precision import check_precision, resolve_precision
from pseudolabel.selection import Selection, open_selection
from pseudolabel.settings import AnnotateSettings, TrainSettings
from pseudolabel.shard_lists import ShardsLike, as_shards
from pseudolabel.students import parse_student
from pseudolabel.students.start import Start
from pseudolabel.training.distributed import Team
from pseudolabel.training.inputs import TrainingData, TrainingShard, gather
from pseudolabel.training.label_balance import label_loss
from pseudolabel.training.starting import find_start
from pseudolabel.training.validate import Validation
from pseudolabel.views.image import Preprocessing, square

_MANY_CLASSES = 1 << 20  # more than any loss wants at the least
_SOME_CLASSES = 10  # to see whether a student can be built


PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Training:
    """What is trained, on what, for how long: all that decides the result, checked against each other."""

    settings: TrainSettings
    card: ModelCard
    data: TrainingData
    steps: int
    validation: Validation | None = None
    start: Start | None = None

    def identity(self) -> dict[str, Any]:
        """What makes the run this one: settings, and hashes of all that was read."""
        data, card, start = self.data, self.card, self.start
        # These two are there only where they matter: fingerprints made before them stay.
        more = {"initial_weights": start.fingerprint()} if start is not None else {}
        more |= {"config": _sha256(card.config)} if card.config is not None else {}
        return {
            "settings": self.settings.model_dump(mode="json"),
            "classes": _sha256(card.classes),
            "labeled": _contents(data.labeled),
            "unlabeled": _contents(data.unlabeled),
            "val": self.validation.sha256 if self.validation is not None else None,
            "store": data.store.fingerprint if data.store is not None else None,
            "selection": data.selection.fingerprint if data.selection is not None else None,
            "calibration": data.calibration.fingerprint if data.calibration is not None else None,
            **more,
        }


def set_up(
    settings: TrainSettings,
    *,
    labeled: ShardsLike,
    unlabeled: ShardsLike,
    store: Store | PathLike | None,
    val: ShardsLike,
    selection: Selection | PathLike | None,
    calibration: Calibration | PathLike | None,
    classes: Sequence[str] | None,
    num_classes: int | None,
    init_from: PathLike | None,
    device: str,
    team: Team,
) -> Training:
    """Read and check all that `train` is given, and raise what it raises before the first step; nothing is written."""
    settings = settings.model_copy(update={"precision": resolve_precision(settings.precision, device)})
    check_shares(settings, team)
    check_precision(settings.precision, device)
    store = store if isinstance(store, Store) or store is None else open_store(store)
    val = as_shards(val)
    selection = selection if isinstance(selection, Selection) or selection is None else open_selection(selection)
    if not isinstance(calibration, Calibration) and calibration is not None:
        calibration = read_calibration(calibration)
    data, names = gather(as_shards(labeled), as_shards(unlabeled), store, classes, num_classes, selection, calibration)
    data = as_set(data, settings)
    student = parse_student(settings.student)
    start = find_start(student, len(names), settings.channels, init_from)
    card = ModelCard(settings.student, names, preprocessing_of(settings, start), student.config)
    check_names(val, names)
    validation = Validation(val, card.preprocessing, len(names), device, team) if val else None
    parse_loss(settings.loss)
    if store is not None:
        check_loss(settings.loss, soft_labels(settings, data, store))
    if data.unlabeled:
        _check_learns(settings, has_labeled=bool(data.labeled))
    return Training(settings, card, data, number_of_steps(settings, data), validation, start)


def check_shares(settings: TrainSettings, team: Team) -> None:
    """Two rows at once, as many as one process needs: batch norms of a single row would fail."""
    if settings.batch_size < 2 * team.world.size:
        raise LaunchError(
            f"--batch-size {settings.batch_size} is for all {team.world.size} processes together, and each needs 2 "
            f"rows; make it {2 * team.world.size} or more, or start fewer processes"
        )
    if settings.batch_size < 2 * team.world.size * settings.accumulate:
        raise SpecError(
            f"--accumulate {settings.accumulate}: --batch-size {settings.batch_size} in so many parts"
            f"{f', by {team.world.size} processes,' if team.world.size > 1 else ''} leaves fewer than 2 rows for one"
        )


def preprocessing_of(settings: TrainSettings, start: Start | None = None) -> Preprocessing:
    """The student's clean view. Trained on random areas, it looks at the centre of a slightly larger image. Weights
    that it starts from were trained on images normalised in their own way, and see them so again.
    """
    made = square(settings.input_size, settings.channels)
    if start is not None and start.norm is not None:
        made = dataclasses.replace(made, mean=start.norm[0], std=start.norm[1])
    return (
        dataclasses.replace(made, resize=round(settings.input_size / 0.875))
        if settings.augment.crop == "resized"
        else made
    )


def as_set(data: TrainingData, settings: TrainSettings) -> TrainingData:
    """The data as the settings want it presented. Raises `SpecError` or
    `LabelError` for what they can't have.
    """
    idle = _options_of_labels(settings)
    if idle and not data.labeled:
        raise SpecError(f"{idle[0]}: is about labeled rows, and no labels are trained on; leave it out")
    if data.store is not None:
        _check_labels_count(settings, alone=not data.unlabeled)
    label_loss(settings, data.label_counts())  # refuses what it can't use, before the run directory is made
    return dataclasses.replace(data, replay=_views(data, settings), balanced=settings.label_sampling == "balanced")


def _options_of_labels(settings: TrainSettings) -> list[str]:
    """The flags that were given and are about labels."""
    of_labels = {
        "label_sampling": settings.label_sampling != "natural",
        "label_smoothing": settings.label_smoothing > 0,
        "class_weights": settings.class_weights != "none",
        "logit_adjustment": settings.logit_adjustment > 0,
    }
    return [f"--{name.replace('_', '-')}" for name, asked in of_labels.items() if asked]


def _check_labels_count(settings: TrainSettings, *, alone: bool) -> None:
    """Raise `SpecError` for options of labels that don't count beside soft labels. `alone`: all rows have labels."""
    idle = _options_of_labels(settings)
    if idle and settings.labeled_fraction == 0 and not alone:
        raise SpecError(f"{idle[0]}: is about labeled rows, and no labels are trained on; leave it out")
    of_loss = [flag for flag in idle if flag != "--label-sampling"]
    if of_loss and settings.alpha == 1:
        raise SpecError(f"{of_loss[0]}: is about the loss of labels, which --alpha 1 leaves out; leave out one of them")


def _views(data: TrainingData, settings: TrainSettings) -> int:
    """How many augmented views to replay. Raises `SpecError` if the store hasn't so many."""
    if settings.replay is None or data.store is None:
        return 0
    if not data.unlabeled:
        raise SpecError(
            "--replay: is of --unlabeled shards; labeled rows always have the student's own augmentation; leave it out"
        )
    return _replayed(settings.replay, data.store.identity.num_views, str(data.store.root))


def _replayed(asked: int | str, num_views: int, where: str) -> int:
    there = num_views - 1
    wanted = there if isinstance(asked, str) else asked
    if not 1 <= wanted <= there:
        raise SpecError(
            f"--replay {asked}: {where} has {there} augmented views of a sample\n"
            f"annotate with --views {wanted + 1 if wanted else 5} (the clean one counts), or leave --replay out"
        )
    return wanted


def soft_labels(settings: TrainSettings, data: TrainingData, store: Store) -> SoftLabels:
    """What the loss will see of the store."""
    mapped = data.calibration
    return SoftLabels(
        parse_encoding(store.identity.encoding),
        data.num_classes,
        settings.temperature * (mapped.temperature if mapped is not None else 1.0),
        settings.tail if mapped is None or mapped.is_temperature else "uniform",
        settings.standardize,
        unlabeled=bool(data.unlabeled),
    )


def check_before_annotating(
    settings: TrainSettings,
    stored: AnnotateSettings,
    classes: Sequence[str] | None,
    *,
    calibrated: bool,
    device: str,
) -> None:
    """Raise `SpecError` or `LabelError` for settings that can't learn from labels stored so: a teacher may be about to
    label for hours. Of what isn't known yet nothing is said: without `classes` their number, `auto`'s encoding.
    """
    parse_loss(settings.loss)
    check_shares(settings, Team())
    check_precision(settings.precision, device)
    _check_learns(settings, has_labeled=True)
    _check_labels_count(settings, alone=False)
    if settings.replay is not None:
        _replayed(settings.replay, stored.views, "the store to be made")
    names = tuple(classes) if classes is not None else tuple(map(str, range(_SOME_CLASSES)))
    num_weights = len(names) if classes is not None else settings.class_weights.count(",") + 1
    label_loss(settings.model_copy(update={"logit_adjustment": 0.0}), np.ones(num_weights, np.int64))
    student = parse_student(settings.student)
    with torch.random.fork_rng(devices=[]):
        ModelCard(settings.student, names, preprocessing_of(settings), student.config).build()
    if stored.encoding.startswith("auto:"):
        return
    encoding = parse_encoding(stored.encoding)
    if calibrated and isinstance(encoding, Sampled):
        raise SpecError(
            f"calibrate: labels of {encoding.name} are draws, and can't be calibrated; choose topk or dense"
        )
    num_classes = len(names) if classes is not None else _MANY_CLASSES
    given = SoftLabels(encoding, num_classes, settings.temperature, settings.tail, settings.standardize)
    check_loss(settings.loss, given)


def _check_learns(settings: TrainSettings, *, has_labeled: bool) -> None:
    """Where there are unlabeled rows. Raises `LabelError` if neither they nor labeled ones count."""
    if settings.alpha == 0 and not has_labeled:
        raise LabelError("alpha 0 leaves out the soft labels, and there are no labels: nothing to learn from")
    if settings.alpha == 0 and settings.labeled_fraction == 0:
        raise LabelError("alpha 0 leaves out the soft labels and labeled fraction 0 the labels: nothing to learn from")


def number_of_steps(settings: TrainSettings, data: TrainingData) -> int:
    if settings.epochs is None:
        return settings.steps if settings.steps is not None else 1000
    num_labeled, num_pseudo = split_batch(
        settings.batch_size,
        settings.labeled_fraction,
        has_labeled=bool(data.labeled),
        has_pseudo=bool(data.unlabeled),
    )
    rows = sum(one.rows for one in (data.unlabeled if num_pseudo else data.labeled))
    return max(1, round(settings.epochs * rows / (num_pseudo or num_labeled)))


def _contents(shards: Sequence[TrainingShard]) -> str:
    lines = [f"{one.shard.name} {one.sha256} {one.part is not None}" for one in shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
