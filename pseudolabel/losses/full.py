"""The loss where the teacher's logits are at hand, not in a store."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.losses.divergences import kd, wide
from pseudolabel.losses.mixture import check


@dataclass(frozen=True)
class FullTargets:
    """Logits (B, C) as soft targets. Fits `interfaces.SoftTargets`."""

    logits_BC: Tensor

    def pred(self, num_classes: int) -> Tensor:
        return self.logits_BC.argmax(dim=-1)

    def confidence(self, num_classes: int) -> Tensor:
        return torch.softmax(wide(self.logits_BC), dim=-1).amax(dim=-1)

    def log_probs(
        self, student_logits_BC: Tensor, temperature: float, *, student_temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        student_BC = torch.log_softmax(wide(student_logits_BC) / (student_temperature or temperature), dim=-1)
        return self.all_log_probs(temperature, student_BC.shape[-1]), student_BC

    def all_log_probs(self, temperature: float, num_classes: int) -> Tensor:
        return torch.log_softmax(wide(self.logits_BC) / temperature, dim=-1)


def kd_loss(
    student_logits_BC: Tensor, teacher_logits_BC: Tensor, labels_B: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """The scalar L over rows that all have a label and full teacher logits. No gradient reaches the teacher's logits.

    Raises:
        ValueError: shapes differ, α outside [0, 1], T ≤ 0.
    """
    if student_logits_BC.shape != teacher_logits_BC.shape or labels_B.shape != student_logits_BC.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (student_logits_BC, teacher_logits_BC, labels_B)]
        raise ValueError(f"student logits, teacher logits and labels have shapes {shapes}; wanted (B, C), (B, C), (B,)")
    try:
        check(alpha, temperature)
    except SpecError as error:
        raise ValueError(str(error)) from error
    student_logits_BC = wide(student_logits_BC)
    ce = F.cross_entropy(student_logits_BC, labels_B)
    soft = kd(student_logits_BC, FullTargets(teacher_logits_BC.detach()), temperature).mean()
    return (1 - alpha) * ce + alpha * soft
