"""What views are tested on: images of odd sizes, a teacher that projects their pixels, stores of what it says."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import image_bytes
from torch import Tensor

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.store import Store, open_store
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import read_samples
from pseudolabel.teachers import parse_teachers
from pseudolabel.views.image import image_field

CPU = torch.device("cpu")
SCALE = (0.25, 1.0)
SIZES = [(1, 1), (1, 5000), (5000, 3), (23, 37), (28, 28)]
THREE = AnnotateSettings(precision="fp32", views=3, view_seed=7, view_policy="randaugment:2+erase", batch_size=7)

# A real model whose logits are a fixed random projection of all pixels: other pixels, other logits.
PROJECTION = """
import torch
class Projection(torch.nn.Module):
    classes = ("a", "b", "c", "d", "e")
    def __init__(self, channels, size):
        super().__init__()
        self.preprocessing = dict(resize=size + 2, crop=size, mean=[0.4] * channels, std=[0.2] * channels)
        weight = torch.randn(5, channels * size * size, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(weight / size)
    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).sum(-1)  # row by row: the batch doesn't show
def make(channels="3", size="10"):
    return Projection(int(channels), int(size))
"""


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0, kind: str = "PNG") -> bytes:
    return image_bytes(seed, (width, height), mode, kind)


def pixels_of(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def label(shards: list[Shard], out: Path, spec: str, settings: AnnotateSettings = THREE, workers: int = 1) -> Store:
    annotate(
        shards,
        parse_teachers([spec]),
        out,
        engine=LocalEngine("cpu", workers),
        settings=settings,
        max_reject_fraction=1.0,
    )
    return open_store(out)


def images_of(shard: Shard) -> dict[str, bytes]:
    return {sample.key: sample.fields[image_field(sample.fields)] for sample in read_samples(shard)}
