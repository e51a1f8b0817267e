"""Training a student offline from cached soft labels and the labeled set.

No teacher is loaded: its soft labels are read from the store beside the images. A run directory is complete when its
run.json exists; until then the same command goes on from checkpoint/, on a CPU to the same weights, bit for bit, as
if never interrupted (with the same number of threads and processes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pseudolabel import storage
from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.distributed import Team
from pseudolabel.errors import LabelError
from pseudolabel.image_cache import CacheMode
from pseudolabel.inputs import gather
from pseudolabel.interfaces import Tracker
from pseudolabel.label_space import check_names
from pseudolabel.labels.store import Store, open_store
from pseudolabel.loop import LOG_EVERY, TrainingLoop, TrainProgress
from pseudolabel.losses import check_loss, parse_loss
from pseudolabel.precision import resolve_precision, slow_here
from pseudolabel.rundir import RunDirectory
from pseudolabel.selection import Selection, open_selection
from pseudolabel.settings import TrainSettings
from pseudolabel.shard_lists import ShardsLike, as_shards
from pseudolabel.starting import check_not_replaced, find_start
from pseudolabel.students import parse_student
from pseudolabel.tracking import Tracking
from pseudolabel.training_setup import (
    as_set,
    check_shares,
    identity_of,
    number_of_steps,
    preprocessing_of,
    soft_labels,
)
from pseudolabel.validate import Validation


@dataclass(frozen=True)
class TrainResult:
    """What `train` reports. `val_accuracy` is that of the kept (best) weights; None without a validation set. `notes`
    say what the student started from, if not from random weights. `profile`, if asked for: milliseconds a step by stage
    (`step_times.STEP_STAGES`).
    """

    run: str
    steps: int
    seconds: float
    val_accuracy: float | None
    best_step: int
    parameters: int
    notes: tuple[str, ...] = ()
    profile: Mapping[str, float] | None = None


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
    init_from: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    workers: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[TrainProgress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    team: Team | None = None,
    cache: CacheMode = "auto",
    profile: bool = False,
    log_every: int = LOG_EVERY,
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train a student into the run directory `out`, or go on with the training that was interrupted there.

    Shards are given listed or as on the command line. `store` holds the soft labels of `unlabeled` (and of `labeled`,
    if they were annotated into it, too); of those of `unlabeled` only what `selection` holds counts, and with a
    `calibration` the teacher's logits are mapped first. Class names come from `classes`, the store, or the classes.txt
    beside the labeled shards; without any, `num_classes` or the largest label says how many there are. `workers` load
    batches in processes of their own; `threads` of the CPU train (None leaves torch's setting). Neither changes what is
    learned, but for the last bits that another number of threads may change; nor does `cache`, which keeps decoded
    images in memory (see `image_cache.keep_images`; `on_note` is told what it takes), nor `profile`, nor after how many
    steps metrics are logged. Each process of a
    `team` (see `joined`) calls this with the same arguments but its own device, and gets the same result.
    `trackers` are told of the metrics in the first of these processes, and change no result.

    The student starts from the weights of `init_from` (a finished run, or a .safetensors file), or else of its spec. A
    note says what was taken and what begins random: to `on_note`, or as a warning if nobody listens.

    Raises:
        StoreMismatch: shards differ from what was annotated, the label spaces differ, or the selection or calibration
            is of another store.
        LabelError: a label is missing or out of range.
        OutputExists: `out` holds a run with other settings, data or weights to start from.
        DamagedModel: `init_from` is incomplete or not what was saved.
        SpecError: the student can't be built, or the weights to start from don't fit it, or are to be overwritten.
        LaunchError: the processes of a team have different inputs, or are too many for the batch.
        TrackerError: a tracker can't begin.
        Diverged: the loss is no longer finite.
    """
    started = time.monotonic()
    team = team or Team()
    settings = settings.model_copy(update={"precision": resolve_precision(settings.precision, device)})
    check_shares(settings, team)
    store = open_store(store) if isinstance(store, (str, os.PathLike)) else store
    val = as_shards(val)
    selection = open_selection(selection) if isinstance(selection, (str, os.PathLike)) else selection
    calibration = read_calibration(calibration) if isinstance(calibration, (str, os.PathLike)) else calibration
    data, names = gather(as_shards(labeled), as_shards(unlabeled), store, classes, num_classes, selection, calibration)
    data = as_set(data, settings)
    student = parse_student(settings.student)
    if init_from is not None:
        check_not_replaced(init_from, out, overwrite=overwrite)
    start = find_start(student, len(names), settings.channels, init_from)
    card = ModelCard(settings.student, names, preprocessing_of(settings, start), student.config)
    check_names(val, names)
    validation = Validation(val, card.preprocessing, len(names), device, team) if val else None
    parse_loss(settings.loss)
    if store is not None:
        check_loss(settings.loss, soft_labels(settings, data, store))
    if store is not None and settings.alpha == 0 and settings.labeled_fraction == 0:
        raise LabelError("alpha 0 leaves out the soft labels and labeled fraction 0 the labels: nothing to learn from")
    steps = number_of_steps(settings, data)
    identity = identity_of(settings, data, validation, card, start)
    team.check_same(identity)
    with storage.mirrored(storage.location(out)) as mirror:
        run = RunDirectory(mirror, "train", identity)
        tracking = Tracking(trackers if team.world.first else (), run, settings.model_dump(mode="json"))
        with _threads(threads, device), _claimed(run, team), tracking:
            loop = TrainingLoop(
                settings,
                card,
                data,
                validation,
                run,
                steps,
                torch.device(device),
                workers,
                team,
                start,
                cache=cache,
                profile=profile,
                on_note=on_note,
                tracking=tracking,
                log_every=log_every,
            )
            if (finished := team.from_first(run.start(overwrite=overwrite) if team.world.first else None)) is not None:
                known = {**finished["result"], "run": storage.shown(os.fspath(out))}
                return TrainResult(**{**known, "notes": tuple(known.get("notes", ()))})
            if team.world.first:
                run.write_settings(settings.model_dump(mode="json", exclude_none=True))
                if on_note is not None and (slow := slow_here(settings.precision, device)):
                    on_note(slow)
                for note in loop.learner.notes:
                    on_note(note) if on_note is not None else warnings.warn(note, stacklevel=2)
            best_step, accuracy, earlier = loop.run_to_the_end(on_progress)
            parameters = sum(parameter.numel() for parameter in loop.learner.body.parameters())
            seconds = round(earlier + time.monotonic() - started, 3)
            profiled = loop.times.take() if profile else None
            place = storage.shown(os.fspath(out))
            notes = loop.learner.notes
            result = TrainResult(place, steps, seconds, accuracy, best_step, parameters, notes, profiled)
            told = {**dataclasses.asdict(result), "notes": list(notes)}
            if team.world.first:
                save_model(run.path, card, loop.best_body())
                run.finish({"result": told, "metrics": {"val_accuracy": accuracy}})
            tracking.finish(told)
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


@contextlib.contextmanager
def _threads(count: int | None, device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None and torch.device(device).type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
