"""Drawing a view: where to crop, whether to flip, and the seed of its colours.

A view is a pure function of (the store's view seed, the sample's key, the view's number) and of the image's size. Its
numbers come from BLAKE2b over these and a counter: no generator whose stream may change with a library, no state, the
same on every machine and in any order. What is drawn is stored, so nobody who replays a view needs to draw it again.

The crop is kept as float32 fractions, and pixels are computed from those, when annotating and when replaying alike
(`View.box`), so that there is one rule and no second rounding. Needs no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pseudolabel.errors import StoreMismatch

CROP_RATIO = (3 / 4, 4 / 3)
"""Width to height of a crop, as usual since Inception (Szegedy et al. 2015)."""

_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """One presentation of a sample. `crop` is (top, left, height, width) in fractions of the decoded image, each a
    float32.
    """

    number: int = 0
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    flip: bool = False
    aug_seed: int = 0

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width in pixels: fraction times side, rounded half up, kept inside, at least one
        pixel.
        """
        top, left, share_y, share_x = self.crop
        rows = min(max(_pixels(share_y, height), 1), height)
        columns = min(max(_pixels(share_x, width), 1), width)
        return (
            min(max(_pixels(top, height), 0), height - rows),
            min(max(_pixels(left, width), 0), width - columns),
            rows,
            columns,
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> View:
        """The view of a part's row; the clean one where there are no view columns. Raises `StoreMismatch`."""
        number = row.get("view")
        if number == 0:
            return CLEAN
        try:
            top, left, height, width = (float(value) for value in row["crop"])
            return cls(int(row["view"]), (top, left, height, width), bool(row["flip"]), int(row["aug_seed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreMismatch(
                f"this row doesn't say what its view is ({error}); read the columns view, crop, flip and aug_seed, too"
            ) from error


CLEAN = View()
"""View 0: the model's own preprocessing, nothing else."""


def draw_view(seed: int, key: str, number: int, height: int, width: int, scale: tuple[float, float]) -> View:
    """View `number` of the sample `key`, an image of height × width pixels.

    The law of torchvision's `RandomResizedCrop`: a share of the area uniform in `scale`, a log-uniform aspect ratio in
    `CROP_RATIO`, a uniform place, up to ten attempts; then the largest crop of such a ratio at the centre. Half of
    the views are flipped. The shard plays no part, so packing samples anew keeps their views.
    """
    if number == 0:
        return CLEAN
    subject = struct.pack("<QI", seed, number) + key.encode()
    uniform = uniforms(subject)
    flip = next(uniform) < 0.5
    aug_seed = int(next(uniform) * (1 << 53))
    top, left, rows, columns = _draw_box(uniform, height, width, scale)
    crop = (_float32(top / height), _float32(left / width), _float32(rows / height), _float32(columns / width))
    return View(number, crop, flip, aug_seed)


def _draw_box(
    uniform: Iterator[float], height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * next(uniform))
        ratio = math.exp(low + (high - low) * next(uniform))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        across, down = next(uniform), next(uniform)
        if 0 < columns <= width and 0 < rows <= height:
            return int(down * (height - rows + 1)), int(across * (width - columns + 1)), rows, columns
    rows = min(height, max(round(width / CROP_RATIO[0]), 1))
    columns = min(width, max(round(height * CROP_RATIO[1]), 1))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def row_seeds(keys: Sequence[str], views: Sequence[int]) -> list[int]:
    """A seed, 63 bits, for each row (key, view): of what an encoding draws of its label."""
    return [
        int.from_bytes(blake2b(struct.pack("<I", view) + key.encode(), digest_size=8).digest(), "little") >> 1
        for key, view in zip(keys, views, strict=True)
    ]


def uniforms(subject: bytes) -> Iterator[float]:
    """Endless numbers in [0, 1): the upper 53 bits of BLAKE2b-64 over a counter (4 bytes) and `subject`, both little
    endian.
    """
    counter = 0
    while True:
        digest = blake2b(struct.pack("<I", counter) + subject, digest_size=8).digest()
        yield (int.from_bytes(digest, "little") >> 11) * 2.0**-53
        counter += 1


def _pixels(fraction: float, side: int) -> int:
    return math.floor(fraction * side + 0.5)


def _float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
