"""What workers do: look at the shards of an evaluation, then search the unlabeled ones for what these show. Pickles."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pseudolabel.duplicates.look import Looks, look_at
from pseudolabel.duplicates.search import Match, Others, nearest
from pseudolabel.errors import DamagedShard, StorageError
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile, fetched_ahead

_AT_ONCE = 256  # images


@dataclass(frozen=True)
class Seen:
    """A shard that was looked at: its `looks` if they are wanted, or the `matches` of its samples, given with position
    and key. `damage` is in place of all else.
    """

    ends: Shard
    samples: int = 0
    skipped: int = 0
    sha256: str = ""
    looks: tuple[Looks, ...] = ()
    matches: tuple[tuple[int, str, Match], ...] = ()
    damage: DamagedShard | None = None


@dataclass(frozen=True)
class LookWork:
    """Looks at all images of shards: those of the evaluation."""

    def __call__(self, shards: Iterator[Shard], device: str) -> Iterator[Seen]:
        return _all(shards, None, 0)


@dataclass(frozen=True)
class SearchWork:
    """Searches shards for images that are among the `others`, or alike within `distance` bits."""

    others: Others
    distance: int

    def __call__(self, shards: Iterator[Shard], device: str) -> Iterator[Seen]:
        return _all(shards, self.others, self.distance)


def _all(shards: Iterator[Shard], others: Others | None, distance: int) -> Iterator[Seen]:
    for shard in fetched_ahead(shards):
        try:
            yield _one(shard, others, distance)
        except DamagedShard as error:
            yield Seen(shard, damage=error)
        except StorageError as error:  # gone or unreadable: the others go on
            yield Seen(shard, damage=DamagedShard(str(error)))


def _one(shard: Shard, others: Others | None, distance: int) -> Seen:
    kept: list[Looks] = []
    matches: list[tuple[int, str, Match]] = []
    skipped = 0
    with ShardFile(shard) as opened, ThreadPoolExecutor(1) as hasher:
        sha256 = hasher.submit(opened.sha256)
        for start in range(0, len(opened), _AT_ONCE):
            positions = range(start, min(start + _AT_ONCE, len(opened)))
            looks = look_at(opened, positions, variants=others is None)
            skipped += looks.skipped
            if others is None:
                kept.append(looks)
            else:
                found = nearest(looks, others, distance)
                matches += [(looks.index[one.row], looks.keys[one.row], one) for one in found]
        digest = sha256.result()
        opened.check_unchanged()
        return Seen(shard, len(opened), skipped, digest, tuple(kept), tuple(matches))
