"""Losses that part a row's target class from the others.

The target is the row's label. Unlabeled rows have none, and taking the teacher's class in its place is another loss
(where the teacher errs, it parts the wrong class), so it must be asked for: `?target=teacher`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pseudolabel.interfaces import LossNeeds, SoftTargets
from pseudolabel.losses.divergences import divergence

Target = Literal["label", "teacher"]


@dataclass(frozen=True)
class DKD:
    """Decoupled knowledge distillation (Zhao et al. 2022, arXiv:2203.08679, eq. 7): T²·(α·TCKD + β·NCKD), the first the
    KL of target against all others, the second the KL over the others alone, each renormalised. The paper's β goes from
    0.5 (ImageNet) to 8 (CIFAR-100), warmed up over 20 epochs; 8 from the first step on is more than most students bear.
    """

    alpha: float = 1.0
    beta: float = 2.0
    target: Target = "label"
    needs: ClassVar[LossNeeds] = LossNeeds(classes=3, outcomes="classes", target=True, standardizes=True)

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        target_B = _target(self.target, targets, labels_B, student_logits_BC.shape[-1])
        teacher, student = (_Parted.of(one, target_B) for one in targets.log_probs(student_logits_BC, temperature))
        tckd_B = divergence(teacher.binary(), student.binary())
        nckd_B = divergence(teacher.others_BC, student.others_BC)
        return temperature**2 * (self.alpha * tckd_B + self.beta * nckd_B)


@dataclass(frozen=True)
class NKD:
    """Normalized knowledge distillation (Yang et al. 2023, arXiv:2303.13005, eq. 7): −p_t·log q_t at temperature 1, and
    γ·T² times the cross-entropy over the other classes alone, renormalised, at temperature T.
    """

    gamma: float = 1.5
    target: Target = "label"
    needs: ClassVar[LossNeeds] = LossNeeds(classes=3, outcomes="classes", target=True)

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        target_B = _target(self.target, targets, labels_B, student_logits_BC.shape[-1])
        at_1_B1, student_1_B1 = (one.gather(-1, target_B[:, None]) for one in targets.log_probs(student_logits_BC, 1.0))
        teacher, student = (_Parted.of(one, target_B) for one in targets.log_probs(student_logits_BC, temperature))
        others_BC = teacher.others_BC.exp() * student.others_BC.masked_fill(student.others_BC.isneginf(), 0.0)
        return -(at_1_B1.exp() * student_1_B1)[:, 0] - self.gamma * temperature**2 * others_BC.sum(dim=-1)


@dataclass(frozen=True)
class _Parted:
    """Log-probabilities of the target, of all others together, and of each other among them (−∞ at the target)."""

    target_B: Tensor
    rest_B: Tensor
    others_BC: Tensor

    @classmethod
    def of(cls, log_probs_BC: Tensor, target_B: Tensor) -> _Parted:
        others_BC = log_probs_BC.scatter(-1, target_B[:, None], float("-inf"))
        rest_B = torch.logsumexp(others_BC, dim=-1)
        return cls(log_probs_BC.gather(-1, target_B[:, None])[:, 0], rest_B, others_BC - rest_B[:, None])

    def binary(self) -> Tensor:
        return torch.stack([self.target_B, self.rest_B], dim=-1)


def _target(kind: Target, targets: SoftTargets, labels_B: Tensor | None, num_classes: int) -> Tensor:
    """The class that is parted from the others; which rows have a label is checked before training (`check_loss`)."""
    if kind == "teacher":
        return targets.pred(num_classes)
    assert labels_B is not None
    return labels_B
