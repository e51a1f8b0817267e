"""Annotating many shards: skip those that are done, publish each part whole, name what is damaged at the end.

    annotate("corpus/unlabeled", "checkpoint:runs/teacher", "store")

What happens to one shard is in `labeling/`; where it happens is the engine's business.
"""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass

import torch

from pseudolabel import storage
from pseudolabel.classes.space import how_classes_differ, named_beside
from pseudolabel.engines import default_engine
from pseudolabel.errors import PseudolabelError, ShardListError, SpecError, StoreMismatch, TooManyRejects
from pseudolabel.failures import Failures
from pseudolabel.interfaces import Engine, LoadedTeacher, Teacher
from pseudolabel.labeling.batch_size import choose_batch_size
from pseudolabel.labeling.line import Progress
from pseudolabel.labeling.work import AnnotateWork, annotate_shard, identify, settle
from pseudolabel.labels import store
from pseudolabel.labels.footers import WORTH_IT, read_footers
from pseudolabel.labels.schema import PartInfo
from pseudolabel.plan.auto import choose_encoding
from pseudolabel.precision import choose_precision
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, ShardsLike, as_shards
from pseudolabel.stages import STAGES, bottleneck, shares
from pseudolabel.teachers import parse_teacher

__all__ = ["AnnotateResult", "Progress", "annotate", "annotate_shard"]

_EARLY_STOP_SAMPLES = 1000
_KEEP_EVERY = 5000  # parts: what a later command would have to read one by one


@dataclass(frozen=True)
class AnnotateResult:
    """Totals over the shards that were asked for, those already done included; `parts_*`, `seconds` and the rest are
    this command's. `stages`: share of the workers' time by stage; `bottleneck`: the largest, and what to change.
    `encoding_reason`: why it was chosen, if it was left to `auto:EPS`.
    """

    samples: int
    rejects: int
    parts_written: int
    parts_skipped: int
    seconds: float
    fingerprint: str
    encoding: str
    batch_size: int
    precision: str
    stages: dict[str, float]
    bottleneck: str
    encoding_reason: str | None = None


def annotate(
    shards: ShardsLike,
    teacher: Teacher | str,
    out: str | os.PathLike[str],
    *,
    engine: Engine | None = None,
    settings: AnnotateSettings | None = None,
    max_reject_fraction: float = 0.1,
    on_progress: Callable[[Progress], None] | None = None,
) -> AnnotateResult:
    """Annotate `shards` (listed, or as on the command line) into the store at `out`; those with a part are skipped.

    `teacher` is a description or a spec; without an `engine` this machine's devices do it.

    Raises:
        StoreMismatch: the store is of another teacher or settings, or a shard was edited since it was annotated.
        DamagedShard: some shards are damaged; all others are done by then.
        StorageError: some shards are gone or can't be read, and all others are done by then; or one after the other
            can't be read.
        TooManyRejects: more than `max_reject_fraction` of the samples were rejected.
    """
    if not 0 <= max_reject_fraction <= 1:
        raise SpecError(f"max_reject_fraction is {max_reject_fraction}; it is a share, from 0 to 1")
    shards = as_shards(shards)
    if not shards:
        raise ShardListError("no shards given")
    teacher = parse_teacher(teacher) if isinstance(teacher, str) else teacher
    if not hasattr(teacher, "load"):
        raise SpecError(f"a teacher is wanted, a spec or what parse_teachers gives, not {type(teacher).__name__}")
    storage.check_writable(storage.location(out))
    engine, settings = engine or default_engine(), settings or AnnotateSettings()
    started = time.monotonic()
    devices = engine.devices()
    settings = choose_precision(settings, engine)
    settings = choose_batch_size(settings, teacher, engine, storage.location(out))
    settings, why = choose_encoding(settings, teacher, engine, shards, storage.location(out))
    loaded = teacher.load(torch.device("cpu"))
    _compare_classes(shards, loaded)
    settings = settle(settings, devices[0], loaded)
    target = store.create(out, identify(loaded, settings))
    del loaded
    done = read_footers(target, {shard.name for shard in shards}, keep=True)
    tally = _Tally(max_reject_fraction, lambda shard: _commonest_reason(target, shard))
    todo: dict[str, Shard] = {}
    for shard in shards:
        footer = done.pop(shard.name, None)
        if footer is None:
            todo[shard.name] = shard
            continue
        info = footer.info
        _check_same_size(shard, info)
        tally.add(shard, info.samples, info.rejects)
    fresh = 0
    work = AnnotateWork(teacher, settings, os.fspath(target.root), target.fingerprint, len(devices))
    log = storage.Journal(
        target.root / "log" / f"annotate-{time.strftime('%Y%m%dT%H%M%S')}-{socket.gethostname()}-{os.getpid()}.jsonl"
    )
    failures = Failures(len(shards))
    spent = dict.fromkeys(STAGES, 0.0)
    try:
        with closing(engine.map(work, list(todo.values()))) as events:
            for event in events:
                spent = {stage: spent[stage] + event.seconds.get(stage, 0.0) for stage in STAGES}
                if event.failure is not None:
                    failures.add(todo[event.shard], event.failure)
                else:
                    failures.reset()
                if event.finished is not None:
                    log.append({"shard": event.shard, **event.finished})
                    tally.add(todo[event.shard], event.finished["samples"], event.finished["rejects"])
                    tally.check(at_least=_EARLY_STOP_SAMPLES)
                    fresh += 1
                    if fresh % _KEEP_EVERY == 0:
                        _remember(target)
                if on_progress is not None:
                    on_progress(event)
    finally:
        log.close()
        target.tidy()  # the workers are gone; what they had begun to write is stale
        if fresh % _KEEP_EVERY >= WORTH_IT:
            _remember(target)
    failures.check()
    tally.check()
    seconds = round(time.monotonic() - started, 3)
    stages = {stage: round(share, 4) for stage, share in shares(spent).items()}
    bound = bottleneck(spent, gpu=devices[0] != "cpu") if todo else "nothing was left to do"
    result = AnnotateResult(
        tally.samples,
        tally.rejects,
        len(todo),
        len(shards) - len(todo),
        seconds,
        target.fingerprint,
        settings.encoding,
        settings.samples_per_batch * settings.views,
        settings.precision,
        stages,
        bound,
        why,
    )
    log.append({"result": asdict(result)})
    log.close()
    return result


class _Tally:
    """Samples and rejects so far, and the shard with the largest share of rejects."""

    def __init__(self, limit: float, reason: Callable[[str], str]) -> None:
        self._limit, self._reason = limit, reason
        self.samples = self.rejects = 0
        self._worst: tuple[float, int, int, str, str] = (0.0, 0, 0, "", "")

    def add(self, shard: Shard, samples: int, rejects: int) -> None:
        self.samples += samples
        self.rejects += rejects
        self._worst = max(self._worst, (rejects / max(samples, 1), rejects, samples, shard.where, shard.name))

    def check(self, at_least: int = 1) -> None:
        if self.samples >= at_least and self.rejects > self._limit * self.samples:
            _, rejects, samples, path, name = self._worst
            raise TooManyRejects(
                f"{self.rejects} of {self.samples} samples were rejected, more than "
                f"--max-reject-fraction {self._limit:g}\n"
                f"the worst shard is {path}: {rejects} of {samples}, most of them: {self._reason(name)}\n"
                "mend what is at fault (inspect --rejects lists all), or raise the limit; finished shards are kept"
            )


def _commonest_reason(target: store.Store, shard: str) -> str:
    with suppress(PseudolabelError):
        reasons = Counter(row["detail"] for row in target.read_rejects(shard).to_pylist())
        return str(reasons.most_common(1)[0][0])[:200]
    return "see the store's rejects/"


def _remember(target: store.Store) -> None:
    """Keep the footers for the next command. What is wrong with a part, it will say."""
    with suppress(PseudolabelError):
        read_footers(target, keep=True)


def _compare_classes(shards: Sequence[Shard], teacher: LoadedTeacher) -> None:
    """Warn where the corpus names other classes than the teacher has: the labels may be wanted all the same."""
    names = named_beside(shards)
    if names is None or not (what := how_classes_differ(names, teacher.classes)):
        return
    warnings.warn(
        f"{what}: train will refuse these labels for that corpus; a class map (--class-map, or ?class_map=FILE in a "
        "teacher's spec) makes one's classes of the other's, in any order",
        stacklevel=3,
    )


def _check_same_size(shard: Shard, info: PartInfo) -> None:
    size = storage.entry(storage.location(shard.path)).size if shard.size is None else shard.size
    if size != info.size:
        raise StoreMismatch(
            f"{shard.where}: {size} bytes, but {info.size} when it was annotated: the shard was edited "
            "or is another one\n"
            "put the old shard back, or delete its part to annotate it anew"
        )
