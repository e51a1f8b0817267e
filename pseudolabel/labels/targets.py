"""Soft labels read from a store, as a loss sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pseudolabel.interfaces import Encoding


class Calibrated(Protocol):
    """A map of the teacher's logits: a `calibration.Calibration`."""

    @property
    def temperature(self) -> float: ...

    @property
    def is_temperature(self) -> bool:
        """Whether dividing by `temperature` is all it does."""
        ...

    def log_probs(
        self, encoding: Encoding, columns: Mapping[str, Tensor], num_classes: int, temperature: float = 1.0
    ) -> Tensor:
        """Log-probabilities of all classes (B, C) after the map, at a temperature."""
        ...


@dataclass(frozen=True)
class StoredTargets:
    """Columns as tensors with one row a sample. Fits `interfaces.SoftTargets`.

    `tail` is how a sparse label is compared: `bucket`, all classes that it leaves out as one outcome; `uniform`, each
    of them with an even part of what is left. A `calibration` maps the teacher's logits before.
    """

    encoding: Encoding
    columns: Mapping[str, Tensor]
    tail: str = "bucket"
    calibration: Calibrated | None = None

    def __len__(self) -> int:
        return len(self.columns["pred"])

    def pred(self, num_classes: int) -> Tensor:
        if self.calibration is None or self.calibration.is_temperature:
            return self.columns["pred"].long()
        return self.all_log_probs(1.0, num_classes).argmax(dim=-1)

    def confidence(self, num_classes: int) -> Tensor:
        if self.calibration is None:
            return self.columns["confidence"]
        return self.all_log_probs(1.0, num_classes).amax(dim=-1).exp()

    def log_probs(
        self, student_logits_BC: Tensor, temperature: float, *, student_temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        wide_BC = student_logits_BC if student_logits_BC.dtype == torch.float64 else student_logits_BC.float()
        student_BC = torch.log_softmax(wide_BC / (student_temperature or temperature), dim=-1)
        mapped = self.calibration
        if self.tail == "uniform" or (mapped is not None and not mapped.is_temperature):
            return self.all_log_probs(temperature, student_BC.shape[-1]), student_BC
        if mapped is not None:
            temperature *= mapped.temperature
        return self.encoding.log_probs(self.columns, student_BC, temperature)

    def all_log_probs(self, temperature: float, num_classes: int) -> Tensor:
        if self.calibration is None:
            return self.encoding.full_log_probs(self.columns, temperature, num_classes)
        return self.calibration.log_probs(self.encoding, self.columns, num_classes, temperature)

    def read_as(self, tail: str, calibration: Calibrated | None = None) -> StoredTargets:
        """The same targets, compared in another way."""
        return replace(self, tail=tail, calibration=calibration)

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredTargets:
        """The same targets with every column changed: moved, pinned, sliced."""
        return replace(self, columns={name: change(column) for name, column in self.columns.items()})
