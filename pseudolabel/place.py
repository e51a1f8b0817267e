"""Where a recipe runs, how fast, and who is told: nothing here changes a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pseudolabel.engines import default_engine
from pseudolabel.interfaces import Engine, Tracker
from pseudolabel.labeling.line import Progress
from pseudolabel.shard_lists import Shard
from pseudolabel.training.image_cache import CacheMode
from pseudolabel.training.loop import TrainProgress


class Watcher(Protocol):
    """Is told what goes on."""

    def stage(self, title: str, shards: list[Shard] | None = None) -> None: ...
    def annotating(self, progress: Progress) -> None: ...
    def training(self, progress: TrainProgress) -> None: ...


class Quiet:
    """A watcher that tells nobody."""

    def stage(self, title: str, shards: list[Shard] | None = None) -> None:
        pass

    def annotating(self, progress: Progress) -> None:
        pass

    def training(self, progress: TrainProgress) -> None:
        pass


@dataclass(frozen=True)
class Place:
    """Where, how fast and seen by whom: nothing here changes a result."""

    engine: Engine = field(default_factory=default_engine)
    device: str = "cpu"
    workers: int = 0
    threads: int | None = None
    trackers: tuple[Tracker, ...] = ()
    cache: CacheMode = "auto"
    profile: bool = False
