"""Where a training step's time goes.

load       waiting for the next batch (with loader processes: for them)
copy       moving it to the device and normalising it
forward    the student's logits
loss       both losses
backward   gradients
update     clipping, optimizer, averaged weights; in a team, the sum of gradients
validate   measuring the student on --val
save       writing checkpoints
other      starting, logging
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from pseudolabel.stages import Stages, bound, shares

STEP_STAGES = ("load", "copy", "forward", "loss", "backward", "update", "validate", "save", "other")


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


def advice(milliseconds: Mapping[str, float]) -> str:
    """One line: which stage bounds a step, and what to change."""
    student = "the student itself: a smaller one, --precision bf16, --compile, or a GPU"
    known = {
        "load": "more --workers, --cache ram, or smaller images",
        "copy": "smaller images, or a larger --batch-size",
        "forward": student,
        "backward": student,
        "loss": "a larger --batch-size",
        "update": "a larger --batch-size; --ema 0 and --clip-norm 0 leave work out",
        "validate": "a larger --eval-every, or fewer validation images",
        "save": "a larger --eval-every, or a faster disk",
        "other": "more steps: starting takes its time",
    }
    return bound(milliseconds, "the time", known)


def summary(milliseconds: Mapping[str, float]) -> str:
    """One line: what a step takes, and each stage's share of it."""
    whole = sum(milliseconds.values())
    return f"a step takes {whole:.2f} ms: " + ", ".join(
        f"{stage} {share:.0%}" for stage, share in shares(milliseconds).items()
    )
