"""Leaks: images among the unlabeled ones that an evaluation shows, too, exactly or nearly.

    found = find_leaks("corpus/unlabeled", ["corpus/val", "corpus/test"], "leaks.parquet")
    read_leaks("leaks.parquet").excluded            # shard → positions that training should leave out

A student that was trained on the images it is evaluated on is flattered, even without their labels. Looks at the
evaluation's images are kept in memory (1.2 kB each), the unlabeled shards go past them one by one, in as many
processes as there are workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pseudolabel import storage
from pseudolabel.duplicates.ledger import Leak, Leaks, read_leaks, write_leaks
from pseudolabel.duplicates.look import CROP, hash_version
from pseudolabel.duplicates.search import Others
from pseudolabel.duplicates.second_look import SIMILARITY
from pseudolabel.duplicates.work import LookWork, SearchWork, Seen
from pseudolabel.engines import default_engine
from pseudolabel.errors import DamagedShard, ShardListError, SpecError
from pseudolabel.interfaces import Engine
from pseudolabel.labeling.line import Progress
from pseudolabel.outputs import check_output
from pseudolabel.shard_lists import Shard, ShardsLike, as_shards

__all__ = ["Leak", "Leaks", "LeaksResult", "find_leaks", "read_leaks"]

DISTANCE = 8  # bits of 64; docs/leaks.md says what is found and missed
_FIRST = 5


@dataclass(frozen=True)
class LeaksResult:
    """`samples` of the unlabeled shards were compared with `against` images; `skipped` of either can't be decoded."""

    out: str
    samples: int
    against: int
    leaks: int
    exact: int
    near: int
    skipped: int
    seconds: float
    first: tuple[Leak, ...]


def find_leaks(
    unlabeled: ShardsLike,
    against: ShardsLike,
    out: str | os.PathLike[str],
    *,
    distance: int = DISTANCE,
    engine: Engine | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> LeaksResult:
    """Find the images of `unlabeled` that `against` has, too, and write them to the file `out`. The same shards give
    the same bytes, whatever the engine.

    `distance`: bits of a perceptual hash by which a near duplicate may differ; it is confirmed by its pixels.

    Raises:
        OutputExists: `out` is there, and not to be overwritten.
        DamagedShard: some shards are damaged; nothing is written.
        SpecError: imagehash isn't installed.
    """
    started = time.monotonic()
    if not 0 <= distance <= 64:
        raise SpecError(f"--distance {distance}: is a number of bits, from 0 to 64")
    place = storage.location(out)
    check_output(place, overwrite=overwrite, read=read_leaks, what="leaks")
    version = hash_version()
    shards, held_out = _listed(unlabeled), _listed(against)
    engine = engine or default_engine()
    shown = _seen(engine, LookWork(), held_out, on_progress)
    looks = [(one.ends.name, part) for one in shown for part in one.looks]
    places = [(name, *found) for name, part in looks for found in zip(part.keys, part.index, strict=True)]
    others = Others.of([part for _, part in looks])
    del looks
    found = _seen(engine, SearchWork(others, distance), shards, on_progress)
    leaks = sorted(_leaks(found, places))
    check_output(place, overwrite=overwrite, read=read_leaks, what="leaks")  # another one may have been quicker
    write_leaks(
        place,
        leaks,
        {
            "parameters": {"distance": distance, "similarity": SIMILARITY, "crop": CROP, "hash": "phash"},
            "imagehash": version,
            "shards": {one.ends.name: one.sha256 for one in found},
            "against": {one.ends.name: one.sha256 for one in shown},
        },
    )
    exact = sum(one.kind == "exact" for one in leaks)
    return LeaksResult(
        out=storage.shown(os.fspath(out)),
        samples=sum(one.samples for one in found),
        against=sum(one.samples for one in shown),
        leaks=len(leaks),
        exact=exact,
        near=len(leaks) - exact,
        skipped=sum(one.skipped for one in (*found, *shown)),
        seconds=round(time.monotonic() - started, 3),
        first=tuple(leaks[:_FIRST]),
    )


def _listed(shards: ShardsLike) -> list[Shard]:
    found = as_shards(shards)
    if not found:
        raise ShardListError("no shards given")
    return sorted(found, key=lambda shard: shard.name)


def _seen(
    engine: Engine, work: LookWork | SearchWork, shards: Sequence[Shard], tell: Callable[[Progress], None] | None
) -> list[Seen]:
    """All shards, sorted by name. Raises `DamagedShard` when all were tried."""
    found: list[Seen] = []
    with closing(engine.map(work, shards)) as results:
        for one in results:
            found.append(one)
            if tell is not None:
                finished: dict[str, Any] | None = {"seconds": {}} if one.damage is None else None
                tell(Progress(one.ends.name, one.samples, finished, one.damage, ends=one.ends))
    damage = sorted(str(one.damage) for one in found if one.damage is not None)
    if damage:
        others = f"\n{len(damage) - 1} more of {len(shards)} shards are damaged" if len(damage) > 1 else ""
        raise DamagedShard(f"{damage[0]}{others}\nnothing was written")
    return sorted(found, key=lambda one: one.ends.name)


def _leaks(found: Sequence[Seen], places: Sequence[tuple[str, str, int]]) -> Iterator[Leak]:
    for one in found:
        for index, key, match in one.matches:
            kind = "exact" if match.exact else "near"
            other = places[match.other]
            yield Leak(one.ends.name, index, key, kind, match.distance, match.similarity, *other)
