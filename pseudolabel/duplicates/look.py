"""A look at an image: what is kept of it to tell whether another one shows the same.

- `digest`: of the decoded pixels. Equal digests are equal images, however they were encoded.
- `thumb`: 32x32 levels of grey, 1 kB, the whole image squeezed into a square.
- `hashes`: 64-bit perceptual hashes of the thumb (imagehash's `phash`: signs of the low frequencies of its DCT). Few
  bits of two hashes differ if the images are alike, and sometimes if they aren't.

Of an image that others are compared with there are several hashes: of it, of five crops of it, and of the mirror images
of these. A crop of 5% changes a hash by some 11 bits on small images; by 4 bits if compared with the hash of a crop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.shards import ShardFile
from pseudolabel.views.image import decode, image_field, to_channels

SIDE = 32  # of a thumb; phash resizes to the same
CROP = 0.05
# What is cut off: shares of the height at the top and bottom, of the width at the left and right.
CROPS = (
    (0.0, 0.0, 0.0, 0.0),
    (CROP / 2, CROP / 2, CROP / 2, CROP / 2),
    (CROP, 0.0, CROP, 0.0),
    (CROP, 0.0, 0.0, CROP),
    (0.0, CROP, CROP, 0.0),
    (0.0, CROP, 0.0, CROP),
)
VARIANTS = 2 * len(CROPS)  # the crops, then the mirror images of the crops
Hashes = NDArray[np.uint64]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Looks:
    """Of some samples of a shard, those that can be decoded: M images, V hashes each. `sizes_M2` is height and width,
    `SIDE` at most: how much detail a thumb can have.
    """

    index: tuple[int, ...]
    keys: tuple[str, ...]
    digests: tuple[bytes, ...]
    hashes_MV: Hashes
    thumbs_M: Pixels
    sizes_M2: NDArray[np.int64]
    skipped: int


def look_at(opened: ShardFile, positions: Sequence[int], *, variants: bool) -> Looks:
    """Decode these samples and look at each; with all `VARIANTS` of its hash, or one. What can't be decoded is
    skipped.
    """
    index, digests, hashes, thumbs, sizes = [], [], [], [], []
    for position in positions:
        try:
            image_CHW = decode(opened.read(position, image_field(opened.field_names(position))))
        except ValueError:
            continue
        index.append(position)
        digests.append(digest(image_CHW))
        grey = Image.fromarray(to_channels(image_CHW, 1)[0].numpy())
        thumb = _thumb(grey, CROPS[0])
        thumbs.append(np.asarray(thumb))
        sizes.append([min(side, SIDE) for side in image_CHW.shape[-2:]])
        hashes.append(_variants(grey) if variants else [perceptual_hash(thumb)])
    width = VARIANTS if variants else 1
    return Looks(
        tuple(index),
        tuple(opened.keys[position] for position in index),
        tuple(digests),
        np.array(hashes, np.uint64).reshape(-1, width),
        np.array(thumbs, np.uint8).reshape(-1, SIDE, SIDE),
        np.array(sizes, np.int64).reshape(-1, 2),
        len(positions) - len(index),
    )


def digest(image_CHW: Tensor) -> bytes:
    """Of shape and pixels. Colours that are all grey count as grey."""
    pixels_CHW = image_CHW.numpy()
    if len(pixels_CHW) == 3 and (pixels_CHW[:1] == pixels_CHW[1:]).all():
        pixels_CHW = pixels_CHW[:1]
    found = hashlib.sha256(repr(pixels_CHW.shape).encode())
    found.update(pixels_CHW.tobytes())
    return found.digest()[:16]


def perceptual_hash(thumb: Image.Image) -> int:
    bits = _imagehash().phash(thumb).hash
    return int.from_bytes(np.packbits(bits.reshape(-1)).tobytes(), "big")


def hash_version() -> str:
    """The version of the package that makes the hashes. Raises `SpecError` if it isn't installed."""
    return str(_imagehash().__version__)


def _variants(grey: Image.Image) -> list[int]:
    crops = [_thumb(grey, crop) for crop in CROPS]
    return [perceptual_hash(thumb) for thumb in (*crops, *map(ImageOps.mirror, crops))]


def _thumb(grey: Image.Image, crop: tuple[float, float, float, float]) -> Image.Image:
    top, bottom, left, right = crop
    box = (grey.width * left, grey.height * top, grey.width * (1 - right), grey.height * (1 - bottom))
    return grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError as error:
        raise SpecError(f"leaks: {error}; install it with: pip install 'pseudolabel[leaks]'") from error
    return imagehash
