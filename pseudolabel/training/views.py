"""How a student sees its training images: augmented, or as the teacher saw them.

What is drawn for a row follows from the row's seed alone, and the draws of a batch are made at once; crops, flips and
erasing are then copies of memory. Only RandAugment works image by image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from pseudolabel.replay import Replay
from pseudolabel.settings import AugmentSettings
from pseudolabel.uniforms import uniforms
from pseudolabel.views.draw import CLEAN, View
from pseudolabel.views.image import Preprocessing, resize, to_channels

VIEW_COLUMNS = ("view", "crop", "flip", "aug_seed")
"""Of a part: what a view is, for whom they are replayed."""

_ATTEMPTS = 10
_BOX = 2 + 2 * _ATTEMPTS  # numbers that a random box takes
_CROP_SCALE, _CROP_RATIO = (0.25, 1.0), (3 / 4, 4 / 3)  # of RandomResizedCrop, less zoomed than its default
_ERASED, _ERASED_RATIO = (0.02, 0.2), (0.3, 3.3)  # of RandomErasing, at most a fifth

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


class Presentation(Protocol):
    """Makes training images of decoded ones, in two steps, so that what the first gives may be kept in memory."""

    @property
    def shrink_to(self) -> int:
        """As for `decode`; 0 for images of their full size."""
        ...

    def prepare(self, image_CHW: Tensor) -> Tensor:
        """All that its views of a decoded image (uint8, 1 or 3 channels) are made of."""
        ...

    def present(self, images: Tensor | Sequence[Tensor], seed_B: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Prepared images, each with its seed and its stored columns → uint8 (B, channels, H, W)."""
        ...


@dataclass(frozen=True)
class Augmented:
    """Random crops, flips, RandAugment and erasing."""

    settings: AugmentSettings
    preprocessing: Preprocessing
    shrink_to: ClassVar[int] = 0

    def prepare(self, image_CHW: Tensor) -> Tensor:
        if self.settings.crop == "resized":
            return to_channels(image_CHW, self.preprocessing.channels).contiguous()
        return self.preprocessing.prepare(image_CHW).contiguous()

    def present(self, images: Tensor | Sequence[Tensor], seed_B: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        crop_BN, flip_B1, erase_BN = np.split(uniforms(seed_B, 2 * _BOX + 2).numpy(), (_BOX, _BOX + 1), axis=1)
        flip_B = (flip_B1[:, 0] < 0.5) & self.settings.flip
        if self.settings.crop == "resized":
            pixels_BCHW = self._resized(images, crop_BN)
        else:
            pixels_BCHW = images.numpy() if isinstance(images, Tensor) else torch.stack(list(images)).numpy()
        if self.settings.crop == "pad":
            pixels_BCHW = shifted(pixels_BCHW, crop_BN, flip_B)
        elif flip_B.any():
            pixels_BCHW = np.where(flip_B[:, None, None, None], pixels_BCHW[..., ::-1], pixels_BCHW)
        if self.settings.randaugment:
            pixels_BCHW = self._randaugment(pixels_BCHW, seed_B)
        if self.settings.erasing:
            pixels_BCHW = erased(pixels_BCHW, self.settings.erasing, erase_BN)
        return torch.from_numpy(np.ascontiguousarray(pixels_BCHW))

    def _resized(self, images: Tensor | Sequence[Tensor], uniform_BN: Floats) -> NDArray[np.uint8]:
        size = self.preprocessing.crop
        sides_B2 = np.array([image.shape[-2:] for image in images])
        boxes = random_boxes(uniform_BN, sides_B2, _CROP_SCALE, _CROP_RATIO)
        found = [
            resize(image[:, top : top + height, left : left + width], size, size, "bilinear")
            for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True)
        ]
        pixels_BCHW: NDArray[np.uint8] = torch.stack(found).numpy()
        return pixels_BCHW

    def _randaugment(self, pixels_BCHW: NDArray[np.uint8], seed_B: Tensor) -> NDArray[np.uint8]:
        transform = v2.RandAugment(magnitude=self.settings.randaugment)
        found = []
        with torch.random.fork_rng(devices=[]):
            for pixels_CHW, seed in zip(
                torch.from_numpy(np.ascontiguousarray(pixels_BCHW)), seed_B.tolist(), strict=True
            ):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
                found.append(transform(pixels_CHW))
        augmented_BCHW: NDArray[np.uint8] = torch.stack(found).numpy()
        return augmented_BCHW


@dataclass(frozen=True)
class Replayed:
    """The crop, flip and colours that the teacher saw, at the student's size: function matching (Beyer et al. 2022,
    arXiv:2106.05237). Nothing else is drawn.
    """

    replay: Replay

    @property
    def shrink_to(self) -> int:
        return self.replay.plan.shrink_to  # the teacher saw a large JPEG so

    def prepare(self, image_CHW: Tensor) -> Tensor:
        return image_CHW.contiguous()

    def present(self, images: Tensor | Sequence[Tensor], seed_B: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        described = zip(*(columns[name].tolist() for name in VIEW_COLUMNS), strict=True)
        views = [
            CLEAN if number == 0 else View(number, tuple(crop), flip, seed) for number, crop, flip, seed in described
        ]
        return torch.stack([self.replay(image, view) for image, view in zip(images, views, strict=True)])


def shifted(pixels_BCHW: NDArray[np.uint8], uniform_BN: Floats, flip_B: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Each image moved by up to an eighth of its size, black where nothing is left, and flipped left to right where
    `flip_B` says so.
    """
    size = pixels_BCHW.shape[-1]
    most = max(size // 8, 1)
    moves_B2 = np.floor(uniform_BN[:, :2] * (2 * most + 1)).astype(np.int64) - most
    moved_BCHW = np.zeros_like(pixels_BCHW)
    for moved_CHW, pixels_CHW, (down, right), flip in zip(
        moved_BCHW, pixels_BCHW, moves_B2.tolist(), flip_B.tolist(), strict=True
    ):
        target_CHW = moved_CHW[..., ::-1] if flip else moved_CHW
        target_CHW[:, max(down, 0) : size + down, max(right, 0) : size + right] = pixels_CHW[
            :, max(-down, 0) : size - down, max(-right, 0) : size - right
        ]
    return moved_BCHW


def erased(pixels_BCHW: NDArray[np.uint8], share: float, uniform_BN: Floats) -> NDArray[np.uint8]:
    """So large a share of the images with a black rectangle (random erasing, Zhong et al. 2017, arXiv:1708.04896)."""
    chosen = np.flatnonzero(uniform_BN[:, 0] < share)
    sides_B2 = np.broadcast_to(np.array(pixels_BCHW.shape[-2:]), (len(chosen), 2))
    boxes = random_boxes(uniform_BN[chosen, 1:], sides_B2, _ERASED, _ERASED_RATIO)
    found_BCHW = pixels_BCHW.copy()
    for row, (top, left, height, width) in zip(chosen.tolist(), boxes.tolist(), strict=True):
        found_BCHW[row, :, top : top + height, left : left + width] = 0
    return found_BCHW


def random_boxes(uniform_BN: Floats, sides_B2: Whole, scale: tuple[float, float], ratio: tuple[float, float]) -> Whole:
    """Top, left, height and width (B, 4) in images of these heights and widths, from 2 + 2·attempts numbers a row.

    The law of torchvision's `RandomResizedCrop`: a share of the area uniform in `scale`, a log-uniform ratio of width
    to height, the first of ten attempts that fits, or else the largest box of such a ratio; a uniform place.
    """
    area_BA = sides_B2.prod(axis=1, keepdims=True) * (
        scale[0] + (scale[1] - scale[0]) * uniform_BN[:, 2 : 2 + _ATTEMPTS]
    )
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratio_BA = np.exp(low + (high - low) * uniform_BN[:, 2 + _ATTEMPTS : 2 + 2 * _ATTEMPTS])
    drawn_BA2 = np.stack([np.sqrt(area_BA / ratio_BA), np.sqrt(area_BA * ratio_BA)], axis=-1).round()
    fits_BA = np.logical_and.reduce((drawn_BA2 >= 1) & (drawn_BA2 <= sides_B2[:, None]), axis=-1)
    first_B = fits_BA.argmax(axis=1)
    height_B, width_B = sides_B2.T
    largest_B2 = np.stack(
        [np.minimum(height_B, width_B / ratio[0]), np.minimum(width_B, height_B * ratio[1])], axis=-1
    ).round()
    size_B2 = np.where(fits_BA.any(axis=1)[:, None], drawn_BA2[np.arange(len(first_B)), first_B], largest_B2)
    size_B2 = size_B2.astype(np.int64).clip(1, sides_B2)
    place_B2 = np.floor(uniform_BN[:, :2] * (sides_B2 - size_B2 + 1)).astype(np.int64)
    return np.concatenate([place_B2, size_B2], axis=1)
