"""What an augmented view does to colours, from a seed and a policy, in integers.

A policy is `none`, `color` (brightness, contrast, saturation) or `randaugment:N` (N operations out of eight, as in
RandAugment, those that move no pixels); `+erase` behind it also greys out a rectangle in half of the views. The drawn
numbers depend on seed and policy only: a model of another input size sees the same colours.

torchvision's own operations compute in floating point, and multiply-add is fused on some CPUs and not on others:
measured, saturation gives other levels with and without AVX2. Integer arithmetic and tables of 256 levels can't
differ, neither between machines nor between versions. Colours are computed in int32, in place, which on photographs
is quicker than tables.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

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
        if operations:
            wide_CHW = image_CHW.to(torch.int32, memory_format=torch.contiguous_format)
            for name, amount in operations:
                wide_CHW = _OPERATIONS[name](wide_CHW, amount)
            image_CHW = wide_CHW.to(torch.uint8)
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


@cache
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


def _blend(wide_CHW: Tensor, base: Tensor | int, factor: int) -> Tensor:
    """`base` + (`wide_CHW` − `base`) · factor, rounded, within 0 to 255."""
    constant = base * (_ONE - factor) + _ONE // 2
    return wide_CHW.mul_(factor).add_(constant).bitwise_right_shift_(16).clamp_(0, 255)


def _brightness(wide_CHW: Tensor, factor: int) -> Tensor:
    return _blend(wide_CHW, 0, factor)


def _contrast(wide_CHW: Tensor, factor: int) -> Tensor:
    """Around the mean of the luma, rounded."""
    grey_HW = luma(wide_CHW) if wide_CHW.shape[0] == 3 else wide_CHW[0]
    mean = (int(grey_HW.sum(dtype=torch.int64)) + grey_HW.numel() // 2) // grey_HW.numel()
    return _blend(wide_CHW, mean, factor)


def _saturation(wide_CHW: Tensor, factor: int) -> Tensor:
    """Around each pixel's luma; a grey image stays as it is."""
    return wide_CHW if wide_CHW.shape[0] == 1 else _blend(wide_CHW, luma(wide_CHW), factor)


def _posterize(wide_CHW: Tensor, bits: int) -> Tensor:
    return wide_CHW.bitwise_and_(256 - (1 << (8 - bits)))


def _solarize(wide_CHW: Tensor, threshold: int) -> Tensor:
    return torch.where(wide_CHW >= threshold, 255 - wide_CHW, wide_CHW)


def _look_up(wide_CHW: Tensor, tables: list[Levels]) -> Tensor:
    """Each channel through its table of 256 levels."""
    found = [np.take(table.astype(np.int32), one) for table, one in zip(tables, wide_CHW.numpy(), strict=True)]
    return torch.from_numpy(np.stack(found))


def _autocontrast(wide_CHW: Tensor, _: int) -> Tensor:
    """Each channel's levels spread over 0 to 255."""
    tables = []
    for channel in wide_CHW:
        low, high = int(channel.min()), int(channel.max())
        spread = ((_LEVELS - low) * 255 + (high - low) // 2) // (high - low) if high > low else _LEVELS
        tables.append(spread.clip(0, 255))
    return _look_up(wide_CHW, tables)


def _equalize(wide_CHW: Tensor, _: int) -> Tensor:
    """Each channel's histogram flattened, by Pillow's rule."""
    tables = []
    for channel in wide_CHW.numpy():
        counts = np.bincount(channel.ravel(), minlength=256)
        used = counts[counts > 0]
        step = int(used[:-1].sum()) // 255
        before = counts.cumsum() - counts
        tables.append(((before + step // 2) // step).clip(0, 255) if step else _LEVELS)
    return _look_up(wide_CHW, tables)


def _identity(wide_CHW: Tensor, _: int) -> Tensor:
    return wide_CHW


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
