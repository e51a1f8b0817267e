"""Census, probe and prices added up to a bill.

    seconds = start-up + (samples ÷ rate, shards dealt out to the workers)
    bytes   = rows · bytes of a row + parts · bytes of a part, and the same for rejects

With what is in a store already, it is the bill of what is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pseudolabel import storage
from pseudolabel.engines import default_engine
from pseudolabel.errors import StoreMismatch
from pseudolabel.estimates import makespan
from pseudolabel.interfaces import Engine, Teacher
from pseudolabel.labeling.batch_size import choose_batch_size
from pseudolabel.labeling.work import identify, settle
from pseudolabel.labels.store import Store, StoreIdentity, open_store
from pseudolabel.plan.auto import choose_encoding
from pseudolabel.plan.census import Census, take_census
from pseudolabel.plan.price import Price, RejectForecast, candidates, forecast_rejects, price
from pseudolabel.plan.probe import Probe
from pseudolabel.precision import choose_precision
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import ShardsLike, as_shards
from pseudolabel.teachers import parse_teacher

GOOD_KL = 0.01  # nats at T = 2: below what students notice


@dataclass(frozen=True)
class EncodingPlan:
    """A row of the table: `bytes_per_row` as `inspect` gives it, parts' fixed costs included; mean KL by T."""

    encoding: str
    bytes_per_row: float
    store_bytes: int
    kl: dict[str, float]
    chosen: bool


@dataclass(frozen=True)
class Plan:
    """What is left to do and what it takes; intervals are at 95 %. `store_bytes` counts what is there already, too,
    and leaves out the log.
    """

    shards: int
    shards_done: int
    store_bytes: int
    encoding: str
    num_classes: int
    fingerprint: str
    reason: str
    recommended: str | None = None
    encodings: tuple[EncodingPlan, ...] = ()
    bytes_to_write: int = 0
    shard_bytes: int = 0
    shards_indexed: int = 0
    damaged: tuple[str, ...] = ()
    samples: int = 0
    samples_exact: bool = True
    samples_standard_error: float = 0.0
    samples_interval: tuple[int, int] = (0, 0)
    rejects: int = 0
    reject_fraction: float = 0.0
    reject_interval: tuple[float, float] = (0.0, 1.0)
    rows: int = 0
    seconds: float = 0.0
    startup_seconds: float = 0.0
    samples_per_second: float = 0.0
    workers: int = 0
    device: str = ""
    devices: int = 0
    device_hours: float = 0.0
    probe_samples: int = 0
    probe_shards: int = 0
    probe_seconds: float = 0.0
    notes: tuple[str, ...] = ()


def plan(
    shards: ShardsLike,
    teacher: Teacher | str,
    *,
    engine: Engine | None = None,
    settings: AnnotateSettings | None = None,
    out: str | Path | None = None,
    probe_shards: int = 8,
    probe_samples: int = 4096,
    probe_seconds: float = 30.0,
    label_seconds: float | None = None,
    exact: bool | None = None,
    seed: int = 0,
    max_reject_fraction: float = 0.1,
    on_stage: Callable[[str], None] | None = None,
) -> Plan:
    """What `annotate` would take with the same arguments. With `out`, the shards that have a part there are done.

    Up to `probe_samples` from `probe_shards` shards are labeled, for `label_seconds` (or `probe_seconds`) at the most,
    as dense and, if another encoding is asked for, again in that; then the speed is measured for `probe_seconds`.
    `exact` forces or forbids counting all samples; by default a corpus of up to a gigabyte is counted.

    Raises:
        StoreMismatch: the store at `out` is of another teacher or settings.
        DamagedShard: no shard of the probe is whole.
        SpecError: what annotate would refuse, too.
    """
    started, say = time.monotonic(), on_stage or (lambda _: None)
    shards = as_shards(shards)
    teacher = parse_teacher(teacher) if isinstance(teacher, str) else teacher
    engine, settings = engine or default_engine(), settings or AnnotateSettings()
    say("loading the teacher")
    settings = choose_precision(settings, engine)
    place = storage.location(out) if out else None
    settings = choose_batch_size(settings, teacher, engine, place, keep=False)
    settings, _ = choose_encoding(settings, teacher, engine, shards, place, keep=False)
    loaded = teacher.load(torch.device("cpu"))
    settings = settle(settings, engine.devices()[0], loaded)
    identity, dense = identify(loaded, settings), settings.model_copy(update={"encoding": "dense"})
    dense_identity = identify(loaded, dense)
    del loaded
    loading = time.monotonic() - started
    present = _present(out, identity)
    done = set(present.part_names()) if present is not None else set()
    todo = [shard for shard in shards if shard.name not in done]
    there = _bytes_there(present, [shard.name for shard in shards if shard.name in done])
    if not todo:
        return Plan(
            shards=len(shards),
            shards_done=len(shards),
            store_bytes=there,
            encoding=identity.encoding,
            num_classes=identity.num_classes,
            fingerprint=identity.fingerprint,
            reason="every shard has its part",
        )
    say(f"counting the samples of {len(todo)} shards")
    census = take_census(todo, probe_shards=probe_shards, seed=seed, exact=exact)
    with storage.scratch_directory("plan") as scratch:
        probe = Probe(teacher, engine, census.picks, len(todo), scratch, seed)
        say(f"labeling up to {probe_samples} samples of {len(census.picks)} shards")
        runs, most = probe.cut(probe_samples), probe_seconds if label_seconds is None else label_seconds
        labels = probe.label(runs, dense, dense_identity, most)
        own = labels if identity == dense_identity else probe.label(runs, settings, identity, most)
        say(f"measuring the speed for {probe_seconds:g} s")
        watch = probe.clock(runs[0][0], settings, identity, own, probe_seconds)
        store_json = (scratch / "timed" / "store.json").stat().st_size if present is None else 0
        say("writing the labels in every encoding")
        rejects = forecast_rejects(labels.labeled, census.samples, census.whole_shards, scratch)
        rows = census.samples * rejects.rows_a_sample
        rows_a_part = rows / census.whole_shards
        prices = [
            price((own if spec == identity.encoding else labels).labeled, spec, rows_a_part, scratch)
            for spec in candidates(identity.num_classes, settings.encoding)
        ]
    beside = rejects.bytes + store_json
    table = tuple(
        _row(one, rows, census.whole_shards, beside + there, one.encoding == identity.encoding) for one in prices
    )
    (chosen,) = (row for row in table if row.chosen)
    recommended, reason = recommend(table) if rows else (None, "no sample of the probe could be labeled")
    seconds = loading + watch.startup + makespan(census.by_shard, watch.workers) * watch.workers / watch.rate
    return Plan(
        shards=len(shards),
        shards_done=len(shards) - len(todo),
        shards_indexed=census.indexed,
        shard_bytes=census.bytes,
        samples=census.samples,
        samples_exact=census.exact,
        samples_standard_error=round(census.standard_error, 1),
        samples_interval=(census.low, census.high),
        damaged=census.damaged,
        rejects=round(census.samples * rejects.fraction),
        reject_fraction=rejects.fraction,
        reject_interval=rejects.interval,
        rows=round(rows),
        seconds=round(seconds, 3),
        startup_seconds=round(loading + watch.startup, 3),
        samples_per_second=round(watch.rate, 3),
        workers=watch.workers,
        device=watch.device,
        devices=watch.devices,
        device_hours=round(seconds / 3600 * watch.devices, 6),
        bytes_to_write=chosen.store_bytes - there,
        store_bytes=chosen.store_bytes,
        encoding=identity.encoding,
        num_classes=identity.num_classes,
        encodings=table if rows else (),
        recommended=recommended,
        reason=reason,
        probe_samples=sum(one.samples for one in labels.labeled),
        probe_shards=len(labels.labeled),
        probe_seconds=round(time.monotonic() - started, 3),
        fingerprint=identity.fingerprint,
        notes=tuple(_notes(census, rejects, labels.whole and own.whole, max_reject_fraction)),
    )


def recommend(table: Sequence[EncodingPlan]) -> tuple[str, str]:
    """The smallest encoding that is good enough, and why."""
    good = [row for row in table if row.kl.get("2", math.inf) <= GOOD_KL]  # draws aren't judged by their KL
    best = min(good, key=lambda row: row.bytes_per_row)
    largest = max(table, key=lambda row: row.bytes_per_row)
    share = f", {best.bytes_per_row / largest.bytes_per_row:.0%} of {largest.encoding}" if best != largest else ""
    return (
        best.encoding,
        f"the smallest with a mean KL of at most {GOOD_KL:g} nats at T = 2 ({best.kl['2']:.2g}){share}",
    )


def _row(one: Price, rows: float, parts: float, beside: float, chosen: bool) -> EncodingPlan:
    of_parts = one.line(rows, parts)
    per_row = round(of_parts / rows, 2) if rows else 0.0
    return EncodingPlan(one.encoding, per_row, round(of_parts + beside), one.kl, chosen)


def _present(out: str | Path | None, identity: StoreIdentity) -> Store | None:
    """The store to go on with, if there is one. Raises `StoreMismatch` if it is of something else."""
    if out is None or not (storage.location(out) / "store.json").exists():
        return None
    found = open_store(out)
    if found.fingerprint != identity.fingerprint:
        old, new = found.identity.to_json(), identity.to_json()
        names = ", ".join(name for name in old if old[name] != new[name])
        raise StoreMismatch(
            f"{found.root}: this store was made from something else: {names} differ\n"
            "plan with the settings it was made with, or with another --out"
        )
    return found


def _bytes_there(present: Store | None, names: Sequence[str]) -> int:
    if present is None:
        return 0
    parts = {f"{name}.parquet" for name in names}
    files = [(one, storage.entries(present.root / one)) for one in ("", "parts", "rejects")]
    return sum(
        one.size
        for place, found in files
        for one in found
        if (one.name in parts if place else one.name == "store.json")
    )


def _notes(census: Census, rejects: RejectForecast, whole: bool, limit: float) -> list[str]:
    notes = []
    if census.damaged:
        notes.append(
            f"{len(census.damaged)} of {census.indexed} shards opened are damaged: annotate will do the others, name "
            "these and exit with 1"
        )
    if rejects.fraction > limit:
        notes.append(
            f"annotate would stop: {rejects.fraction:.1%} of the samples are rejected, more than "
            f"--max-reject-fraction {limit:g}"
        )
    if not whole:
        notes.append("time was up before all samples of the probe were labeled; more --label-seconds make it surer")
    return notes
