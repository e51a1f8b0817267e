"""Search: for each image the one of many others that shows the same, if there is one.

Equal pixels are found by their digest. What is near is found in two steps: candidates have a perceptual hash within
some bits of the image's; a second look at the thumbs confirms them. The hash alone says little of small or plain
images: shirts of Fashion-MNIST have the same one. The second look compares what is left when thumbs lose their noise
(the mean of 3x3 pixels) and their coarse brightness (minus the mean around a pixel): by correlation, so that brighter
or paler copies are as near as others. Outlines alone, which alike objects share, count for little then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pseudolabel.duplicates.look import CROPS, SIDE, VARIANTS, Hashes, Looks, Pixels

SIMILARITY = 0.95
_PLAIN = 1.0  # levels, root mean square: with less detail than this an image is like any other
_FINE, _COARSE = 1, 3  # pixels around each that noise and coarse brightness are taken of
_AT_ONCE = 1 << 22  # hashes compared in one step: some 80 MB
_PAIRS = 4096  # thumbs compared in one step: some 60 MB
Floats = NDArray[np.float32]


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
        chosen = np.array([i for i, thumb in enumerate(self.thumbs_M) if not _plain(thumb[None])[0]], np.int64)
        return chosen, np.ascontiguousarray(self.hashes_MV[chosen].T)


def nearest(looks: Looks, others: Others, distance: int) -> list[Match]:
    """The nearest of the `others` for those images that have one: equal pixels, or the most similar of those whose
    hash is within `distance` bits. In the order of `looks`.
    """
    found: dict[int, Match] = {}
    for row, one in enumerate(looks.digests):
        if (other := others.by_digest.get(one)) is not None:
            found[row] = Match(row, other, True, 0, 1.0)
    plain = _plain(looks.thumbs_M)
    rows = [row for row in range(len(looks.digests)) if row not in found and not plain[row]]
    for match in _near(looks, others, rows, distance):
        best = found.get(match.row)
        if best is None or _closeness(match) > _closeness(best):
            found[match.row] = match
    return [found[row] for row in sorted(found)]


def _closeness(match: Match) -> tuple[float, int, int]:
    return match.similarity, -match.distance, -match.other


def _near(looks: Looks, others: Others, rows: Sequence[int], distance: int) -> list[Match]:
    positions, hashes_VM = others.detailed
    found = []
    step = max(1, _AT_ONCE // max(1, len(positions)))
    for variant in range(VARIANTS):
        for start in range(0, len(rows), step):
            some = np.array(rows[start : start + step], np.int64)
            bits = np.bitwise_count(looks.hashes_MV[some, :1] ^ hashes_VM[variant][None])
            at, other = np.nonzero(bits <= distance)
            pairs = some[at], positions[other], bits[at, other]
            found += _confirmed(looks, others, pairs, variant)
    return found


def _confirmed(
    looks: Looks,
    others: Others,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]],
    variant: int,
) -> list[Match]:
    found = []
    for start in range(0, len(pairs[0]), _PAIRS):
        row, other, bits = (one[start : start + _PAIRS] for one in pairs)
        sizes = looks.sizes_M2[row], others.sizes_M2[other]
        similarity = np.round(similarities(looks.thumbs_M[row], others.thumbs_M[other], sizes, variant), 4)
        found += [
            Match(int(row[i]), int(other[i]), False, int(bits[i]), float(similarity[i]))
            for i in np.flatnonzero(similarity >= np.float32(SIMILARITY))
        ]
    return found


def similarities(
    thumbs_N: Pixels, others_N: Pixels, sizes: tuple[NDArray[np.int64], NDArray[np.int64]], variant: int
) -> Floats:
    """Pair by pair the correlation of details, the other image cropped and mirrored as `variant` says. Where one image
    has fewer pixels than a thumb, both are brought to as many.
    """
    top, bottom, left, right = CROPS[variant % len(CROPS)]
    cropped_N = _cropping(top, bottom) @ others_N.astype(np.float32) @ _cropping(left, right).T
    if variant >= len(CROPS):
        cropped_N = cropped_N[..., ::-1]
    fewest_N2 = np.where(sizes[0] == sizes[1], SIDE, np.minimum(*sizes))
    down_N, right_N = _reductions()[fewest_N2[:, 0]], _reductions()[fewest_N2[:, 1]].transpose(0, 2, 1)
    one_N = _details(down_N @ thumbs_N.astype(np.float32) @ right_N)
    other_N = _details(down_N @ cropped_N @ right_N)
    product_N = (one_N * other_N).sum((1, 2))
    scale_N = np.sqrt((one_N**2).sum((1, 2)) * (other_N**2).sum((1, 2)))
    correlation_N: Floats = product_N / np.maximum(scale_N, np.float32(1e-6))
    return correlation_N


def _plain(thumbs_N: Pixels) -> NDArray[np.bool_]:
    details_N = _details(thumbs_N)
    plain_N: NDArray[np.bool_] = (details_N**2).mean((1, 2)) < _PLAIN**2
    return plain_N


def _details(thumbs_N: Pixels | Floats) -> Floats:
    """What is neither noise nor coarse brightness, with a mean of 0."""
    smooth_N = _blurred(thumbs_N.astype(np.float32), _FINE)
    details_N = smooth_N - _blurred(smooth_N, _COARSE)
    centred_N: Floats = details_N - details_N.mean((1, 2), keepdims=True)
    return centred_N


def _blurred(thumbs_N: Floats, radius: int) -> Floats:
    """The mean over a square around each pixel; beyond the edge lies more of the edge."""
    width = 2 * radius + 1
    padded = np.pad(thumbs_N, ((0, 0), (radius, radius), (radius, radius)), "edge")
    rows = sum((padded[:, i : i + SIDE] for i in range(1, width)), padded[:, :SIDE])
    summed = sum((rows[:, :, i : i + SIDE] for i in range(1, width)), rows[:, :, :SIDE])
    blurred_N: Floats = summed / np.float32(width**2)
    return blurred_N


@cache
def _cropping(before: float, after: float) -> Floats:
    """The matrix that cuts these shares off the ends of a column of pixels and stretches the rest."""
    return _resampled(np.eye(SIDE, dtype=np.float32), SIDE, SIDE * before, SIDE * (1 - after))


@cache
def _reductions() -> Floats:
    """By a number of pixels up to `SIDE`: the matrix that resizes a column to so many, and back."""
    eyes = [np.eye(side, dtype=np.float32) for side in range(SIDE + 1)]
    found = [_resampled(_resampled(eyes[SIDE], side, 0, SIDE), SIDE, 0, side) for side in range(1, SIDE)]
    return np.stack([eyes[SIDE], *found, eyes[SIDE]])


def _resampled(columns: Floats, side: int, start: float, end: float) -> Floats:
    """Each column's stretch from `start` to `end` in so many pixels."""
    image = Image.fromarray(columns)
    box = (0, start, image.width, end)
    return np.asarray(image.resize((image.width, side), Image.Resampling.LANCZOS, box))
