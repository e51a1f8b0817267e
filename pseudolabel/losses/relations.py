"""A loss that compares relations instead of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from pseudolabel.interfaces import LossNeeds, SoftTargets

_LEAST = 1e-8  # of a norm, as in the paper's code: a row or class without any spread correlates with nothing


@dataclass(frozen=True)
class DIST:
    """T²·(β·(1 − Pearson's correlation of a row's probabilities) + γ·(1 − that of a class's over the batch, averaged
    over classes)) (Huang et al. 2022, arXiv:2205.10536, eqs. 6 to 8).

    The batch is what one process computes at once: its share of a team's, and of accumulated steps one. In the second
    term all its rows count alike, whatever they weigh. Where a student's probabilities are all but constant, as of a
    head that begins at 0, gradients are as large as their spread is small: clip them.
    """

    beta: float = 1.0
    gamma: float = 1.0
    needs: ClassVar[LossNeeds] = LossNeeds(outcomes="logits")

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        teacher_BC, student_BC = (one.exp() for one in targets.log_probs(student_logits_BC, temperature))
        of_rows_B = 1 - _correlation(teacher_BC, student_BC, dim=1)
        of_classes_C = 1 - _correlation(teacher_BC, student_BC, dim=0)
        return temperature**2 * (self.beta * of_rows_B + self.gamma * of_classes_C.mean())


def _correlation(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Pearson's, along `dim`."""
    one, other = one - one.mean(dim, keepdim=True), other - other.mean(dim, keepdim=True)
    return F.cosine_similarity(one, other, dim=dim, eps=_LEAST)
