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
from typing import get_args

import torch

from pseudolabel import storage
from pseudolabel.calibration import Calibration
from pseudolabel.checkpoint import save_model
from pseudolabel.devices import resolve_device
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Tracker
from pseudolabel.labels.store import Store
from pseudolabel.precision import slow_here
from pseudolabel.rundir import RunDirectory
from pseudolabel.selection import Selection
from pseudolabel.settings import TrainSettings
from pseudolabel.shard_lists import ShardsLike
from pseudolabel.training.distributed import Team
from pseudolabel.training.image_cache import CacheMode
from pseudolabel.training.loop import LOG_EVERY, TrainingLoop, TrainProgress
from pseudolabel.training.setup import set_up
from pseudolabel.training.starting import check_not_replaced
from pseudolabel.training.tracking import Tracking


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
    steps metrics are logged, nor `trackers`, which are told of the metrics. Each process of a `team` (see `joined`)
    calls this with the same arguments but its own device, and gets the same result.

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
    team, device = team or Team(), resolve_device(device)
    _check_arguments(settings, workers, threads, log_every, cache, trackers)
    if init_from is not None:
        check_not_replaced(init_from, out, overwrite=overwrite)
    training = set_up(
        settings,
        labeled=labeled,
        unlabeled=unlabeled,
        store=store,
        val=val,
        selection=selection,
        calibration=calibration,
        classes=classes,
        num_classes=num_classes,
        init_from=init_from,
        device=device,
        team=team,
    )
    settings, first = training.settings, team.world.first
    team.check_same(identity := training.identity())
    with storage.mirrored(storage.location(out)) as mirror:
        run = RunDirectory(mirror, "train", identity)
        tracking = Tracking(trackers if first else (), run, settings.model_dump(mode="json"))
        with _threads(threads, device), _own_random_numbers(device):
            loop = TrainingLoop(
                training,
                run,
                torch.device(device),
                workers,
                team,
                cache=cache,
                profile=profile,
                on_note=on_note,
                tracking=tracking,
                log_every=log_every,
            )
            with _claimed(run, team), tracking:
                if (finished := team.from_first(run.start(overwrite=overwrite) if first else None)) is not None:
                    known = {**finished["result"], "run": storage.shown(os.fspath(out))}
                    return TrainResult(**{**known, "notes": tuple(known.get("notes", ()))})
                if first:
                    run.write_settings(settings.model_dump(mode="json", exclude_none=True))
                    _tell_notes(loop.learner.notes, slow_here(settings.precision, device), on_note)
                best_step, accuracy, earlier = loop.run_to_the_end(on_progress)
                result = TrainResult(
                    run=storage.shown(os.fspath(out)),
                    steps=training.steps,
                    seconds=round(earlier + time.monotonic() - started, 3),
                    val_accuracy=accuracy,
                    best_step=best_step,
                    parameters=sum(parameter.numel() for parameter in loop.learner.body.parameters()),
                    notes=loop.learner.notes,
                    profile=loop.times.take() if profile else None,
                )
                told = {**dataclasses.asdict(result), "notes": list(result.notes)}
                if first:
                    save_model(run.path, training.card, loop.best_body())
                    run.finish({"result": told, "metrics": {"val_accuracy": accuracy}})
                tracking.finish(told)
        return result


def _check_arguments(
    settings: object, workers: int, threads: int | None, log_every: int, cache: str, trackers: Sequence[Tracker]
) -> None:
    """Raise `SpecError` for what the command line wouldn't let pass."""
    if not isinstance(settings, TrainSettings):
        raise SpecError(f"settings: pass TrainSettings(student=…), not {type(settings).__name__}")
    for name, value, least in (("workers", workers, 0), ("threads", threads, 1), ("log_every", log_every, 1)):
        if value is not None and value < least:
            raise SpecError(f"{name}: {value} is less than {least}")
    if cache not in get_args(CacheMode):
        raise SpecError(f"cache: {cache!r} is none of {', '.join(get_args(CacheMode))}")
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if isinstance(tracker, str):
            raise SpecError(f"trackers: {tracker!r} is a name; pass [parse_tracker({tracker!r})]")


def _tell_notes(notes: Sequence[str], slow: str | None, on_note: Callable[[str], None] | None) -> None:
    if on_note is not None and slow:
        on_note(slow)
    for note in notes:
        on_note(note) if on_note is not None else warnings.warn(note, stacklevel=3)


@contextlib.contextmanager
def _claimed(run: RunDirectory, team: Team) -> Iterator[None]:
    """The run directory held by process 0, the only one that reads and writes in it."""
    if not team.world.first:
        yield
        return
    run.check_place()
    with storage.held(run.path):
        yield


def _own_random_numbers(device: str) -> contextlib.AbstractContextManager[None]:
    """What training draws leaves the caller's generators where they were."""
    found = torch.device(device)
    on_gpu = [found if found.index is not None else torch.cuda.current_device()] if found.type == "cuda" else []
    return torch.random.fork_rng(devices=on_gpu)


@contextlib.contextmanager
def _threads(count: int | None, device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None and torch.device(device).type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
