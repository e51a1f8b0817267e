"""Training a student offline from cached soft labels and the labeled set.

No teacher is loaded: its soft labels are read from the store beside the images. A run directory is complete when its
run.json exists; until then the same command goes on from checkpoint/, on a CPU to the same weights, bit for bit, as
if never interrupted (with the same number of threads and processes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pseudolabel import storage
from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.dataset import TrainingBatches
from pseudolabel.distributed import Team
from pseudolabel.errors import LabelError, LaunchError
from pseudolabel.inputs import TrainingData, TrainingShard, gather
from pseudolabel.interfaces import Tracker
from pseudolabel.label_space import check_names
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import Store, open_store
from pseudolabel.loop import TrainingLoop, TrainProgress
from pseudolabel.rundir import RunDirectory
from pseudolabel.selection import Selection, open_selection
from pseudolabel.settings import TrainSettings
from pseudolabel.shard_lists import ShardsLike, as_shards
from pseudolabel.tracking import Tracking
from pseudolabel.validate import Validation
from pseudolabel.views.image import Preprocessing, square


@dataclass(frozen=True)
class TrainResult:
    """What `train` reports. `val_accuracy` is that of the kept (best) weights; None without a validation set."""

    run: str
    steps: int
    seconds: float
    val_accuracy: float | None
    best_step: int
    parameters: int


def train(
    settings: TrainSettings,
    out: str | os.PathLike[str],
    *,
    labeled: ShardsLike = (),
    unlabeled: ShardsLike = (),
    store: Store | str | os.PathLike[str] | None = None,
    val: ShardsLike = (),
    selection: Selection | str | os.PathLike[str] | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
    team: Team | None = None,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train a student into the run directory `out`, or go on with the training that was interrupted there.

    Shards are given listed or as on the command line. `store` holds the soft labels of `unlabeled` (and of `labeled`,
    if they were annotated into it, too); of those of `unlabeled` only what `selection` holds counts, and with a
    `calibration` the teacher's logits are mapped first. Class names come from `classes`, the store, or the classes.txt
    beside the labeled shards; without any, `num_classes` or the largest label says how many there are. `workers` load
    batches in processes of their own; `threads` of the CPU train (None leaves torch's setting). Neither changes what is
    learned, but for the last bits that another number of threads may change. Each process of a `team` (see `joined`)
    calls this with the same arguments but its own device, and gets the same result. `trackers` are told of the metrics
    in the first of these processes, and change no result.

    Raises:
        StoreMismatch: shards differ from what was annotated, the label spaces differ, or the selection or calibration
            is of another store.
        LabelError: a label is missing or out of range.
        OutputExists: `out` holds a run with other settings or data.
        LaunchError: the processes of a team have different inputs, or are too many for the batch.
        TrackerError: a tracker can't begin.
        Diverged: the loss is no longer finite.
    """
    started = time.monotonic()
    team = team or Team()
    _check_shares(settings, team)
    store = open_store(store) if isinstance(store, (str, os.PathLike)) else store
    val = as_shards(val)
    selection = open_selection(selection) if isinstance(selection, (str, os.PathLike)) else selection
    calibration = read_calibration(calibration) if isinstance(calibration, (str, os.PathLike)) else calibration
    data, names = gather(as_shards(labeled), as_shards(unlabeled), store, classes, num_classes, selection, calibration)
    card = ModelCard(settings.student, names, preprocessing_of(settings))
    check_names(val, names)
    validation = Validation(val, card.preprocessing, len(names), device, team) if val else None
    if store is not None and settings.loss != "hard":
        encoding = parse_encoding(store.identity.encoding)
        encoding.check_temperature(settings.temperature * (calibration.temperature if calibration is not None else 1.0))
    if store is not None and settings.alpha == 0 and settings.labeled_fraction == 0:
        raise LabelError("alpha 0 leaves out the soft labels and labeled fraction 0 the labels: nothing to learn from")
    steps = _number_of_steps(settings, data)
    identity = _identity(settings, data, validation, names)
    team.check_same(identity)
    with storage.mirrored(storage.location(out)) as mirror:
        run = RunDirectory(mirror, "train", identity)
        tracking = Tracking(trackers if team.world.first else (), run, settings.model_dump(mode="json"))
        with _threads(threads, device), _claimed(run, team), tracking:
            loop = TrainingLoop(
                settings, card, data, validation, run, steps, torch.device(device), workers, team, tracking
            )
            if (finished := team.from_first(run.start(overwrite=overwrite) if team.world.first else None)) is not None:
                return TrainResult(**{**finished["result"], "run": storage.shown(os.fspath(out))})
            if team.world.first:
                run.write_settings(settings.model_dump(mode="json", exclude_none=True))
            best_step, accuracy, earlier = loop.run_to_the_end(on_progress)
            parameters = sum(parameter.numel() for parameter in loop.body.parameters())
            seconds = round(earlier + time.monotonic() - started, 3)
            result = TrainResult(storage.shown(os.fspath(out)), steps, seconds, accuracy, best_step, parameters)
            if team.world.first:
                save_model(run.path, card, loop.best_body())
                run.finish({"result": dataclasses.asdict(result), "metrics": {"val_accuracy": accuracy}})
            tracking.finish(dataclasses.asdict(result))
        return result


@contextlib.contextmanager
def _claimed(run: RunDirectory, team: Team) -> Iterator[None]:
    """The run directory held by process 0, the only one that reads and writes in it."""
    if not team.world.first:
        yield
        return
    run.check_place()
    with storage.held(run.path):
        yield


def _check_shares(settings: TrainSettings, team: Team) -> None:
    """Two rows each, as many as one process needs: batch norms of a single row would fail."""
    if settings.batch_size < 2 * team.world.size:
        raise LaunchError(
            f"--batch-size {settings.batch_size} is for all {team.world.size} processes together, and each needs 2 "
            f"rows; make it {2 * team.world.size} or more, or start fewer processes"
        )


def preprocessing_of(settings: TrainSettings) -> Preprocessing:
    """The student's clean view. Trained on random areas, it looks at the centre of a slightly larger image."""
    made = square(settings.input_size, settings.channels)
    return (
        dataclasses.replace(made, resize=round(settings.input_size / 0.875))
        if settings.augment.crop == "resized"
        else made
    )


def _number_of_steps(settings: TrainSettings, data: TrainingData) -> int:
    if settings.epochs is None:
        return settings.steps if settings.steps is not None else 1000
    batches = TrainingBatches(
        data,
        preprocessing_of(settings),
        settings.augment,
        batch_size=settings.batch_size,
        labeled_fraction=settings.labeled_fraction,
        seed=0,
        steps=0,
    )
    rows = sum(one.rows for one in (data.unlabeled if batches.num_pseudo else data.labeled))
    return max(1, round(settings.epochs * rows / (batches.num_pseudo or batches.num_labeled)))


def _identity(
    settings: TrainSettings, data: TrainingData, validation: Validation | None, names: tuple[str, ...]
) -> dict[str, Any]:
    def contents(shards: Sequence[TrainingShard]) -> str:
        lines = [f"{one.shard.name} {one.sha256} {one.part is not None}" for one in shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    return {
        "settings": settings.model_dump(mode="json"),
        "classes": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        "labeled": contents(data.labeled),
        "unlabeled": contents(data.unlabeled),
        "val": validation.sha256 if validation is not None else None,
        "store": data.store.fingerprint if data.store is not None else None,
        "selection": data.selection.fingerprint if data.selection is not None else None,
        "calibration": data.calibration.fingerprint if data.calibration is not None else None,
    }


@contextlib.contextmanager
def _threads(count: int | None, device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None and torch.device(device).type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
