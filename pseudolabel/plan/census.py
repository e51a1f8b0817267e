"""How many samples lie in how many shards, without reading them all.

A corpus of up to a gigabyte is indexed whole: the count is exact. A larger one is sampled: k points are laid on the
line of all its bytes, one at random in each of k equal stretches, and the shards they fall into are indexed. So a
shard's chance is proportional to its size, every stretch of the listing is seen, and

    samples ≈ bytes · mean(samples ÷ bytes of the k shards drawn)     (Hansen–Hurwitz)

is unbiased; the spread of the k densities gives its standard error, somewhat too large where stretches differ. A
damaged shard counts as one without samples. Seeded: the same shards give the same census.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pseudolabel import storage
from pseudolabel.errors import DamagedShard, StorageError
from pseudolabel.estimates import mean_interval
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile

EXACT_BYTES = 1 << 30  # so much is indexed whole: some 6 µs a sample


@dataclass(frozen=True)
class Pick:
    """A shard of the probe: how many samples it holds, and for how many shards of the corpus it stands."""

    shard: Shard
    samples: int
    stands_for: float


@dataclass(frozen=True)
class Census:
    """`by_shard` holds each shard's samples, expected ones if not `exact`; `damaged` the first lines of errors."""

    samples: int
    standard_error: float
    low: int
    high: int
    exact: bool
    indexed: int
    bytes: int
    by_shard: tuple[float, ...]
    whole_shards: float
    picks: tuple[Pick, ...]
    damaged: tuple[str, ...]


def take_census(shards: Sequence[Shard], *, probe_shards: int, seed: int, exact: bool | None = None) -> Census:
    """Count, and draw `probe_shards` shards to probe. `exact` forces or forbids indexing all; None goes by the size.

    Raises:
        DamagedShard: not one of the shards that were opened is whole.
    """
    rng = random.Random(seed)
    sizes = [_size(shard) for shard in shards]
    if exact is None:
        exact = sum(sizes) <= EXACT_BYTES
    draws = draw(sizes, probe_shards, rng)
    exact = exact or len(set(draws)) == len(shards)
    counts: dict[int, int] = {}
    damaged: list[str] = []
    opened = sorted(set(range(len(shards))) if exact else {*draws, *(i for i, size in enumerate(sizes) if size == 0)})
    for position in opened:
        try:
            with ShardFile(shards[position]) as file:
                counts[position] = len(file)
        except (DamagedShard, StorageError) as error:
            damaged.append(str(error).splitlines()[0])
    if not counts:
        raise DamagedShard(
            f"{damaged[0]}\nnone of the {len(opened)} shards opened is whole: nothing can be planned; mend them, or "
            "raise --probe-shards"
        )
    if exact:
        return _exact(shards, sizes, counts, damaged, probe_shards, rng)
    return _estimated(shards, sizes, counts, damaged, draws)


def _exact(
    shards: Sequence[Shard],
    sizes: Sequence[int],
    counts: Mapping[int, int],
    damaged: Sequence[str],
    probe_shards: int,
    rng: random.Random,
) -> Census:
    whole, total = list(counts), sum(counts.values())
    drawn = [whole[index] for index in draw([sizes[position] for position in whole], probe_shards, rng)]
    share = sum(sizes[position] for position in whole) / len(drawn) if len(drawn) < len(whole) else None
    return Census(
        samples=total,
        standard_error=0.0,
        low=total,
        high=total,
        exact=True,
        indexed=len(shards),
        bytes=sum(sizes),
        by_shard=tuple(float(counts.get(position, 0)) for position in range(len(shards))),
        whole_shards=len(whole),
        picks=_picks(shards, sizes, counts, drawn, share),
        damaged=tuple(damaged),
    )


def _estimated(
    shards: Sequence[Shard],
    sizes: Sequence[int],
    counts: Mapping[int, int],
    damaged: Sequence[str],
    draws: Sequence[int],
) -> Census:
    total_bytes = sum(sizes)
    density, error, half = mean_interval([counts.get(position, 0) / sizes[position] for position in draws])
    samples = density * total_bytes
    seen = sum(counts.values())
    share = total_bytes / len(draws)
    lost = sum(share / sizes[position] for position in draws if position not in counts)
    return Census(
        samples=round(samples),
        standard_error=error * total_bytes,
        low=round(max(samples - half * total_bytes, seen)),
        high=round(samples + half * total_bytes),
        exact=False,
        indexed=len(set(draws)),
        bytes=total_bytes,
        by_shard=tuple(density * size for size in sizes),
        whole_shards=max(len(shards) - sizes.count(0) - lost, len(counts)),
        picks=_picks(shards, sizes, counts, [position for position in draws if position in counts], share),
        damaged=tuple(damaged),
    )


def draw(sizes: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """Positions in `sizes`, each as often as its size says; every one once if there are no more than `count`."""
    if len(sizes) <= count:
        return list(range(len(sizes)))
    ends = list(accumulate(sizes))
    stretch = ends[-1] / count
    points = (min(int((number + rng.random()) * stretch), ends[-1] - 1) for number in range(count))
    return [bisect_right(ends, point) for point in points]


def _picks(
    shards: Sequence[Shard], sizes: Sequence[int], counts: Mapping[int, int], drawn: Sequence[int], share: float | None
) -> tuple[Pick, ...]:
    """One pick a shard, however often it was drawn. A draw stands for `share` bytes of the corpus; None: for itself."""
    return tuple(
        Pick(shards[position], counts[position], 1.0 if share is None else times * share / sizes[position])
        for position, times in sorted(Counter(drawn).items())
    )


def _size(shard: Shard) -> int:
    """0 for a shard that can't be found: opening it will say why."""
    try:
        return storage.entry(storage.location(shard.path)).size if shard.size is None else shard.size
    except StorageError:
        return 0
