"""Running annotate's own pipeline on a sample: once for what the labels look like, once for how fast it goes.

`cut` takes a contiguous run out of every shard picked, and `label` annotates the runs into a temporary store. Runs are
in pieces that double in size, and first pieces go first: a slow teacher that is stopped when its time is up has seen
every shard. `clock` annotates runs of the same shards over and over, with the settings that were asked for and
through the same engine with as many workers as annotate would have, and stops when it has seen enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pseudolabel.interfaces import Engine, Teacher
from pseudolabel.labeling.work import AnnotateWork
from pseudolabel.labels import store
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import Store, StoreIdentity
from pseudolabel.plan.census import Pick
from pseudolabel.plan.stopwatch import Load, Stopwatch, TimedWork
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile, write_shard

_FIRST_PIECE = 8  # samples
_MOST_LOADS = 1024


@dataclass(frozen=True)
class Piece:
    """Some samples of a shard, written as a shard of their own; `start` is the position of the first."""

    shard: Shard
    start: int


@dataclass(frozen=True)
class Labeled:
    """What the teacher made of a run of one shard: rows, rejects, and mean KL(full ‖ stored) by temperature."""

    pick: Pick
    samples: int
    rows: pa.Table
    rejects: pa.Table
    info: PartInfo
    lost: dict[str, float]

    @property
    def weight(self) -> float:
        """How many of the corpus's samples it stands for."""
        return self.pick.stands_for * self.pick.samples


@dataclass(frozen=True)
class Labels:
    """The probe's labels, shard by shard; `rate` (samples a second) and `workers` are rough, as not all of them may
    have had work. `whole` unless time cut it short.
    """

    labeled: tuple[Labeled, ...]
    rate: float
    workers: int
    whole: bool


@dataclass(frozen=True)
class Probe:
    """Whom to ask, where, and what about: all that both runs share. An engine starts no more workers than `items`."""

    teacher: Teacher
    engine: Engine
    picks: tuple[Pick, ...]
    items: int
    scratch: Path
    seed: int

    def cut(self, samples: int) -> list[list[Piece]]:
        """A run of each shard, `samples` in all, in pieces."""
        each = math.ceil(samples / len(self.picks))
        return [self._cut(pick, doubling(min(each, pick.samples)), "piece") for pick in self.picks]

    def label(
        self, runs: Sequence[Sequence[Piece]], settings: AnnotateSettings, identity: StoreIdentity, seconds: float
    ) -> Labels:
        """Annotate the runs. Stops after `seconds` with what is done by then, but not before every shard was seen."""
        turns = range(max(map(len, runs)))
        loads = [Load((run[turn].shard,)) for turn in turns for run in runs if turn < len(run)]
        target = store.create(self.scratch / f"labels-{identity.encoding}", identity)
        watch, whole = Stopwatch(), True
        with closing(self.engine.map(self._work(settings, target), loads)) as reports:
            for report in reports:
                watch(report)
                if watch.since_first_label > seconds and len(target.part_names()) >= len(runs):
                    whole = False
                    break
        done = set(target.part_names())
        finished = [[piece for piece in run if f"{piece.shard.name}-0" in done] for run in runs]
        pairs = zip(self.picks, finished, strict=True)
        labeled = tuple(_gathered(pick, target, run) for pick, run in pairs if run)
        return Labels(labeled, watch.rate, watch.workers, whole)

    def clock(
        self, lead: Piece, settings: AnnotateSettings, identity: StoreIdentity, guess: Labels, seconds: float
    ) -> Stopwatch:
        """Annotate for `seconds` with all workers busy and warm. By the rate guessed, a shard's turn comes twice."""
        batches = math.ceil(max(guess.rate * seconds / (2 * len(self.picks)), 1) / settings.samples_per_batch)
        rows = batches * settings.samples_per_batch
        shards = [
            pick.shard if pick.samples <= 1.5 * rows else self._cut(pick, [rows], "run")[0].shard for pick in self.picks
        ]
        laps = 2 + int(4 * guess.rate * seconds / sum(min(pick.samples, rows) for pick in self.picks))
        turned = [shards[number:] + shards[:number] for number in range(len(shards))]
        count = min(self.items, _MOST_LOADS)
        loads = [Load(tuple(turned[number % len(turned)]), laps, f"-{number}", lead.shard) for number in range(count)]
        work, watch = self._work(settings, store.create(self.scratch / "timed", identity)), Stopwatch()
        with closing(self.engine.map(work, loads)) as reports:
            for report in reports:
                watch(report)
                if watch.enough(seconds, min(guess.workers, count)):
                    break
        return watch

    def _work(self, settings: AnnotateSettings, target: Store) -> TimedWork:
        return TimedWork(
            AnnotateWork(self.teacher, settings, str(target.root), target.fingerprint, len(self.engine.devices()))
        )

    def _cut(self, pick: Pick, lengths: Sequence[int], kind: str) -> list[Piece]:
        """Shards of so many samples each, side by side, from a position that the seed decides."""
        position = random.Random(f"{self.seed} {pick.shard.name}").randrange(pick.samples - sum(lengths) + 1)
        directory = self.scratch / f"{kind}s"
        pieces = []
        with ShardFile(pick.shard) as opened:
            for number, length in enumerate(lengths):
                shard = Shard(f"{pick.shard.name}-{number}", str(directory / f"{pick.shard.name}-{number}.tar"))
                samples = (opened[index] for index in range(position, position + length))
                write_shard(
                    Path(shard.path),
                    (
                        (one.key, {name: data for name, data in one.fields.items() if not name.startswith("_")})
                        for one in samples
                    ),
                )
                pieces.append(Piece(shard, position))
                position += length
        return pieces


def doubling(total: int) -> list[int]:
    """Lengths that double from 8 on and sum up to `total`; the last takes what is left."""
    lengths: list[int] = []
    while total:
        step = _FIRST_PIECE << len(lengths)
        lengths.append(step if total >= 3 * step else total)
        total -= lengths[-1]
    return lengths


def _gathered(pick: Pick, target: Store, run: Sequence[Piece]) -> Labeled:
    """A run's pieces put together as if they were one shard's part."""
    names = [f"{piece.shard.name}-0" for piece in run]
    infos = [target.info(name) for name in names]
    tables = [_moved(target.read(name), piece.start) for name, piece in zip(names, run, strict=True)]
    rejects = [_moved(target.read_rejects(name), piece.start) for name, piece in zip(names, run, strict=True)]
    rows = max(sum(map(len, tables)), 1)
    weighted = [(info.fidelity["mean"], len(table)) for info, table in zip(infos, tables, strict=True)]
    lost = {at: sum(mean[at] * count for mean, count in weighted) / rows for at in infos[0].fidelity["mean"]}
    samples = sum(info.samples for info in infos)
    return Labeled(pick, samples, pa.concat_tables(tables), pa.concat_tables(rejects), infos[-1], lost)


def _moved(table: pa.Table, start: int) -> pa.Table:
    """With positions in the shard that the piece was cut from, and without what the file said of itself."""
    column = table.schema.get_field_index("index")
    moved = pc.add(table["index"], pa.scalar(start, pa.int32()))
    return table.set_column(column, table.schema.field(column), moved).replace_schema_metadata(None)
