"""Annotate's work, with who does it and when: what a rate is taken from.

The rate is taken from when all workers have written a part: imports, a model's first batch and the first part cost
seconds, once. What passed before counts as start-up, less the labels made meanwhile; so start-up + samples ÷ rate is
when a run ends that keeps all workers busy.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from pseudolabel.labeling.line import Progress
from pseudolabel.labeling.work import AnnotateWork
from pseudolabel.shard_lists import Shard

_BATCHES_A_WORKER = 3  # at the least, in a window that is long enough
_LATECOMERS = 1.5


@dataclass(frozen=True)
class Load:
    """What an engine hands to a worker: shards, gone through several times, under new names each time. A short shard
    may lead, twice: work tells that a part is written when the next one is ready.
    """

    shards: tuple[Shard, ...]
    laps: int = 1
    tag: str = ""
    lead: Shard | None = None

    def __iter__(self) -> Iterator[Shard]:
        if self.lead is not None:
            yield from (Shard(f"lead{self.tag}-{lap}", self.lead.path) for lap in range(2))
        yield from (Shard(f"{one.name}{self.tag}-{lap}", one.path) for lap in range(self.laps) for one in self.shards)


@dataclass(frozen=True)
class Report:
    """A worker tells that it is there, then all that annotate's work tells."""

    worker: str
    device: str
    progress: Progress | None = None


@dataclass(frozen=True)
class TimedWork:
    """Annotate's work on loads instead of shards. Pickles."""

    work: AnnotateWork

    def __call__(self, loads: Iterator[Load], device: str) -> Iterator[Report]:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        yield Report(worker, device)
        for progress in self.work(chain.from_iterable(loads), device):
            yield Report(worker, device, progress)


class Stopwatch:
    """Follows reports: who works, on which device, and how fast all of them label together."""

    def __init__(self) -> None:
        self._called = time.monotonic()
        self._device_of: dict[str, str] = {}
        self._warm: set[str] = set()
        self._samples = self._batches = 0
        self._first: float | None = None
        self._start = self._end = (0.0, 0)  # seconds since the call, samples labeled by then

    def __call__(self, report: Report) -> None:
        """Raises the error of a shard that has changed or gone since it was counted."""
        now = time.monotonic() - self._called
        if report.progress is None:
            self._device_of[report.worker] = report.device
            return
        if report.progress.failure is not None:
            raise report.progress.failure
        if report.progress.samples:
            self._first = now if self._first is None else self._first
            self._samples += report.progress.samples
            self._batches += 1
            self._end = (now, self._samples)
        if report.progress.finished is not None and report.worker not in self._warm:
            self._warm.add(report.worker)
            self._start, self._batches = (now, self._samples), 0

    @property
    def workers(self) -> int:
        return len(self._device_of)

    @property
    def devices(self) -> int:
        """Different accelerators; on CPUs, the processes, which have one thread each."""
        return len(
            {
                worker if device == "cpu" else f"{worker.partition(':')[0]}:{device}"
                for worker, device in self._device_of.items()
            }
        )

    @property
    def device(self) -> str:
        """The kind of device, such as cpu or cuda."""
        return "/".join(sorted({device.partition(":")[0] for device in self._device_of.values()}))

    @property
    def since_first_label(self) -> float:
        return 0.0 if self._first is None else self._end[0] - self._first

    def enough(self, seconds: float, workers: int) -> bool:
        """All workers, so many at least, have been at work together for so long, and for some batches each. One that is
        not there yet is waited for half as long as the first one took to label.
        """
        together = len(self._warm) == self.workers >= workers and self._end[0] >= _LATECOMERS * (self._first or 0.0)
        busy = self._batches >= _BATCHES_A_WORKER * self.workers
        return together and busy and self._end[0] - self._start[0] >= seconds

    @property
    def rate(self) -> float:
        """Samples a second in the window; over all, where work ended before there was one."""
        (start, before), (end, after) = self._start, self._end
        return (after - before) / (end - start) if after > before else after / end

    @property
    def startup(self) -> float:
        """Seconds before work went at this rate."""
        return max(self._start[0] - self._start[1] / self.rate, 0.0)
