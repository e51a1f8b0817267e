"""Several teachers as one: the weighted mean of their log-probabilities.

Σ wᵢ·log pᵢ is a geometric mean (a product of experts): a class must convince every member, so one overconfident
member can't carry it alone, as it can in a mean of probabilities. A mean of logits differs from it by one constant a
row, so it gives the same soft labels at every temperature; log-probabilities are averaged because they put all
members on one scale before float16 storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import LoadedTeacher, Teacher


@dataclass(frozen=True)
class Ensemble:
    """Members and their weights, which sum to 1."""

    members: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @property
    def uri(self) -> str:
        return " + ".join(f"{member.uri}@{weight:g}" for member, weight in zip(self.members, self.weights, strict=True))

    def load(self, device: torch.device) -> LoadedTeacher:
        loaded = [member.load(device) for member in self.members]
        for member, model in zip(self.members[1:], loaded[1:], strict=True):
            if len(model.classes) != len(loaded[0].classes):
                raise SpecError(
                    f"an ensemble needs one label space: {self.members[0].uri} has "
                    f"{len(loaded[0].classes)} classes, {member.uri} has {len(model.classes)}"
                )
            if _named(model) and _named(loaded[0]) and model.classes != loaded[0].classes:
                where = next(i for i, (a, b) in enumerate(zip(loaded[0].classes, model.classes, strict=True)) if a != b)
                raise SpecError(
                    f"an ensemble needs one label space: class {where} is "
                    f"{loaded[0].classes[where]!r} in {self.members[0].uri} "
                    f"and {model.classes[where]!r} in {member.uri}"
                )
        return LoadedEnsemble(tuple(loaded), self.weights)


@dataclass(frozen=True)
class LoadedEnsemble:
    """Members on one device; each prepares its own input from the same decoded image."""

    members: tuple[LoadedTeacher, ...]
    weights: tuple[float, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return next((member.classes for member in self.members if _named(member)), self.members[0].classes)

    @property
    def identity(self) -> Mapping[str, Any]:
        parts = [
            {**member.identity, "weight": weight} for member, weight in zip(self.members, self.weights, strict=True)
        ]
        return {"ensemble": "mean of log-probabilities", "members": parts}

    def prepare(self, image_CHW: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for member in self.members for tensor in member.prepare(image_CHW))

    def member_logits(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Each member's log-probabilities, float32 of shape (B, C), in the order of `members`."""
        assert len(inputs) == len(self.members)
        return tuple(
            torch.log_softmax(member.logits((one,)), dim=-1) for member, one in zip(self.members, inputs, strict=True)
        )

    def logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        log_probs = self.member_logits(inputs)
        return torch.stack([weight * each for weight, each in zip(self.weights, log_probs, strict=True)]).sum(0)


def _named(model: LoadedTeacher) -> bool:
    return model.classes != tuple(str(index) for index in range(len(model.classes)))
