"""Where a training step's time goes.

load       waiting for the next batch (with loader processes: for them)
copy       moving it to the device and normalising it
forward    the student's logits
loss       both losses
backward   gradients
update     clipping, optimizer, averaged weights; in a team, the sum of gradients
other      validation, checkpoints, logging
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STEP_STAGES = ("load", "copy", "forward", "loss", "backward", "update", "other")


class StepTimes:
    """A clock of stages. On a GPU it waits for the device at each border, so that a stage's time is its own: the whole
    is slower than without it. Switched off it costs nothing.
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.seconds = dict.fromkeys(STEP_STAGES, 0.0)
        self.steps = 0
        self._device, self._on = device, on
        self._since, self._stage = time.monotonic(), "other"

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Count the body's time as `stage`; inside another stage, as this one alone."""
        if not self._on:
            yield
            return
        outer = self._stage
        self._change_to(stage)
        try:
            yield
        finally:
            self._change_to(outer)

    def table(self) -> list[tuple[str, float, float]]:
        """Stage, milliseconds a step, share of the whole."""
        self._change_to(self._stage)
        total = sum(self.seconds.values()) or 1.0
        return [
            (stage, 1000 * value / max(self.steps, 1), value / total) for stage, value in self.seconds.items() if value
        ]

    def _change_to(self, stage: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.monotonic()
        self.seconds[self._stage] += now - self._since
        self._since, self._stage = now, stage
