"""Inside a worker: shards in, parts out.

`annotate_shard` is a pure function of (shard bytes, teacher, settings). `AnnotateWork` does the same for a stream of
shards, with all stages overlapped where that helps:

    on a GPU   processes decode ahead, into the next shards, too; copies and encoding go beside the forward pass
               (forward.py); a batch is collected while the next one runs
    on a CPU   a core has one worker, which decodes and labels in turns: threads that share a core only get in each
               other's way

and a thread that hashes each shard, and one that builds and writes parts.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from pseudolabel.decode_processes import decode_in_processes, decoding_processes
from pseudolabel.decoding import (
    Decoding,
    Prepare,
    ShardEnd,
    ahead,
    decode_samples,
    decode_shard,
    decode_shards,
)
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import LoadedTeacher, Teacher
from pseudolabel.labeling.forward import Forward, member_fields
from pseudolabel.labeling.line import Entry, Line, Progress, started
from pseudolabel.labels import store
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import AnnotatedShard, PartBuilder
from pseudolabel.labels.store import StoreIdentity
from pseudolabel.precision import resolve_precision
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile, fetched_ahead
from pseudolabel.stages import Stages
from pseudolabel.views.augment import ViewPlan, preprocessings
from pseudolabel.views.image import PrepareFor
from pseudolabel.views.photometric import parse_policy

_CPU_PIXELS = 32 * 224 * 224  # of a batch: more is slower (caches), fewer than 256 small images cost bookkeeping


def settle(settings: AnnotateSettings, device: str, teacher: LoadedTeacher) -> AnnotateSettings:
    """The settings with nothing left to the device: precision, and the batch size by kind of device and size of the
    teacher's input.
    """
    batch_size = settings.batch_size
    if not isinstance(batch_size, int):
        batch_size = 256
        if torch.device(device).type == "cpu":
            pixels = sum(one.shape[-1] * one.shape[-2] for one in teacher.prepare(torch.zeros(3, 64, 64).byte()))
            batch_size = min(max(_CPU_PIXELS // pixels, 32), 256)
    precision = resolve_precision(settings.precision, device) if _runs_torch(teacher) else "fp32"
    return settings.model_copy(update={"batch_size": batch_size, "precision": precision})


def identify(teacher: LoadedTeacher, settings: AnnotateSettings) -> StoreIdentity:
    """What a store made by this teacher with these settings, which leave nothing to the device, is. Raises `SpecError`
    if they don't fit it.
    """
    assert settings.precision != "auto", "settle first"
    encoding = parse_encoding(settings.encoding)
    encoding.check(len(teacher.classes))
    parse_policy(settings.view_policy)
    if settings.views > 1 or settings.fast_jpeg:
        preprocessings(teacher.identity)
    made_by = dict(teacher.identity)
    if settings.keep_members:
        member_fields(teacher, encoding)
        made_by["members_kept"] = True
    if settings.compile:
        if not _runs_torch(teacher):
            raise SpecError("--compile: an ONNX teacher runs as it was exported; leave it out")
        made_by["compiled"] = True
    return StoreIdentity(
        made_by, teacher.classes, encoding.name, _view_plan(teacher, settings).to_json(), settings.precision
    )


def _runs_torch(teacher: LoadedTeacher) -> bool:
    """Whether autocast and torch.compile mean anything to it."""
    return bool(getattr(teacher, "runs_torch", True))


def annotate_shard(
    shard: Shard, teacher: LoadedTeacher, settings: AnnotateSettings, *, device: str = "cpu"
) -> AnnotatedShard:
    """Label every sample of one shard; rows + rejects = samples. Raises `DamagedShard`."""
    settings = settle(settings, device, teacher)
    builder = _builder(shard, teacher, settings, identify(teacher, settings).fingerprint)
    forward = Forward(teacher, settings, device)
    for batch in decode_shard(shard, _decoding(teacher, settings)):
        if isinstance(batch, ShardEnd):
            return builder.finish(batch)
        builder.add(batch, forward.finish(started(forward, batch)) if batch.inputs else None)
    raise AssertionError("a shard's batches end with a ShardEnd")


def annotate_samples(
    opened: ShardFile, positions: Sequence[int], teacher: LoadedTeacher, settings: AnnotateSettings, forward: Forward
) -> AnnotatedShard:
    """Label some samples of an opened shard, in ascending order, as `annotate_shard` labels all; its facts are of no
    use. `settings` leave nothing to the device, and `forward` was made with them.
    """
    builder = _builder(opened.shard, teacher, settings, "")
    decoding = _decoding(teacher, settings)
    for start in range(0, len(positions), decoding.samples):
        batch = decode_samples(opened, positions[start : start + decoding.samples], decoding)
        builder.add(batch, forward.finish(started(forward, batch)) if batch.inputs else None)
    return builder.finish(ShardEnd(opened.size, "", len(positions)))


@dataclass(frozen=True)
class AnnotateWork:
    """What an engine runs in each worker: shards in, progress out, parts committed on the way. Pickles.

    `settings` leave nothing to the device; `devices` of this machine share its cores for decoding.
    """

    teacher: Teacher
    settings: AnnotateSettings
    root: str
    fingerprint: str
    devices: int = 1

    def __call__(self, shards: Iterator[Shard], device: str) -> Iterator[Progress]:
        teacher = self.teacher.load(torch.device(device))
        if identify(teacher, self.settings).fingerprint != self.fingerprint:
            raise SpecError(
                f"{self.teacher.uri}: gave other weights or preprocessing when it was loaded again, or this worker has "
                "other versions of the libraries that make augmented views\n"
                "seed it or load its weights from a file that stays as it is, and annotate into a new --out"
            )
        line = Line(
            Forward(teacher, self.settings, device),
            partial(_builder, teacher=teacher, settings=self.settings, fingerprint=self.fingerprint),
            store.open_store(self.root),
            device,
        )
        with closing(_entries(shards, teacher, self.settings, device, self.devices, line.stages)) as entries:
            yield from line.run(entries)


def _entries(
    shards: Iterator[Shard],
    teacher: LoadedTeacher,
    settings: AnnotateSettings,
    device: str,
    devices: int,
    stages: Stages,
) -> Generator[tuple[Shard, Entry], None, None]:
    """What the shards hold, decoded where it doesn't keep the device waiting."""
    decoding = _decoding(teacher, settings)
    fetched = fetched_ahead(shards, partial(stages.during, "fetch"))
    if device == "cpu":
        yield from decode_shards(fetched, decoding)
    elif isinstance(decoding.prepare, PrepareFor):
        yield from decode_in_processes(fetched, decoding, decoding_processes(devices), pin=device.startswith("cuda"))
    else:
        yield from ahead(decode_shards(fetched_ahead(shards), decoding))  # in a thread: it has no clock


def _decoding(teacher: LoadedTeacher, settings: AnnotateSettings) -> Decoding:
    """How the teacher wants its samples; it pickles if the teacher's identity says how."""
    plan, augment = _view_plan(teacher, settings), None
    if settings.views > 1:
        augment = partial(plan.augmented, preprocessings=preprocessings(teacher.identity))
    try:
        prepare: Prepare = PrepareFor(preprocessings(teacher.identity))
    except SpecError:  # a teacher of one's own, which prepares images as it likes
        prepare = teacher.prepare
    return Decoding(settings.samples_per_batch, prepare, augment, plan.shrink_to)


def _builder(shard: Shard, teacher: LoadedTeacher, settings: AnnotateSettings, fingerprint: str) -> PartBuilder:
    encoding = parse_encoding(settings.encoding)
    extra = member_fields(teacher, encoding) if settings.keep_members else ()
    return PartBuilder(shard.name, encoding, len(teacher.classes), fingerprint, settings.views, extra)


def _view_plan(teacher: LoadedTeacher, settings: AnnotateSettings) -> ViewPlan:
    shrink_to = max(one.resize for one in preprocessings(teacher.identity)) if settings.fast_jpeg else 0
    how = (settings.view_seed, settings.view_policy, settings.crop_scale, settings.tta)
    return ViewPlan(settings.views, *how, shrink_to)
