"""Losses that compare a row's probabilities, or its logits, with the teacher's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pseudolabel.interfaces import LossNeeds, SoftTargets


@dataclass(frozen=True)
class KD:
    """T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015). Over a sparse encoding the tail is one bucket."""

    needs: ClassVar[LossNeeds] = LossNeeds(draws=True, standardizes=True)

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        teacher_BM, student_BM = targets.log_probs(student_logits_BC, temperature)
        return temperature**2 * divergence(teacher_BM, student_BM)


@dataclass(frozen=True)
class Hard:
    """Cross-entropy with the teacher's class (Lee 2013), for rows whose confidence reaches `threshold`; others count as
    0 (FixMatch, Sohn et al. 2020, arXiv:2001.07685). The temperature has no part in it.
    """

    threshold: float = 0.0
    needs: ClassVar[LossNeeds] = LossNeeds(draws=True, temperature=False)

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        num_classes = student_logits_BC.shape[-1]
        loss_B = F.cross_entropy(wide(student_logits_BC), targets.pred(num_classes), reduction="none")
        return loss_B if self.threshold == 0 else loss_B * (targets.confidence(num_classes) >= self.threshold)


@dataclass(frozen=True)
class JSD:
    """T² times the generalised Jensen-Shannon divergence β·KL(p ‖ m) + (1−β)·KL(q ‖ m), m = β·p + (1−β)·q, of teacher p
    and student q (Agarwal et al. 2024, arXiv:2306.13649, eq. 1).
    """

    beta: float = 0.5
    needs: ClassVar[LossNeeds] = LossNeeds(standardizes=True)

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        teacher_BM, student_BM = targets.log_probs(student_logits_BC, temperature)
        mean_BM = torch.logaddexp(teacher_BM + math.log(self.beta), student_BM + math.log1p(-self.beta))
        of_teacher_B, of_student_B = divergence(teacher_BM, mean_BM), divergence(student_BM, mean_BM)
        return temperature**2 * (self.beta * of_teacher_B + (1 - self.beta) * of_student_B)


@dataclass(frozen=True)
class WTTM:
    """Weighted transformed teacher matching (Zheng, Yang 2024, arXiv:2402.11148, eq. 15): U·KL(p_T ‖ q), the teacher at
    temperature T, the student at 1, a row's weight U = Σ p^(1/T) the larger the smoother its label. Weighted or not
    (TTM), its gradient doesn't shrink with T, so there is no T².
    """

    weighted: bool = True
    needs: ClassVar[LossNeeds] = LossNeeds()

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        teacher_BM, student_BM = targets.log_probs(student_logits_BC, temperature, student_temperature=1.0)
        loss_B = divergence(teacher_BM, student_BM)
        if not self.weighted:
            return loss_B
        # With p = softmax(z): log Σ p^(1/T) = lse(z/T) − lse(z)/T, which any class's two probabilities give.
        num_classes = student_logits_BC.shape[-1]
        at_1_B, at_T_B = (
            targets.all_log_probs(one, num_classes).gather(-1, targets.pred(num_classes)[:, None])[:, 0]
            for one in (1.0, temperature)
        )
        return loss_B * (at_1_B / temperature - at_T_B).exp()


@dataclass(frozen=True)
class MSE:
    """The mean over classes of squared differences of logits, each row's mean subtracted from both (Ba, Caruana 2014,
    arXiv:1312.6184; Kim et al. 2021, arXiv:2105.08919). Twice the limit of `kd` for T → ∞; the temperature has no part
    in it.
    """

    needs: ClassVar[LossNeeds] = LossNeeds(outcomes="logits", temperature=False)

    def __call__(
        self, student_logits_BC: Tensor, targets: SoftTargets, temperature: float, labels_B: Tensor | None = None
    ) -> Tensor:
        student_BC = wide(student_logits_BC)
        teacher_BC = targets.all_log_probs(1.0, student_BC.shape[-1])
        gap_BC = (student_BC - student_BC.mean(-1, keepdim=True)) - (teacher_BC - teacher_BC.mean(-1, keepdim=True))
        return gap_BC.square().mean(dim=-1)


def divergence(log_p_BM: Tensor, log_q_BM: Tensor) -> Tensor:
    """KL(p ‖ q) per row (B,), in nats, from log-probabilities."""
    nothing_BM = log_p_BM.isneginf()  # 0·log 0 = 0, and no gradient through it
    gap_BM = log_p_BM.masked_fill(nothing_BM, 0.0) - log_q_BM.masked_fill(nothing_BM, 0.0)
    return (log_p_BM.exp() * gap_BM).sum(dim=-1)


def wide(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return logits if logits.dtype == torch.float64 else logits.float()


kd = KD()
hard = Hard()
