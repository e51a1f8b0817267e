"""`python:module:function?arg=value`: your own student. The function is called with num_classes, in_channels and the
arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pseudolabel.entrypoint import call_entry_point
from pseudolabel.specs import Spec


@dataclass(frozen=True)
class PythonStudent:
    """A function that makes the model."""

    spec: Spec
    config: None = None

    def build(self, num_classes: int, channels: int) -> nn.Module:
        return call_entry_point(self.spec, num_classes=num_classes, in_channels=channels)

    def start(self, num_classes: int, channels: int) -> None:
        """The function may start from what it likes; none of it is known here."""


def make(spec: Spec, config: object = None) -> PythonStudent:
    return PythonStudent(spec)
