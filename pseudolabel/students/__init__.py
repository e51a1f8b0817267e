"""Where students come from: the scheme table. To add a source, write `students/x.py` with `make(spec, config)` and its
line here.

`build` gives the bare architecture with random weights and reads none, so that a finished model can be built again
without those it once started from; `start` reads them, if the spec names some.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.students.start import Start

SCHEMES = {
    "small": "pseudolabel.students.small",
    "torchvision": "pseudolabel.students.torchvision",
    "timm": "pseudolabel.students.timm",
    "hf": "pseudolabel.students.huggingface",
    "python": "pseudolabel.students.python",
}


class Student(Protocol):
    """An architecture, and perhaps weights to start from. Methods raise `SpecError`."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """What the spec leaves to a file elsewhere, as JSON; model.json keeps it. None if the spec says all."""

    def build(self, num_classes: int, channels: int) -> nn.Module:
        """Untrained: normalised images (B, channels, H, W) → logits (B, num_classes)."""

    def start(self, num_classes: int, channels: int) -> Start | None:
        """The weights that the spec names, if it does."""


def parse_student(uri: str, config: Mapping[str, Any] | None = None) -> Student:
    """Describe a student from its URI, and the `config` that a model.json holds of it. Raises `SpecError`: unknown
    source, name or argument.
    """
    spec = specs.parse(uri)
    if spec.scheme not in SCHEMES:
        hint = specs.nearest(spec.scheme, SCHEMES)
        raise SpecError(f"{uri}: unknown student source {spec.scheme!r}{hint}; known are {', '.join(SCHEMES)}")
    student: Student = importlib.import_module(SCHEMES[spec.scheme]).make(spec, config)
    return student


def build_student(uri: str, *, num_classes: int, channels: int, config: Mapping[str, Any] | None = None) -> nn.Module:
    """Build an untrained student: normalised images (B, channels, H, W) → logits (B, num_classes). Raises
    `SpecError`.
    """
    return parse_student(uri, config).build(num_classes, channels)
