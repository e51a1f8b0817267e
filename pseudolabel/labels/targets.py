"""Soft labels read from a store, as a loss sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pseudolabel.interfaces import Encoding


@dataclass(frozen=True)
class StoredTargets:
    """Columns as tensors with one row a sample. Fits `interfaces.SoftTargets`.

    `tail` is how a sparse label is compared: `bucket`, all classes that it leaves out as one outcome; `uniform`, each
    of them with an even part of what is left.
    """

    encoding: Encoding
    columns: Mapping[str, Tensor]
    tail: str = "bucket"

    def __len__(self) -> int:
        return len(self.columns["pred"])

    @property
    def pred_B(self) -> Tensor:
        return self.columns["pred"].long()

    def log_probs(self, student_logits_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        wide_BC = student_logits_BC if student_logits_BC.dtype == torch.float64 else student_logits_BC.float()
        student_BC = torch.log_softmax(wide_BC / temperature, dim=-1)
        if self.tail == "uniform":
            return self.encoding.full_log_probs(self.columns, temperature, student_BC.shape[-1]), student_BC
        return self.encoding.log_probs(self.columns, student_BC, temperature)

    def read_as(self, tail: str) -> StoredTargets:
        """The same targets, compared in another way."""
        return replace(self, tail=tail)

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredTargets:
        """The same targets with every column changed: moved, pinned, sliced."""
        return replace(self, columns={name: change(column) for name, column in self.columns.items()})
