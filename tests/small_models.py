"""Grey images, models of named classes, a student without batch norms, and what a loaded teacher says of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.views.image import square

CPU = torch.device("cpu")


def grey(seed: int = 0, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def logits_of(teacher: Any, *images: Tensor) -> Tensor:
    """What a loaded teacher says of a batch of images."""
    columns = zip(*(teacher.prepare(image) for image in images), strict=True)
    with torch.inference_mode():
        logits: Tensor = teacher.logits(tuple(torch.stack(column) for column in columns))
    return logits


def named_model(directory: Path, names: tuple[str, ...], seed: int = 0, size: int = 12, channels: int = 1) -> str:
    torch.manual_seed(seed)
    card = ModelCard("small:resnet8?width=4", names, square(size, channels))
    save_model(directory, card, card.build())
    return f"checkpoint:{directory}"


def grouped(num_classes: int, in_channels: int) -> nn.Module:
    """A student for 12×12 pixels, `python:small_models:grouped`: a row's logits depend on no other row."""
    first = (nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False), nn.GroupNorm(2, 8), nn.ReLU())
    second = (nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 9, num_classes))
