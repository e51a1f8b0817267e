"""Labels that are unevenly spread or not all right: what the cross-entropy with them is to make of it.

class weights     balanced: N / (C·n_c); effective:B: (1 − B) / (1 − B^n_c) (class-balanced loss, Cui et al. 2019,
                  arXiv:1901.05555, eq. 5); or a number a class. Always scaled so that a labeled row weighs 1 on average
logit adjustment  τ·log of the labels' shares, added to the logits in training only (Menon et al. 2021,
                  arXiv:2007.07314): the student then favours no class for being frequent
smoothing         see `losses.LabelLoss`
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pseudolabel.errors import LabelError, SpecError
from pseudolabel.losses import LabelLoss
from pseudolabel.settings import TrainSettings


def label_loss(settings: TrainSettings, count_C: NDArray[np.int64]) -> LabelLoss:
    """The loss of labels of which there are so many of each class. Drawn evenly, they are as many.

    Raises:
        SpecError: class weights that are none, or too few.
        LabelError: a class without labels that is to be adjusted for.
    """
    if settings.label_sampling == "balanced":
        count_C = np.minimum(count_C, 1)
    weight_C = _weights(settings.class_weights, count_C) if count_C.sum() else None
    adjustment_C = None
    if settings.logit_adjustment:
        if not count_C.all():
            missing = np.flatnonzero(count_C == 0)
            raise LabelError(
                f"--logit-adjustment: {len(missing)} of {len(count_C)} classes, such as class {missing[0]}, have no "
                "labeled row, so their share is 0 and its logarithm nothing to adjust by; label some, or leave it out"
            )
        adjustment_C = torch.from_numpy(settings.logit_adjustment * np.log(count_C / count_C.sum()))
    return LabelLoss(
        settings.label_smoothing, torch.from_numpy(weight_C) if weight_C is not None else None, adjustment_C
    )


def _weights(spec: str, count_C: NDArray[np.int64]) -> NDArray[np.float64] | None:
    if spec == "none":
        return None
    kind, _, number = spec.partition(":")
    present_C = np.maximum(count_C, 1)
    if spec == "balanced":
        weight_C = 1.0 / present_C
    elif kind == "effective":
        beta, *more = _numbers(spec, number)
        if more or not 0 <= beta < 1:
            raise SpecError(f"--class-weights {spec}: write a number from 0 to below 1, such as effective:0.999")
        weight_C = (1 - beta) / (1 - beta**present_C)
    else:
        weight_C = _numbers(spec, spec)
        if len(weight_C) != len(count_C):
            raise SpecError(f"--class-weights: {len(weight_C)} numbers for {len(count_C)} classes; give one a class")
    total = float((weight_C * count_C).sum())
    if total <= 0:
        raise SpecError(f"--class-weights {spec}: all labeled rows would weigh nothing")
    return weight_C * float(count_C.sum()) / total


def _numbers(spec: str, text: str) -> NDArray[np.float64]:
    try:
        found = np.array([float(part) for part in text.split(",")])
    except ValueError as error:
        raise SpecError(
            f"--class-weights {spec}: write none, balanced, effective:0.999, or a number for each class such as 1,2,0.5"
        ) from error
    if not all(math.isfinite(value) and value >= 0 for value in found):
        raise SpecError(f"--class-weights {spec}: weights are numbers from 0")
    return found
