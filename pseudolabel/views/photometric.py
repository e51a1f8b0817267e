"""What an augmented view does to colours, from a seed and a policy, in integers.

A policy is `none`, `color` (brightness, contrast, saturation) or `randaugment:N` (N operations out of eight, as in
RandAugment, those that move no pixels); `+erase` behind it also greys out a rectangle in half of the views. The drawn
numbers depend on seed and policy only: a model of another input size sees the same colours.

torchvision's own operations compute in floating point, and multiply-add is fused on some CPUs and not on others:
measured, saturation gives other levels with and without AVX2. Integer arithmetic and tables of 256 levels can't
differ, neither between machines nor between versions.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.views.draw import uniforms
from pseudolabel.views.image import luma

_ONE = 1 << 16  # factors are fixed-point numbers of 16 fractional bits
_LEVELS = np.arange(256, dtype=np.int64)
_JITTER, _STRONG = (0.6, 0.8), (0.1, 1.8)  # least factor and span: `color` lies in 1 ± 0.4, `randaugment` in 1 ± 0.9
_ERASED_LEVEL = 128
_MAX_OPERATIONS = 16

Levels = NDArray[np.int64]
Operation = tuple[str, int]
"""What is done, and how much of it."""


@dataclass(frozen=True)
class Policy:
    """Which operations a view gets."""

    kind: str = "none"
    count: int = 0
    erase: bool = False

    def draw(self, aug_seed: int) -> tuple[list[Operation], tuple[float, float, float, float] | None]:
        """The operations in their order, and the rectangle to erase (top, left, height, width in fractions), if any."""
        uniform = uniforms(b"photometric" + struct.pack("<q", aug_seed))
        operations: list[Operation] = []
        if self.kind == "color":
            operations = [(name, _factor(next(uniform), _JITTER)) for name in ("brightness", "contrast", "saturation")]
        elif self.kind == "randaugment":
            operations = [_draw_operation(uniform) for _ in range(self.count)]
        return operations, _draw_rectangle(uniform) if self.erase else None

    def apply(self, image_CHW: Tensor, aug_seed: int) -> Tensor:
        """uint8 in, uint8 of the same shape out; the input stays as it is."""
        operations, rectangle = self.draw(aug_seed)
        for name, amount in operations:
            image_CHW = _OPERATIONS[name](image_CHW, amount)
        if rectangle is not None:
            height, width = image_CHW.shape[-2:]
            top, left, bottom, right = (
                math.floor(edge * side + 0.5)
                for edge, side in (
                    (rectangle[0], height),
                    (rectangle[1], width),
                    (rectangle[0] + rectangle[2], height),
                    (rectangle[1] + rectangle[3], width),
                )
            )
            image_CHW = image_CHW.clone()
            image_CHW[:, top:bottom, left:right] = _ERASED_LEVEL
        return image_CHW


def parse_policy(spec: str) -> Policy:
    """`none`, `color` or `randaugment:N`, with or without `+erase`. Raises `SpecError`."""
    found = re.fullmatch(r"(none|color|randaugment:([1-9][0-9]?))(\+erase)?", spec)
    count = int(found[2]) if found and found[2] else 0
    if not found or count > _MAX_OPERATIONS:
        raise SpecError(
            f"{spec!r} is not a view policy; write none, color or randaugment:N (N from 1 to {_MAX_OPERATIONS}), "
            "and +erase behind it if you like, such as randaugment:2+erase"
        )
    return Policy(found[1].partition(":")[0], count, bool(found[3]))


def _factor(u: float, extent: tuple[float, float]) -> int:
    return math.floor((extent[0] + extent[1] * u) * _ONE)


def _draw_operation(uniform: Iterator[float]) -> Operation:
    """An operation with equal chances, then how much of it, uniform over its range (as in TrivialAugment)."""
    name, u = _RANDOM[int(next(uniform) * len(_RANDOM))], next(uniform)
    if name == "posterize":
        return name, 8 - int(5 * u)  # bits kept: 8 to 4
    if name == "solarize":
        return name, 256 - int(257 * u)  # inverted from this level on: 256 (none) to 0 (all)
    return name, _factor(u, _STRONG) if name in ("brightness", "contrast", "saturation") else 0


def _draw_rectangle(uniform: Iterator[float]) -> tuple[float, float, float, float] | None:
    often, height, width, down, across = (next(uniform) for _ in range(5))
    height, width = 0.1 + 0.4 * height, 0.1 + 0.4 * width
    return (down * (1 - height), across * (1 - width), height, width) if often < 0.5 else None


def _blend(levels: Levels, base: Levels | int, factor: int) -> Levels:
    """`base` + (`levels` − `base`) · factor, rounded, within 0 to 255."""
    blended: Levels = (base * _ONE + (levels - base) * factor + _ONE // 2) >> 16
    return blended.clip(0, 255)


def _look_up(image_CHW: Tensor, tables: list[Levels]) -> Tensor:
    """Every channel through its table of 256 levels; one table may serve all."""
    narrow = [table.astype(np.uint8) for table in tables]
    pixels_CHW = image_CHW.numpy()
    if len(narrow) == 1:
        return torch.from_numpy(np.take(narrow[0], pixels_CHW))
    return torch.from_numpy(np.stack([np.take(table, one) for table, one in zip(narrow, pixels_CHW, strict=True)]))


def _brightness(image_CHW: Tensor, factor: int) -> Tensor:
    return _look_up(image_CHW, [_blend(_LEVELS, 0, factor)])


def _contrast(image_CHW: Tensor, factor: int) -> Tensor:
    """Around the mean of the luma, rounded."""
    grey_HW = luma(image_CHW.int()) if image_CHW.shape[0] == 3 else image_CHW[0]
    mean = (int(grey_HW.sum(dtype=torch.int64)) + grey_HW.numel() // 2) // grey_HW.numel()
    return _look_up(image_CHW, [_blend(_LEVELS, mean, factor)])


def _saturation(image_CHW: Tensor, factor: int) -> Tensor:
    """Around each pixel's luma; a grey image stays as it is."""
    if image_CHW.shape[0] == 1:
        return image_CHW
    wide_CHW = image_CHW.int()
    grey_HW = luma(wide_CHW)
    blended_CHW = (grey_HW * _ONE + (wide_CHW - grey_HW) * factor + _ONE // 2) >> 16
    return blended_CHW.clamp_(0, 255).to(torch.uint8)


def _posterize(image_CHW: Tensor, bits: int) -> Tensor:
    return image_CHW & (256 - (1 << (8 - bits)))


def _solarize(image_CHW: Tensor, threshold: int) -> Tensor:
    return _look_up(image_CHW, [np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS)])


def _autocontrast(image_CHW: Tensor, _: int) -> Tensor:
    """Each channel's levels spread over 0 to 255."""
    tables = []
    for channel in image_CHW:
        low, high = int(channel.min()), int(channel.max())
        spread = ((_LEVELS - low) * 255 + (high - low) // 2) // (high - low) if high > low else _LEVELS
        tables.append(spread.clip(0, 255))
    return _look_up(image_CHW, tables)


def _equalize(image_CHW: Tensor, _: int) -> Tensor:
    """Each channel's histogram flattened, by Pillow's rule."""
    tables = []
    for channel in image_CHW.numpy():
        counts = np.bincount(channel.ravel(), minlength=256)
        used = counts[counts > 0]
        step = int(used[:-1].sum()) // 255
        before = counts.cumsum() - counts
        tables.append(((before + step // 2) // step).clip(0, 255) if step else _LEVELS)
    return _look_up(image_CHW, tables)


def _identity(image_CHW: Tensor, _: int) -> Tensor:
    return image_CHW


_OPERATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": _identity,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
_RANDOM = tuple(_OPERATIONS)
