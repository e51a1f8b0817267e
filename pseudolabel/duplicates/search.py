"""Search: for each image the one of many others that shows the same, if there is one.

Equal pixels are found by their digest. What is near is found in two steps: candidates have a perceptual hash within
some bits of the image's; a second look at the thumbs confirms them. The hash alone says little of small or plain
images: some shirts of Fashion-MNIST have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pseudolabel.duplicates.look import VARIANTS, Hashes, Looks, Pixels
from pseudolabel.duplicates.second_look import SIMILARITY, plain, similarities

_ROWS, _COLUMNS = 64, 4096  # hashes compared in one step: 2 MB
_PAIRS = 1024  # thumbs compared in one step: some 60 MB
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]  # positions in one, in the other; bits


class Match(NamedTuple):
    """The nearest of the others: its position among them. `distance` is in bits of the hash."""

    row: int
    other: int
    exact: bool
    distance: int
    similarity: float


@dataclass(frozen=True)
class Others:
    """M images that others are compared with: looks with all variants of their hash. Pickles."""

    digests: tuple[bytes, ...]
    hashes_MV: Hashes
    thumbs_M: Pixels
    sizes_M2: NDArray[np.int64]

    @classmethod
    def of(cls, looks: Sequence[Looks]) -> Others:
        return cls(
            tuple(one for part in looks for one in part.digests),
            np.concatenate([part.hashes_MV for part in looks]),
            np.concatenate([part.thumbs_M for part in looks]),
            np.concatenate([part.sizes_M2 for part in looks]),
        )

    @cached_property
    def by_digest(self) -> dict[bytes, int]:
        """The first that has these pixels."""
        found: dict[bytes, int] = {}
        for position, one in enumerate(self.digests):
            found.setdefault(one, position)
        return found

    @cached_property
    def detailed(self) -> tuple[NDArray[np.int64], Hashes]:
        """The positions of those that aren't plain, and their hashes, variant by variant."""
        blocks = [plain(self.thumbs_M[start : start + _PAIRS]) for start in range(0, len(self.thumbs_M), _PAIRS)]
        chosen = np.flatnonzero(~np.concatenate([np.zeros(0, np.bool_), *blocks]))
        return chosen, np.ascontiguousarray(self.hashes_MV[chosen].T)


def nearest(looks: Looks, others: Others, distance: int) -> list[Match]:
    """The nearest of the `others` for those images that have one: equal pixels, or the most similar of those whose
    hash is within `distance` bits. In the order of `looks`.
    """
    found: dict[int, Match] = {}
    for row, one in enumerate(looks.digests):
        if (other := others.by_digest.get(one)) is not None:
            found[row] = Match(row, other, True, 0, 1.0)
    is_plain = plain(looks.thumbs_M)
    rows = [row for row in range(len(looks.digests)) if row not in found and not is_plain[row]]
    for match in _near(looks, others, rows, distance):
        best = found.get(match.row)
        if best is None or _closeness(match) > _closeness(best):
            found[match.row] = match
    return [found[row] for row in sorted(found)]


def _closeness(match: Match) -> tuple[float, int, int]:
    return match.similarity, -match.distance, -match.other


def _near(looks: Looks, others: Others, rows: Sequence[int], distance: int) -> Iterator[Match]:
    positions, hashes_VM = others.detailed
    chosen = np.array(rows, np.int64)
    for variant in range(VARIANTS):
        blocks = list(_within(looks.hashes_MV[chosen, 0], hashes_VM[variant], distance))
        if blocks:
            at, other, bits = map(np.concatenate, zip(*blocks, strict=True))
            yield from _confirmed(looks, others, (chosen[at], positions[other], bits), variant)


def _within(hashes_N: Hashes, hashes_M: Hashes, distance: int) -> Iterator[Pairs]:
    """The pairs that differ in so few bits, and in how many. In blocks that fit a cache, and most have no such pair:
    about a nanosecond a pair.
    """
    for row in range(0, len(hashes_N), _ROWS):
        for column in range(0, len(hashes_M), _COLUMNS):
            bits = np.bitwise_count(hashes_N[row : row + _ROWS, None] ^ hashes_M[None, column : column + _COLUMNS])
            near = bits <= distance
            if near.any():
                at, other = np.nonzero(near)
                yield at + row, other + column, bits[at, other]


def _confirmed(looks: Looks, others: Others, pairs: Pairs, variant: int) -> Iterator[Match]:
    for start in range(0, len(pairs[0]), _PAIRS):
        row, other, bits = (one[start : start + _PAIRS] for one in pairs)
        sizes = looks.sizes_M2[row], others.sizes_M2[other]
        similarity = np.round(similarities(looks.thumbs_M[row], others.thumbs_M[other], sizes, variant), 4)
        for i in np.flatnonzero(similarity >= np.float32(SIMILARITY)):
            yield Match(int(row[i]), int(other[i]), False, int(bits[i]), float(similarity[i]))
