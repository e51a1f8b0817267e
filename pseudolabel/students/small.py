"""`small:resnet8?width=16`, also resnet14 and resnet20: our own family for images of 28 to 64 pixels.

The ResNets of He et al. (2015, arXiv:1512.03385, §4.2) with option-B shortcuts and three stages of width, 2·width and
4·width; `stem_stride=2` halves the resolution first, at a quarter of the cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec

_DEPTHS = {"resnet8": 1, "resnet14": 2, "resnet20": 3}


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A ResNet for small images: normalised (B, channels, H, W) → logits (B, C)."""

    def __init__(self, blocks: int, *, num_classes: int, channels: int, width: int = 16, stem_stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        size = width
        for stage, out in enumerate((width, 2 * width, 4 * width)):
            for block in range(blocks):
                stages.append(ResidualBlock(size, out, 2 if stage > 0 and block == 0 else 1))
                size = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(x)).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


@dataclass(frozen=True)
class SmallStudent:
    """One of the family by name."""

    spec: Spec
    config: None = None

    def build(self, num_classes: int, channels: int) -> nn.Module:
        args: dict[str, Any] = dict(self.spec.args)
        return SmallResNet(_DEPTHS[self.spec.name], num_classes=num_classes, channels=channels, **args)

    def start(self, num_classes: int, channels: int) -> None:
        """There are no published weights of these."""


def make(spec: Spec, config: object = None) -> SmallStudent:
    """Describe it. Raises `SpecError`."""
    if spec.name not in _DEPTHS:
        raise SpecError(
            f"{spec}: no small student {spec.name!r}{specs.nearest(spec.name, _DEPTHS)}; known are {', '.join(_DEPTHS)}"
        )
    for name, value in spec.only(("width", "stem_stride")).items():
        if type(value) is not int or value < 1:
            raise SpecError(f"{spec}: {name} must be a whole number above 0")
    return SmallStudent(spec)
