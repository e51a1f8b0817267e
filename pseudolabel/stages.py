"""Where annotate's time goes: seconds per stage, and what to change about the largest.

fetch      waiting for shards of an object storage
decode     reading and decoding, or waiting for it where it runs in processes of its own
forward    the teacher and the encoding of its logits, or waiting for the device
write      waiting for the previous part to be on disk
other      all else: handing out shards, building tables
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("fetch", "decode", "forward", "write", "other")


@dataclass
class Stages:
    """A worker's clock: every moment since the last `take` belongs to one stage of `names`, the innermost, `other` if
    to none. `border` is called where one stage ends and the next begins.
    """

    names: tuple[str, ...] = STAGES
    border: Callable[[], None] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)
    _stage: str = "other"

    def __post_init__(self) -> None:
        self.seconds = dict.fromkeys(self.names, 0.0)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Count the body's time as `stage`."""
        outer = self._stage
        self._change_to(stage)
        try:
            yield
        finally:
            self._change_to(outer)

    def take(self) -> dict[str, float]:
        """Seconds per stage since the last call, to a tenth of a millisecond."""
        self._change_to(self._stage)
        taken, self.seconds = self.seconds, dict.fromkeys(self.names, 0.0)
        return {stage: round(seconds, 4) for stage, seconds in taken.items()}

    def _change_to(self, stage: str) -> None:
        if self.border is not None:
            self.border()
        now = time.monotonic()
        self.seconds[self._stage] += now - self._since
        self._since, self._stage = now, stage


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each stage's share of the whole, in [0, 1]; all 0 if no time has passed."""
    total = sum(seconds.values())
    return {stage: value / total if total else 0.0 for stage, value in seconds.items()}


def bound(seconds: Mapping[str, float], of: str, advice: Mapping[str, str]) -> str:
    """One line: which stage takes the largest share `of` something, and what to change about it."""
    share = shares(seconds)
    if not any(share.values()):
        return "nothing was done, so nothing was slow"
    worst = max(share, key=lambda stage: share[stage])
    return f"bound by {worst} ({share[worst]:.0%} of {of}): {advice[worst]}"


def bottleneck(seconds: Mapping[str, float], *, gpu: bool) -> str:
    """What bounds annotate."""
    advice = {
        "fetch": "the network or the storage: bring the machine nearer to it; more --workers fetch more at once",
        "decode": "give the GPU's host more cores, or store smaller images; --fast-jpeg helps with large ones"
        if gpu
        else "store smaller images; --fast-jpeg helps with large ones",
        "forward": "the teacher itself: only a larger --batch-size, --precision bf16, --compile, more devices or "
        "--slice over more machines make it faster"
        if gpu
        else "the teacher itself: try --batch-size auto, a GPU, or --slice over more machines",
        "write": "the disk or the network of the store: put it on a faster one, or choose an encoding of fewer bytes "
        "(see plan)",
        "other": "bookkeeping: larger shards or a larger --batch-size make it less",
    }
    return bound(seconds, "the workers' time", advice)
