"""Students of a second's training, what they learn in it, and their tensors before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_teachers import make_hf
from torch import Tensor

from pseudolabel.checkpoint import ModelCard
from pseudolabel.settings import TrainSettings
from pseudolabel.students import parse_student
from pseudolabel.train import TrainResult, train
from pseudolabel.training.setup import preprocessing_of
from pseudolabel.training.starting import find_start, start_from

SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=2, batch_size=8, eval_every=1)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def settings_of(student: str, size: int = 32, channels: int = 3, **more: Any) -> TrainSettings:
    return SMALL.model_copy(update={"student": student, "image_size": size, "channels": channels, **more})


def train_labeled(corpus: Path, out: Path, settings: TrainSettings = SMALL, **more: Any) -> TrainResult:
    notes: list[str] = []
    return train(settings, out, labeled=corpus / "labeled", **{"threads": 1, "on_note": notes.append, **more})


def begin(
    student: str, classes: tuple[str, ...], size: int = 32, channels: int = 3, init_from: Path | None = None
) -> tuple[dict[str, Tensor], str, ModelCard]:
    """A student's tensors before the first step, and what is told of them."""
    settings = settings_of(student, size, channels)
    source = parse_student(student)
    start = find_start(source, len(classes), channels, init_from)
    assert start is not None
    card = ModelCard(student, classes, preprocessing_of(settings, start), source.config)
    torch.manual_seed(0)
    body = card.build()
    note = start_from(start, body, card)
    return body.state_dict(), note, card


def assert_equal_but(found: dict[str, Tensor], wanted: dict[str, Tensor], but: set[str]) -> None:
    assert found.keys() == wanted.keys()
    assert {name for name in found if not torch.equal(found[name], wanted[name])} == but


# Its name differs from the function's, so that a test that imports it can have a parameter of that name.
@pytest.fixture(name="hf_dir")
def small_hf_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    make_hf(directory)
    return directory
