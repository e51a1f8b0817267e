"""Optimizer, schedule and averaged weights from settings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pseudolabel.settings import TrainSettings

Tensors = tuple[Tensor, ...] | list[Tensor]


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum. Norm parameters and biases (one-dimensional tensors) are not decayed."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine to 0 at the last step."""
    warmup = round(settings.warmup_fraction * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and buffers; its decay warms up as (1 + n)/(10 + n), so short runs
    forget their start.
    """

    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, current)
            return
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - now)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
