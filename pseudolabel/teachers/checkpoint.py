"""`checkpoint:RUN`: a model that `pseudolabel train` or `run` left in a run directory; the student as the next
teacher. `?trust_code=true` is wanted for a model whose student is `python:…`: building it calls that function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pseudolabel.checkpoint import load_model
from pseudolabel.classifier import Classifier
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec


@dataclass(frozen=True)
class CheckpointTeacher:
    """A run directory; its model.json says all that is needed."""

    run: str
    trust_code: bool = False

    @property
    def uri(self) -> str:
        return str(Spec("checkpoint", self.run))

    def load(self, device: torch.device) -> Classifier:
        return load_model(self.run, device, trust_code=self.trust_code)


def make(spec: Spec) -> CheckpointTeacher:
    """Describe it. Raises `SpecError`."""
    trust_code = spec.only(("trust_code",)).get("trust_code", False)
    if not isinstance(trust_code, bool):
        raise SpecError(f"{spec}: trust_code is {trust_code!r}; write true or false")
    return CheckpointTeacher(spec.name, trust_code)
