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
from typing import Any

import torch
from torch import Tensor

from pseudolabel.decoding import ShardEnd, ahead, decode_shard, decode_shards
from pseudolabel.errors import DamagedShard, OutOfMemory, SpecError
from pseudolabel.interfaces import LoadedTeacher, Teacher
from pseudolabel.labels import store
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import AnnotatedShard, PartBuilder
from pseudolabel.labels.store import StoreIdentity
from pseudolabel.precision import autocast
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shards import Shard


@dataclass(frozen=True)
class Progress:
    """What a worker tells: a batch was labeled, a shard is finished or damaged."""

    shard: str
    samples: int = 0
    finished: dict[str, Any] | None = None
    damage: DamagedShard | None = None


def identify(teacher: LoadedTeacher, settings: AnnotateSettings) -> StoreIdentity:
    """What a store made by this teacher with these settings is. Raises `SpecError` if the encoding doesn't fit it."""
    encoding = parse_encoding(settings.encoding)
    encoding.check(len(teacher.classes))
    return StoreIdentity(teacher.identity, teacher.classes, encoding.name, {"count": 1}, settings.precision)


def annotate_shard(
    shard: Shard, teacher: LoadedTeacher, settings: AnnotateSettings, *, device: str = "cpu"
) -> AnnotatedShard:
    """Label every sample of one shard; rows + rejects = samples. Raises `DamagedShard`."""
    builder = _builder(shard, teacher, settings, identify(teacher, settings).fingerprint)
    for batch in decode_shard(shard, teacher.prepare, settings.batch_size):
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
                f"{self.teacher.uri}: gave other weights or preprocessing when it was loaded again\n"
                "seed it or load its weights from a file that stays as it is, and annotate into a new --out"
            )
        threads = 1 if device == "cpu" else min(16, os.cpu_count() or 1)
        builder: PartBuilder | None = None
        waited = worked = 0.0
        writing: tuple[Progress, Future[None]] | None = None
        with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(1) as writer:
            mapper = map if threads == 1 else decoders.map
            with closing(ahead(decode_shards(shards, teacher.prepare, self.settings.batch_size, mapper))) as stream:
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
    return PartBuilder(shard.name, parse_encoding(settings.encoding), len(teacher.classes), fingerprint)


def _forward(teacher: LoadedTeacher, inputs: tuple[Tensor, ...], settings: AnnotateSettings, device: str) -> Tensor:
    """Float32 logits (B, C); none of a batch in which nothing could be decoded."""
    if not inputs:
        return torch.zeros(0, len(teacher.classes))
    try:
        with torch.inference_mode(), autocast(settings.precision, device):
            return teacher.logits(inputs)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{device}: a batch of {settings.batch_size} doesn't fit; use a smaller --batch-size (finished shards stay)"
        ) from error
