"""Inside a worker: shards in, parts out.

`annotate_shard` is a pure function of (shard bytes, teacher, settings). `AnnotateWork` does the same for a stream of
shards with three stages overlapped: a thread reads and decodes the next batches (into the next shard, too), the main
thread runs the teacher, another thread writes the finished part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pseudolabel.decoding import Augment, ShardEnd, ahead, decode_shard, decode_shards
from pseudolabel.errors import DamagedShard, OutOfMemory, SpecError
from pseudolabel.interfaces import LoadedTeacher, Teacher
from pseudolabel.labels import store
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import AnnotatedShard, PartBuilder
from pseudolabel.labels.store import StoreIdentity
from pseudolabel.precision import autocast
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shards import Shard
from pseudolabel.views.augment import ViewPlan, preprocessings
from pseudolabel.views.photometric import parse_policy


@dataclass(frozen=True)
class Progress:
    """What a worker tells: a batch was labeled, a shard is finished or damaged."""

    shard: str
    samples: int = 0
    finished: dict[str, Any] | None = None
    damage: DamagedShard | None = None


def identify(teacher: LoadedTeacher, settings: AnnotateSettings) -> StoreIdentity:
    """What a store made by this teacher with these settings is. Raises `SpecError` if encoding or views don't fit
    it.
    """
    encoding = parse_encoding(settings.encoding)
    encoding.check(len(teacher.classes))
    parse_policy(settings.view_policy)
    if settings.views > 1:
        preprocessings(teacher.identity)
    views = _view_plan(settings).to_json()
    return StoreIdentity(teacher.identity, teacher.classes, encoding.name, views, settings.precision)


def annotate_shard(
    shard: Shard, teacher: LoadedTeacher, settings: AnnotateSettings, *, device: str = "cpu"
) -> AnnotatedShard:
    """Label every sample of one shard; rows + rejects = samples. Raises `DamagedShard`."""
    builder = _builder(shard, teacher, settings, identify(teacher, settings).fingerprint)
    samples, augment = settings.samples_per_batch, _augment(teacher, settings)
    for batch in decode_shard(shard, teacher.prepare, samples, augment=augment):
        if isinstance(batch, ShardEnd):
            return builder.finish(batch)
        builder.add(batch, _forward(teacher, batch.inputs, settings, device))
    raise AssertionError("a shard's batches end with a ShardEnd")


@dataclass(frozen=True)
class AnnotateWork:
    """What an engine runs in each worker: shards in, progress out, parts committed on the way. Pickles."""

    teacher: Teacher
    settings: AnnotateSettings
    root: str
    fingerprint: str

    def __call__(self, shards: Iterator[Shard], device: str) -> Iterator[Progress]:
        teacher = self.teacher.load(torch.device(device))
        target = store.open_store(self.root)
        if identify(teacher, self.settings).fingerprint != self.fingerprint:
            raise SpecError(
                f"{self.teacher.uri}: gave other weights or preprocessing when it was loaded again, or this worker has "
                "other versions of the libraries that make augmented views\n"
                "seed it or load its weights from a file that stays as it is, and annotate into a new --out"
            )
        threads = 1 if device == "cpu" else min(16, os.cpu_count() or 1)
        builder: PartBuilder | None = None
        waited = worked = 0.0
        writing: tuple[Progress, Future[None]] | None = None
        with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(1) as writer:
            mapper = map if threads == 1 else decoders.map
            samples, augment = self.settings.samples_per_batch, _augment(teacher, self.settings)
            with closing(ahead(decode_shards(shards, teacher.prepare, samples, mapper, augment))) as stream:
                mark = time.monotonic()
                for shard, batch in stream:
                    arrived = time.monotonic()
                    waited += arrived - mark
                    if isinstance(batch, DamagedShard):
                        builder = None
                        yield Progress(shard.name, damage=batch)
                    elif isinstance(batch, ShardEnd):
                        assert builder is not None
                        annotated, builder = builder.finish(batch), None
                        if writing is not None:
                            writing[1].result()
                            yield writing[0]
                        report = {
                            "decode_wait_seconds": round(waited, 4),
                            "forward_seconds": round(worked, 4),
                            "device": device,
                            "pid": os.getpid(),
                        }
                        finished = {
                            "samples": annotated.info.samples,
                            "rejects": annotated.info.rejects,
                            "bytes": batch.size,
                            **report,
                        }
                        commit = writer.submit(target.commit, annotated.info, annotated.part, annotated.rejects)
                        writing = Progress(shard.name, finished=finished), commit
                        waited = worked = 0.0
                    else:
                        builder = builder or _builder(shard, teacher, self.settings, self.fingerprint)
                        builder.add(batch, _forward(teacher, batch.inputs, self.settings, device))
                        worked += time.monotonic() - arrived
                        yield Progress(shard.name, samples=len(batch.keys) + len(batch.rejects))
                    mark = time.monotonic()
            if writing is not None:
                writing[1].result()
                yield writing[0]


def _builder(shard: Shard, teacher: LoadedTeacher, settings: AnnotateSettings, fingerprint: str) -> PartBuilder:
    return PartBuilder(shard.name, parse_encoding(settings.encoding), len(teacher.classes), fingerprint, settings.views)


def _view_plan(settings: AnnotateSettings) -> ViewPlan:
    return ViewPlan(settings.views, settings.view_seed, settings.view_policy, settings.crop_scale, settings.tta)


def _augment(teacher: LoadedTeacher, settings: AnnotateSettings) -> Augment | None:
    """What makes the views beside the clean one, if there are any."""
    if settings.views == 1:
        return None
    return partial(_view_plan(settings).augmented, preprocessings=preprocessings(teacher.identity))


def _forward(teacher: LoadedTeacher, inputs: tuple[Tensor, ...], settings: AnnotateSettings, device: str) -> Tensor:
    """Float32 logits (B, C); none of a batch in which nothing could be decoded. With `tta`, view 0 becomes the mean of
    the log-probabilities of the image and its mirror image.
    """
    if not inputs:
        return torch.zeros(0, len(teacher.classes))
    try:
        with torch.inference_mode(), autocast(settings.precision, device):
            logits_BC = teacher.logits(inputs)
            if settings.tta == "none":
                return logits_BC
            flipped_SC = teacher.logits(tuple(one[:: settings.views].flip(-1) for one in inputs))
            clean_SC = logits_BC[:: settings.views]
            mean_SC = (torch.log_softmax(clean_SC, dim=-1) + torch.log_softmax(flipped_SC, dim=-1)) / 2
            return logits_BC.index_copy(0, torch.arange(0, len(logits_BC), settings.views).to(mean_SC.device), mean_SC)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{device}: a batch of {settings.batch_size} doesn't fit; use a smaller --batch-size (finished shards stay)"
        ) from error
