"""`checkpoint:RUN`: a model that `pseudolabel train` or `run` left in a run directory; the student as the next
teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pseudolabel.checkpoint import load_model
from pseudolabel.classifier import Classifier
from pseudolabel.specs import Spec


@dataclass(frozen=True)
class CheckpointTeacher:
    """A run directory; its model.json says all that is needed."""

    run: str

    @property
    def uri(self) -> str:
        return f"checkpoint:{self.run}"

    def load(self, device: torch.device) -> Classifier:
        return load_model(Path(self.run), device)


def make(spec: Spec) -> CheckpointTeacher:
    spec.only(())
    return CheckpointTeacher(spec.name)
