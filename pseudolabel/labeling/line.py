"""A worker's line: what is decoded goes in, progress comes out, parts are written on the way.

entries  →  forward pass set going  →  collected  →  added to the part  →  written in a thread
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pseudolabel.decoding import DecodedBatch, ShardEnd, Unread
from pseudolabel.errors import DamagedShard, StorageError
from pseudolabel.labeling.forward import Forward, UnderWay
from pseudolabel.labels.part import PartBuilder
from pseudolabel.labels.store import Store
from pseudolabel.shard_lists import Shard
from pseudolabel.stages import Stages
from pseudolabel.views.draw import row_seeds

Entry = DecodedBatch | ShardEnd | Unread


@dataclass(frozen=True)
class Progress:
    """What a worker tells: a batch was labeled, a shard is finished or can't be read. `ends` is the shard, if it is;
    `seconds` are then those of each stage since the shard before it.
    """

    shard: str
    samples: int = 0
    finished: dict[str, Any] | None = None
    failure: Unread | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    ends: Shard | None = None


@dataclass(frozen=True)
class Step:
    """Something decoded, on its way through the line."""

    shard: Shard
    entry: Entry
    builder: PartBuilder | None
    under_way: UnderWay | None = None


@dataclass
class Line:
    """A worker's line: what is decoded goes in, progress comes out, parts are written on the way."""

    forward: Forward
    new_builder: Callable[[Shard], PartBuilder]
    store: Store
    device: str
    stages: Stages = field(default_factory=Stages)
    _builder: PartBuilder | None = None
    _writing: Future[Progress] | None = None

    def run(self, entries: Iterator[tuple[Shard, Entry]]) -> Iterator[Progress]:
        """All entries. On a GPU a step is settled when the next one is under way."""
        in_flight = 0 if self.device == "cpu" else 1
        steps: deque[Step] = deque()
        with ThreadPoolExecutor(1) as writer:
            while True:
                with self.stages.during("decode"):
                    following = next(entries, None)
                if following is None:
                    break
                steps.append(self._start(*following))
                if len(steps) > in_flight:
                    yield from self._settle(steps.popleft(), writer)
            while steps:
                yield from self._settle(steps.popleft(), writer)
            yield from self._written()

    def _start(self, shard: Shard, entry: Entry) -> Step:
        if not isinstance(entry, DecodedBatch):
            builder, self._builder = self._builder, None
            return Step(shard, entry, builder)
        self._builder = self._builder or self.new_builder(shard)
        with self.stages.during("forward"):
            return Step(shard, entry, self._builder, started(self.forward, entry) if entry.inputs else None)

    def _settle(self, step: Step, writer: ThreadPoolExecutor) -> Iterator[Progress]:
        if isinstance(step.entry, (DamagedShard, StorageError)):
            yield from self._written()
            seconds = self.stages.take()
            if isinstance(step.entry, StorageError):  # whoever opened it has only waited for it
                seconds |= {"fetch": seconds["fetch"] + seconds["decode"], "decode": 0.0}
            yield Progress(step.shard.name, failure=step.entry, ends=step.shard, seconds=seconds)
            return
        assert step.builder is not None
        if isinstance(step.entry, ShardEnd):
            yield from self._written()
            self._writing = writer.submit(self._write, step, step.builder, self.stages.take())
            return
        with self.stages.during("forward"):
            columns = self.forward.finish(step.under_way) if step.under_way is not None else None
        step.builder.add(step.entry, columns)
        yield Progress(step.shard.name, samples=len(step.entry.keys) + len(step.entry.rejects))

    def _write(self, step: Step, builder: PartBuilder, seconds: dict[str, float]) -> Progress:
        assert isinstance(step.entry, ShardEnd)
        annotated = builder.finish(step.entry)
        self.store.commit(annotated.info, annotated.part, annotated.rejects)
        counts = {"samples": annotated.info.samples, "rejects": annotated.info.rejects, "bytes": annotated.info.size}
        place = {"device": self.device, "pid": os.getpid()}
        finished = {**counts, "seconds": seconds, **place}
        return Progress(step.shard.name, finished=finished, ends=step.shard, seconds=seconds)

    def _written(self) -> Iterator[Progress]:
        """Wait for the part that is being written, if one is."""
        if self._writing is not None:
            with self.stages.during("write"):
                progress = self._writing.result()
            self._writing = None
            yield progress


def started(forward: Forward, batch: DecodedBatch) -> UnderWay:
    """A batch's forward pass, set going; what an encoding draws follows from key and view."""
    rows = [(key, view.number) for key, views in zip(batch.keys, batch.views, strict=True) for view in views]
    return forward.start(batch.inputs, row_seeds([key for key, _ in rows], [view for _, view in rows]))
