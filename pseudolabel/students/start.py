"""Weights that a student starts from instead of random ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pseudolabel.classifier import state_sha256

Norm = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of each channel, of pixels in [0, 1]


@dataclass(frozen=True)
class Start:
    """Tensors by the student's own names.

    `norm` is how the images were normalised that they were trained on, where that is known: the student must see its
    own so. `classes` are what its head tells apart, if they have names. `advice` is what to do where they don't fit.
    """

    source: str
    state: Mapping[str, Tensor]
    norm: Norm | None = None
    classes: tuple[str, ...] | None = None
    advice: str = "name the architecture that they were saved from"

    def fingerprint(self) -> str:
        """Of all that decides what is learned from here, wherever the weights lie."""
        facts = [state_sha256(self.state), self.classes, self.norm]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def norm_for(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> Norm:
    """For grey images of a model that saw colours: the mean of its channels."""
    if channels == len(mean):
        return mean, std
    return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
