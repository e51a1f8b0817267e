"""Students: small models by spec.

`torchvision:NAME?arg=value`, `python:module:function?arg=value` (called with num_classes, in_channels and the
arguments) and our own family for images of 28 to 64 pixels: `small:resnet8?width=16`, also resnet14 and resnet20, the
ResNets of He et al. (2015, arXiv:1512.03385, §4.2) with option-B shortcuts and three stages of width, 2·width and
4·width; `stem_stride=2` halves the resolution first, at a quarter of the cost.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pseudolabel import specs
from pseudolabel.entrypoint import call_entry_point
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec

SCHEMES = ("small", "torchvision", "python")
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


def build_student(uri: str, *, num_classes: int, channels: int) -> nn.Module:
    """Build an untrained student: normalised images (B, channels, H, W) → logits (B, num_classes).

    Raises:
        SpecError: unknown source, name or argument.
    """
    spec = specs.parse(uri)
    if spec.scheme == "small":
        return _small(spec, num_classes, channels)
    if spec.scheme == "torchvision":
        return _torchvision(spec, num_classes, channels)
    if spec.scheme == "python":
        return call_entry_point(spec, num_classes=num_classes, in_channels=channels)
    raise SpecError(
        f"{uri}: unknown student source {spec.scheme!r}{specs.nearest(spec.scheme, SCHEMES)}; known "
        f"are {', '.join(SCHEMES)}"
    )


def _small(spec: Spec, num_classes: int, channels: int) -> nn.Module:
    if spec.name not in _DEPTHS:
        raise SpecError(
            f"{spec}: no small student {spec.name!r}{specs.nearest(spec.name, _DEPTHS)}; known are {', '.join(_DEPTHS)}"
        )
    args = spec.only(("width", "stem_stride"))
    for name, value in args.items():
        if type(value) is not int or value < 1:
            raise SpecError(f"{spec}: {name} must be a whole number above 0")
    return SmallResNet(_DEPTHS[spec.name], num_classes=num_classes, channels=channels, **args)


def _torchvision(spec: Spec, num_classes: int, channels: int) -> nn.Module:
    import torchvision.models
    from torchvision.models import get_model, list_models

    known = list_models(module=torchvision.models)
    if spec.name not in known:
        raise SpecError(f"{spec}: torchvision has no classifier {spec.name!r}{specs.nearest(spec.name, known)}")
    if channels != 3:
        raise SpecError(f"{spec}: torchvision's models take 3 channels; use --channels 3 (grey images are repeated)")
    if "weights" in dict(spec.args):
        raise SpecError(f"{spec}: a student starts untrained; leave weights= out")
    options: dict[str, Any] = {"weights": None, **dict(spec.args)}
    if spec.name in ("googlenet", "inception_v3"):  # in training, their auxiliary heads make them return tuples
        options = {"aux_logits": False, "init_weights": True, **options}
    try:
        model: nn.Module = get_model(spec.name, num_classes=num_classes, **options)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise SpecError(f"{spec}: {error}") from error
    return model
