"""The combined loss of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Loss, SoftTargets
from pseudolabel.losses.choice import parse_loss
from pseudolabel.losses.divergences import wide
from pseudolabel.losses.standardize import Standardized

NO_LABEL = -1
"""In a batch's labels: this row has none."""


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy with the labels. `smoothing` moves so much of a label's probability evenly to all classes (Szegedy
    et al. 2016, arXiv:1512.00567, §7); `weight_C` multiplies the rows of a class; `adjustment_C` is added to the logits
    (τ times the log of the labels' shares: logit adjustment, Menon et al. 2021, arXiv:2007.07314, eq. 10).
    """

    smoothing: float = 0.0
    weight_C: Tensor | None = None
    adjustment_C: Tensor | None = None

    def __call__(self, logits_BC: Tensor, labels_B: Tensor, num_labeled: int | None = None) -> Tensor:
        """Summed over the rows that have a label, divided by their number or by `num_labeled`; 0 if none has."""
        if self.adjustment_C is not None:
            logits_BC = logits_BC + self.adjustment_C.to(logits_BC)
        loss_B = F.cross_entropy(
            logits_BC, labels_B, ignore_index=NO_LABEL, reduction="none", label_smoothing=self.smoothing
        )
        if self.weight_C is not None:  # torch's own weights would also multiply what smoothing gives the other classes
            loss_B = loss_B * self.weight_C.to(loss_B)[labels_B.clamp(min=0)]
        total = loss_B.sum()
        if num_labeled is not None:
            return total / max(num_labeled, 1)
        return total / (labels_B != NO_LABEL).sum().clamp(min=1)


class Losses(NamedTuple):
    """The combined loss L of a batch, and the two that it is made of."""

    total: Tensor
    of_labels: Tensor
    of_soft: Tensor


@dataclass(frozen=True)
class Mixture:
    """The combined loss of a batch: α weighs soft labels against labels. Raises `SpecError` for α outside [0, 1] or T
    ≤ 0, and for a loss that isn't one.
    """

    alpha: float
    temperature: float
    loss: str = "kd"
    standardize: bool = False
    of_labels: LabelLoss = field(default_factory=LabelLoss)

    def __post_init__(self) -> None:
        check(self.alpha, self.temperature)
        self.of_soft  # noqa: B018 (raises for a spec that is none)

    @cached_property
    def of_soft(self) -> Loss:
        return parse_loss(self.loss)

    def __call__(
        self,
        student_logits_BC: Tensor,
        labels_B: Tensor,
        targets: SoftTargets | None,
        soft_weight_B: Tensor | None = None,
        *,
        num_labeled: int | None = None,
        num_soft: int | None = None,
    ) -> Losses:
        """Scalars. Rows whose label is `NO_LABEL` take no part in CE. `targets` are the soft labels of the *last* rows
        of the batch, with weights.

        Without `targets` L is plain CE, whatever α. Where the rows are a share of a larger batch, `num_labeled` and
        `num_soft` count that batch's rows with a label and with a soft label: the shares' losses, and so their
        gradients, add up to the batch's.
        """
        student_logits_BC = wide(student_logits_BC)
        ce = self.of_labels(student_logits_BC, labels_B, num_labeled)
        if targets is None:
            return Losses(ce, ce, torch.zeros_like(ce))
        assert soft_weight_B is not None
        first = len(student_logits_BC) - len(soft_weight_B)
        targets = Standardized(targets) if self.standardize else targets
        soft_B = self.of_soft(student_logits_BC[first:], targets, self.temperature, labels_B[first:])
        soft = (soft_B * soft_weight_B).sum() / (len(soft_weight_B) if num_soft is None else num_soft)
        return Losses((1 - self.alpha) * ce + self.alpha * soft, ce, soft)


def check(alpha: float, temperature: float) -> None:
    """Raises `SpecError` for α outside [0, 1] or T ≤ 0."""
    if not 0.0 <= alpha <= 1.0:
        raise SpecError(f"alpha is {alpha}; it must lie in [0, 1] (1 = soft labels only)")
    if not 0.0 < temperature < float("inf"):
        raise SpecError(f"temperature is {temperature}; it must be above 0")
