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

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from pseudolabel.stages import Stages

STEP_STAGES = ("load", "copy", "forward", "loss", "backward", "update", "other")


class StepTimes:
    """A clock of a step's stages. On a GPU it waits for the device at each border, so that a stage's time is its own:
    the whole is slower than without it. Switched off it costs nothing.
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.steps = 0
        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        self._stages = Stages(STEP_STAGES, wait) if on else None

    def during(self, stage: str) -> AbstractContextManager[None]:
        """Count the body's time as `stage`; inside another stage, as this one alone."""
        return self._stages.during(stage) if self._stages is not None else nullcontext()

    def take(self) -> dict[str, float]:
        """Milliseconds a step by stage; nothing if it is off."""
        found = self._stages.take() if self._stages is not None else {}
        return {stage: round(1000 * seconds / max(self.steps, 1), 3) for stage, seconds in found.items()}
