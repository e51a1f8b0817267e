"""The second look: how alike two thumbs are, one of them cropped or mirrored. 1 is the same, 0 nothing in common.

What is compared is detail: each pixel less the mean around it, so that brighter and paler copies are as near as others,
and outlines alone, which alike objects share, count for little. The other image may then move: one thumb is
explained by the other and its derivatives, as far as that means shifts and stretches of up to a pixel (one step of
Lucas and Kanade 1981), since crops are seldom those that were tried. The multiple correlation of this is the
similarity.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pseudolabel.duplicates.look import CROPS, SIDE, Pixels

SIMILARITY = 0.95  # from here on images are the same; docs/leaks.md says what was measured
_PLAIN = 1.0  # levels, root mean square: with less detail than this an image is like any other
_AROUND = 2  # pixels to each side
_WORTH_MOVING = 0.6  # no shift of a pixel makes more than this of less
_MOST = 1.0  # pixels
_RIDGE = 1e-3
Floats = NDArray[np.float32]
Sizes = NDArray[np.int64]


def similarities(thumbs_N: Pixels, others_N: Pixels, sizes: tuple[Sizes, Sizes], variant: int) -> Floats:
    """Pair by pair, the other image cropped and mirrored as `variant` says. Where one image has fewer pixels than a
    thumb, both are brought to as many: `sizes` are those of the images, both (N, 2).
    """
    top, bottom, left, right = CROPS[variant % len(CROPS)]
    one_N: Floats = thumbs_N.astype(np.float32)
    other_N: Floats = others_N.astype(np.float32)
    other_N = np.asarray(_cropping(top, bottom) @ other_N @ _cropping(left, right).T, np.float32)
    if variant >= len(CROPS):
        other_N = other_N[..., ::-1]
    fewest_N2 = np.where(sizes[0] == sizes[1], SIDE, np.minimum(*sizes))
    if (fewest_N2 < SIDE).any():
        down_N, right_N = _reductions()[fewest_N2[:, 0]], _reductions()[fewest_N2[:, 1]].transpose(0, 2, 1)
        one_N = np.asarray(down_N @ one_N @ right_N, np.float32)
        other_N = np.asarray(down_N @ other_N @ right_N, np.float32)
    one_N, other_N = _details(one_N), _details(other_N)
    scale_N = np.sqrt((one_N**2).sum((1, 2)) * (other_N**2).sum((1, 2)))
    found_N: Floats = (one_N * other_N).sum((1, 2)) / np.maximum(scale_N, np.float32(1e-6))
    worth = np.flatnonzero(found_N >= _WORTH_MOVING)
    found_N[worth] = np.maximum(found_N[worth], _moved(one_N[worth], other_N[worth]))
    return found_N


def plain(thumbs_N: Pixels) -> NDArray[np.bool_]:
    """Which have too little detail to be told from others."""
    plain_N: NDArray[np.bool_] = (_details(thumbs_N.astype(np.float32)) ** 2).mean((1, 2)) < _PLAIN**2
    return plain_N


def _moved(one_N: Floats, other_N: Floats) -> Floats:
    """The multiple correlation of details with the other's and its derivatives; 0 where that is no small movement."""
    down_N, right_N = np.gradient(other_N, axis=1), np.gradient(other_N, axis=2)
    place = np.linspace(-1, 1, SIDE, dtype=np.float32)
    explaining = [other_N, down_N, right_N, down_N * place[:, None], right_N * place]
    x_NKP = np.stack(explaining, 1).reshape(len(one_N), len(explaining), SIDE * SIDE)
    x_NKP = x_NKP - x_NKP.mean(2, keepdims=True)
    norm_NK = np.sqrt((x_NKP**2).sum(2)) + np.float32(1e-6)
    x_NKP /= norm_NK[..., None]
    y_NP1 = one_N.reshape(len(one_N), SIDE * SIDE, 1)
    gram_NKK = x_NKP @ x_NKP.transpose(0, 2, 1) + np.eye(len(explaining), dtype=np.float32) * np.float32(_RIDGE)
    product_NK1 = x_NKP @ y_NP1
    solved_NK1 = np.linalg.solve(gram_NKK, product_NK1)
    explained_N = (product_NK1 * solved_NK1).sum((1, 2)) / np.maximum((y_NP1**2).sum((1, 2)), np.float32(1e-6))
    weight_NK = solved_NK1[..., 0] / norm_NK
    pixels_N = np.abs(weight_NK[:, 1:]).max(1) / np.maximum(weight_NK[:, 0], np.float32(1e-6))
    found_N: Floats = np.where(pixels_N < _MOST, np.sqrt(np.clip(explained_N, 0, 1)), np.float32(0))
    return found_N


def _details(thumbs_N: Floats) -> Floats:
    """Less the mean of the square around each pixel (beyond the edge lies more of the edge), and with a mean of 0."""
    width = 2 * _AROUND + 1
    padded = np.pad(thumbs_N, ((0, 0), (_AROUND, _AROUND), (_AROUND, _AROUND)), "edge")
    rows = sum((padded[:, i : i + SIDE] for i in range(1, width)), padded[:, :SIDE])
    summed = sum((rows[:, :, i : i + SIDE] for i in range(1, width)), rows[:, :, :SIDE])
    details_N = thumbs_N - summed / np.float32(width**2)
    centred_N: Floats = details_N - details_N.mean((1, 2), keepdims=True)
    return centred_N


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
