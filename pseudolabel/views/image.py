"""Images: bytes → uint8 tensor → the fixed-size uint8 input of a model; normalisation happens on the device.

Grey or RGB JPEG go through torchvision's decoder, all else through Pillow: CMYK, palette and alpha become RGB, 16 bits
become the upper 8, an animation is its first frame. EXIF orientation is not applied, as in the usual ImageNet
pipelines. Resizing and cropping equal torchvision's v2 transforms on a uint8 tensor, and so its `ImageClassification`
preset on a Pillow image but for one level in fewer than 1% of the values. (The preset on a tensor resizes in floating
point: seven times the cost, and another level in 8 to 25% of the values.)

Nothing here computes pixels in floating point: torchvision's `resize` does on a CPU without AVX2, and its grayscale
gives other levels there, too. Resizing is torch's uint8 kernel itself, grey from RGB is Pillow's integer luma; both
are the same on all CPUs.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as F

from pseudolabel.shards import IMAGE_FIELDS

MAX_PIXELS = 1 << 27
"""Larger images are refused before they are decoded: a few kilobytes can unpack to gigabytes."""

# Nothing else: Pillow would also hand EPS to Ghostscript, whatever the field is called.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")
# The operator itself: `torchvision.io.decode_image` warns of its deprecation since 0.29, and where warnings are errors
# every image would be rejected. For JPEG only: its PNG decoder ends the process with a segmentation fault on most
# damaged files (0.29.2; with JPEG none of 100,000 mutated files did), though it takes 15 µs for 28x28 and Pillow 50.
_decode_image = torch.ops.image.decode_image
# Pillow warns at its own, lower limit; ours is checked from the header before any pixel is decoded.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UndecodableImage(ValueError):
    """These bytes are no image that can be used; the message says why."""


def image_field(names: Iterable[str]) -> str:
    """Which of a sample's fields is its image. Raises `UndecodableImage` if none or several could be."""
    names = list(names)
    found = [name for name in names if name in IMAGE_FIELDS]
    if len(found) != 1:
        what = "several image fields" if found else "no image field"
        raise UndecodableImage(
            f"{what} among {', '.join(sorted(names)) or 'no fields'}; one of {'/'.join(IMAGE_FIELDS)} is wanted"
        )
    return found[0]


def decode(data: bytes, shrink_to: int = 0) -> Tensor:
    """Decode an image to uint8 of shape (1, H, W) if it is grey, else (3, H, W).

    With `shrink_to`, a JPEG whose shorter side is at least four times that is decoded at a half, a quarter or an eighth
    of its size, never below twice `shrink_to`: cheaper, since libjpeg leaves out the high frequencies, and not the same
    pixels.

    Raises:
        UndecodableImage: empty, truncated, not an image, more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise UndecodableImage("the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_pixels(*image.size)
            if image.format == "JPEG" and image.mode in ("L", "RGB"):
                if shrink_to and min(image.size) >= 4 * shrink_to:
                    width, height = (side * 2 * shrink_to // min(image.size) for side in image.size)
                    image.draft(image.mode, (width, height))
                    return _decode_any(image)
                return _decode_jpeg(data, grey=image.mode == "L")
            return _decode_any(image)
    except UndecodableImage:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except UnidentifiedImageError as error:
        what = f"these {len(data)} bytes are no image of a known format, or its header is damaged"
        raise UndecodableImage(what) from error
    except Exception as error:  # decoders raise whatever they like on hostile bytes; every kind becomes a named reject
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = re.sub(r" at 0x[0-9a-f]+", "", text)  # an address would differ from run to run
        raise UndecodableImage(text) from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UndecodableImage(f"{width}x{height} pixels, more than {MAX_PIXELS}: refused as a decompression bomb")


def _decode_jpeg(data: bytes, *, grey: bool) -> Tensor:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image_CHW: Tensor = _decode_image(buffer, (ImageReadMode.GRAY if grey else ImageReadMode.RGB).value)
    return image_CHW


def _decode_any(image: Image.Image) -> Tensor:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if values.dtype.kind == "f":
            raise UndecodableImage("floating-point pixels, whose range is unknown")
        return torch.from_numpy((values >> 8).clip(0, 255).astype(np.uint8))[None]
    if image.mode in ("1", "L", "LA"):
        return torch.from_numpy(np.array(image if image.mode == "L" else image.convert("L")))[None]
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # straight to RGB gives the same colours, and a warning
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images.

    The shorter side becomes `resize` pixels (with `fit="squash"` both sides do, whatever the shape), the centre
    `crop` × `crop` is kept, pixels/255 are normalised by `mean` and `std` (one value per channel). Where the centre
    falls between two pixels, torchvision takes the even one; transformers takes the first, `center="floor"`.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    fit: str = "shorter"
    center: str = "even"

    @property
    def channels(self) -> int:
        return len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """As JSON values. The younger fields appear only where they matter: fingerprints made before them stay."""
        young = {"fit": "shorter", "center": "even"}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if young.get(name) != value
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on anything else."""
        mean, std = (tuple(float(value) for value in data[name]) for name in ("mean", "std"))
        words = {name: str(data[name]) for name in ("interpolation", "fit", "center") if name in data}
        made = cls(index(data["resize"]), index(data["crop"]), mean, std, **words)
        right = len(mean) in (1, 3) and len(std) == len(mean) and min(std) > 0 and all(map(math.isfinite, mean + std))
        right = right and made.interpolation in INTERPOLATIONS
        right = right and made.fit in ("shorter", "squash") and made.center in ("even", "floor")
        if not right or min(made.crop, made.resize) < 1 or max(made.crop, made.resize) ** 2 > MAX_PIXELS:
            raise ValueError(f"preprocessing {dict(data)} makes no sense")
        return made

    def prepare(self, image_CHW: Tensor) -> Tensor:
        """The clean view as uint8 of shape (channels, crop, crop). Raises `UndecodableImage` for absurdly long
        images.
        """
        image_CHW = to_channels(image_CHW, self.channels)
        height, width = image_CHW.shape[-2:]
        if self.fit == "squash":
            to_height = to_width = self.resize
        elif max(height, width) * self.resize**2 > MAX_PIXELS * min(height, width):
            raise UndecodableImage(f"{width}x{height} pixels: too long and thin to resize to {self.resize}")
        else:
            longer = int(self.resize * max(height, width) / min(height, width))
            to_height, to_width = (longer, self.resize) if height > width else (self.resize, longer)
        return self._center_crop(resize(image_CHW, to_height, to_width, self.interpolation))

    def _center_crop(self, image_CHW: Tensor) -> Tensor:
        height, width = image_CHW.shape[-2:]
        if (height, width) == (self.crop, self.crop):
            return image_CHW
        if self.center == "floor" and min(height, width) >= self.crop:
            top, left = (height - self.crop) // 2, (width - self.crop) // 2
            return image_CHW[..., top : top + self.crop, left : left + self.crop]
        cropped: Tensor = F.center_crop(image_CHW, [self.crop, self.crop])
        return cropped


@dataclass(frozen=True)
class PrepareFor:
    """The clean view for several models at once, an input for each. Pickles, unlike the models."""

    preprocessings: tuple[Preprocessing, ...]

    def __call__(self, image_CHW: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.prepare(image_CHW) for one in self.preprocessings)


def square(size: int, channels: int) -> Preprocessing:
    """Shorter side to `size`, centre crop, pixels to [-1, 1]: the default where a model has no preprocessing of its
    own.
    """
    return Preprocessing(size, size, (0.5,) * channels, (0.5,) * channels)


def resize(image_CHW: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """Resize uint8 to exactly this size, antialiased where the interpolation can be."""
    if image_CHW.shape[-2:] == (height, width):
        return image_CHW
    antialias = interpolation in ("bilinear", "bicubic")
    resized_BCHW: Tensor = nn.functional.interpolate(
        image_CHW[None], (height, width), mode=interpolation, antialias=antialias
    )
    return resized_BCHW[0]


def to_channels(image_CHW: Tensor, channels: int) -> Tensor:
    """Grey ↔ RGB where the model wants the other."""
    if image_CHW.shape[0] == channels:
        return image_CHW
    return luma(image_CHW.int())[None].to(torch.uint8) if channels == 1 else image_CHW.expand(3, -1, -1)


def luma(rgb_3HW: Tensor) -> Tensor:
    """Brightness of int32 RGB as int32 (H, W), as Pillow's `convert("L")`: 16-bit fixed-point weights of ITU-R 601."""
    red, green, blue = rgb_3HW
    grey_HW: Tensor = 19595 * red
    return grey_HW.add_(green, alpha=38470).add_(blue, alpha=7471).add_(1 << 15).bitwise_right_shift_(16)


class Normalize(nn.Module):
    """uint8 batch → float batch, on the device: (pixel/255 − mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return (pixels_BCHW.float() / 255 - self.mean) / self.std
