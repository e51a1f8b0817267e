"""`--batch-size auto`: the batch that labels fastest, found by trying.

Sizes double from 8 while the rate grows and memory lasts. The choice decides the last bit of a logit, so it is made
once for a store and kept in STORE/annotate.json: a resumed run takes the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from pseudolabel import storage
from pseudolabel.errors import OutOfMemory, StorageError
from pseudolabel.interfaces import Engine, Teacher
from pseudolabel.labeling.forward import Forward
from pseudolabel.labeling.work import settle
from pseudolabel.settings import AnnotateSettings

_SMALLEST, _LARGEST = 8, 1024
_WORTH_IT = 1.03  # a larger batch must be so much faster: it costs memory, and bigger last batches
_SECONDS = 0.5  # of timing, at least, for each size
_LONGEST = 10.0  # seconds for one pass: no larger batch is tried


def choose_batch_size(
    settings: AnnotateSettings, teacher: Teacher, engine: Engine, out: storage.Location | None, *, keep: bool = True
) -> AnnotateSettings:
    """Settings whose batch size is a number if it was `auto`: the one known for the store at `out`, or one that is
    tried now and, with `keep`, known from then on. Raises what loading the teacher raises.
    """
    if settings.batch_size != "auto":
        return settings
    path = out / "annotate.json" if out is not None else None
    known = _read(path) if path is not None else None
    if known is None:
        with closing(engine.map(ProbeBatchSize(teacher, settings), ["probe"])) as found:
            known = next(found)
        if path is not None and keep:
            storage.write_atomic(path, json.dumps(known) + "\n")
    return settings.model_copy(update={"batch_size": known["batch_size"]})


def _read(path: storage.Location) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return dict(known) if isinstance(known["batch_size"], int) and known["batch_size"] > 0 else None
    except (OSError, StorageError, ValueError, KeyError, TypeError):
        return None  # none there, or spoiled: it is probed again


@dataclass(frozen=True)
class ProbeBatchSize:
    """What an engine runs: times forward passes of growing batches of black images. Pickles."""

    teacher: Teacher
    settings: AnnotateSettings

    def __call__(self, items: Iterator[str], device: str) -> Iterator[dict[str, Any]]:
        for _ in items:
            teacher = self.teacher.load(torch.device(device))
            one = teacher.prepare(torch.zeros(3, 64, 64, dtype=torch.uint8))
            rates: dict[int, float] = {}
            size = max(_SMALLEST, self.settings.views)
            while size <= max(_LARGEST, self.settings.views):
                settings = settle(self.settings.model_copy(update={"batch_size": size}), device, teacher)
                forward = Forward(teacher, settings, device)
                rows = settings.samples_per_batch * settings.views
                inputs = tuple(part[None].expand(rows, *part.shape).contiguous() for part in one)
                try:
                    rates[size], longest = _rate(forward, inputs)
                except OutOfMemory:
                    break
                if forward.was_split or longest > _LONGEST or rates[size] < max(rates.values()) / _WORTH_IT:
                    break
                size *= 2
            best = max(rates.values(), default=0.0)
            chosen = next((size for size, rate in rates.items() if rate * _WORTH_IT >= best), _SMALLEST)
            yield {"batch_size": chosen, "device": device, "samples_per_second": rates}


def _rate(forward: Forward, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Rows a second after one pass to warm up, and the seconds of a pass."""
    forward.finish(forward.start(inputs))
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < _SECONDS or passes < 2:
        forward.finish(forward.start(inputs))
        passes += 1
    seconds = time.perf_counter() - started
    return passes * len(inputs[0]) / seconds, seconds / passes
