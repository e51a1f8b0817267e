"""Losses over cached soft labels.

    L = (1−α)·CE(s, y) + α·T²·KL(softmax(z/T) ‖ softmax(s/T))

with student logits s, teacher logits z, labels y. CE is averaged over the labeled rows, KL summed over classes and
averaged over the rows with soft labels, each row times its weight. T² keeps the soft gradient's size when T changes
(Hinton, Vinyals, Dean 2015, arXiv:1503.02531, §2). Everything is computed in float32 or wider, whatever the autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Loss, SoftTargets

NO_LABEL = -1
"""In a batch's labels: this row has none."""


def kd(student_logits_BC: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) at temperature T, per row (B,). Over a sparse encoding the tail is one bucket."""
    teacher_BM, student_BM = targets.log_probs(student_logits_BC, temperature)
    gap_BM = torch.where(teacher_BM.isneginf(), 0.0, teacher_BM - student_BM)  # 0·log 0 = 0
    return temperature**2 * (teacher_BM.exp() * gap_BM).sum(dim=-1)


def hard(student_logits_BC: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """Cross-entropy with the teacher's class, per row (B,): plain pseudo-labels (Lee 2013). The temperature has no
    part in it.
    """
    return F.cross_entropy(_wide(student_logits_BC), targets.pred_B, reduction="none")


LOSSES: Mapping[str, Loss] = {"kd": kd, "hard": hard}


def parse_loss(name: str) -> Loss:
    """Raises `SpecError` for a name that isn't in the table."""
    if name not in LOSSES:
        raise SpecError(f"no loss {name!r}{specs.nearest(name, LOSSES)}; known are {', '.join(LOSSES)}")
    return LOSSES[name]


@dataclass(frozen=True)
class Mixture:
    """The combined loss of a batch: α weighs soft labels against labels. Raises `SpecError` for α outside [0, 1] or T
    ≤ 0.
    """

    alpha: float
    temperature: float
    loss: str = "kd"

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        check(self.alpha, self.temperature)

    def __call__(
        self,
        student_logits_BC: Tensor,
        labels_B: Tensor,
        targets: SoftTargets | None,
        soft_weight_B: Tensor | None = None,
        *,
        num_labeled: int | None = None,
        num_soft: int | None = None,
    ) -> Tensor:
        """Scalar L. Rows whose label is `NO_LABEL` take no part in CE. `targets` are the soft labels of the *last*
        rows of the batch, with weights.

        Without `targets` it is plain CE, whatever α. Where the rows are a share of a larger batch, `num_labeled` and
        `num_soft` count that batch's rows with a label and with a soft label: the shares' losses, and so their
        gradients, add up to the batch's.
        """
        student_logits_BC = _wide(student_logits_BC)
        ce = cross_entropy(student_logits_BC, labels_B, num_labeled)
        if targets is None:
            return ce
        assert soft_weight_B is not None
        first_soft = len(student_logits_BC) - len(soft_weight_B)
        soft_B = parse_loss(self.loss)(student_logits_BC[first_soft:], targets, self.temperature)
        soft = (soft_B * soft_weight_B).sum() / (len(soft_weight_B) if num_soft is None else num_soft)
        return (1 - self.alpha) * ce + self.alpha * soft


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, num_labeled: int | None = None) -> Tensor:
    """CE summed over the rows that have a label, divided by their number or by `num_labeled`; 0 if none has."""
    total = F.cross_entropy(logits_BC, labels_B, ignore_index=NO_LABEL, reduction="sum")
    if num_labeled is not None:
        return total / max(num_labeled, 1)
    return total / (labels_B != NO_LABEL).sum().clamp(min=1)


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
    targets = _FullTargets(_wide(teacher_logits_BC.detach()))
    student_logits_BC = _wide(student_logits_BC)
    ce = F.cross_entropy(student_logits_BC, labels_B)
    return (1 - alpha) * ce + alpha * kd(student_logits_BC, targets, temperature).mean()


def check(alpha: float, temperature: float) -> None:
    """Raises `SpecError` for α outside [0, 1] or T ≤ 0."""
    if not 0.0 <= alpha <= 1.0:
        raise SpecError(f"alpha is {alpha}; it must lie in [0, 1] (1 = soft labels only)")
    if not 0.0 < temperature < float("inf"):
        raise SpecError(f"temperature is {temperature}; it must be above 0")


@dataclass(frozen=True)
class _FullTargets:
    """Teacher logits at hand, not from a store."""

    logits_BC: Tensor

    @property
    def pred_B(self) -> Tensor:
        return self.logits_BC.argmax(dim=-1)

    def log_probs(self, student_logits_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return torch.log_softmax(self.logits_BC / temperature, -1), torch.log_softmax(
            student_logits_BC / temperature, -1
        )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
