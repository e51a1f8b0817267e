"""Logit standardisation: both sides' logits as z-scores (Sun et al. 2024, arXiv:2403.01733, alg. 1).

The student is then free in the size of its logits, and only their shape over the classes is compared. Needs all of the
teacher's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pseudolabel.interfaces import SoftTargets
from pseudolabel.losses.divergences import wide

_LEAST = 1e-7  # of a standard deviation: a row of equal logits stays one of zeros, and has a gradient


@dataclass(frozen=True)
class Standardized:
    """Soft targets whose logits and whose student's are z-scores. Fits `interfaces.SoftTargets`."""

    targets: SoftTargets

    def pred(self, num_classes: int) -> Tensor:
        return self.targets.pred(num_classes)

    def confidence(self, num_classes: int) -> Tensor:
        return self.targets.confidence(num_classes)

    def log_probs(
        self, student_logits_BC: Tensor, temperature: float, *, student_temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        student_BC = z_scores(wide(student_logits_BC)) / (student_temperature or temperature)
        return self.all_log_probs(temperature, student_BC.shape[-1]), torch.log_softmax(student_BC, dim=-1)

    def all_log_probs(self, temperature: float, num_classes: int) -> Tensor:
        teacher_BC = z_scores(self.targets.all_log_probs(1.0, num_classes))  # logits but for a constant a row
        return torch.log_softmax(teacher_BC / temperature, dim=-1)


def z_scores(logits_BC: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1 (that of a sample, as in the paper's code)."""
    centred_BC = logits_BC - logits_BC.mean(dim=-1, keepdim=True)
    return centred_BC / (centred_BC.square().sum(-1, keepdim=True) / (centred_BC.shape[-1] - 1) + _LEAST**2).sqrt()
