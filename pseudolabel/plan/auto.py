"""`--encoding auto:EPS`: the smallest K that loses no more than EPS nats, found by trying.

Some samples are labeled with all their logits. Of the row's divergence KL(full ‖ stored) the mean must stay within EPS
at T = 1, 2 and 4: not that of the probe alone but, with a certainty of 95 %, that of the corpus, so its standard error
times 1.645 is added, less where the probe is much of the corpus and nothing where it is all of it. Where `topk:K` would
take more bytes than all logits, these are kept.

The choice is made once for a store and kept in STORE/encoding.json, written before the store: whoever comes second,
another machine with another slice, takes what the first one chose.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pseudolabel import storage
from pseudolabel.errors import SpecError, StorageError, StoreMismatch
from pseudolabel.interfaces import Encoding, Engine, Teacher
from pseudolabel.labeling.work import identify, settle
from pseudolabel.labels.encodings import Dense, TopK, parse_encoding
from pseudolabel.labels.facts import divergence
from pseudolabel.labels.tensors import to_torch
from pseudolabel.plan.census import take_census
from pseudolabel.plan.probe import Labeled, Probe
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard

SAMPLES = 1024
_SHARDS = 8
_ONE_SIDED = 1.645  # standard errors: 95 %
_ROWS = 256  # whose divergence is computed at once


def choose_encoding(
    settings: AnnotateSettings,
    teacher: Teacher,
    engine: Engine,
    shards: Sequence[Shard],
    out: storage.Location | None,
    *,
    keep: bool = True,
) -> tuple[AnnotateSettings, str | None]:
    """Settings whose encoding is one if it was `auto:EPS`, and why it is that: the one known for the store at `out`, or
    one that is found now and, with `keep`, known from then on. The settings leave nothing else to the device but the
    precision.

    Raises:
        SpecError: EPS is no number above 0.
        StoreMismatch: the encoding of the store was chosen for another EPS.
    """
    if not settings.encoding.startswith("auto"):
        return settings, None
    most = _parse(settings.encoding)
    path = out / "encoding.json" if out is not None else None
    known = _read(path) if path is not None else None
    if known is None:
        known = {"asked": settings.encoding, **_probe(settings, teacher, engine, shards, most)}
        if path is not None and keep and not storage.write_new(path, json.dumps(known) + "\n"):
            known = _read(path) or known
    if _parse(known["asked"]) != most:
        raise StoreMismatch(
            f"{path}: this store's encoding, {known['encoding']}, was chosen for {known['asked']}, not "
            f"{settings.encoding}\nuse {known['asked']} or {known['encoding']} to go on with it, or another --out"
        )
    why = str(known.get("why", f"chosen for {known['asked']} when the store was begun"))
    return settings.model_copy(update={"encoding": known["encoding"]}), why


def smallest(labeled: Sequence[Labeled], most: float, samples: float) -> tuple[str, dict[str, float]]:
    """The encoding of the fewest bytes that loses at most `most` nats on `samples` samples like the labeled ones, whose
    rows are dense, and its mean loss on these by temperature.
    """
    logits_NC = torch.cat([to_torch(one.rows["logits"]).float() for one in labeled])
    weight_N = torch.cat([torch.full((len(one.rows),), one.weight / max(len(one.rows), 1)) for one in labeled]).double()
    num_classes = logits_NC.shape[-1]
    left = max(0.0, 1 - sum(one.samples for one in labeled) / max(samples, 1))

    def lost(encoding: Encoding) -> tuple[Tensor, bool]:
        mean_T, error_T = _mean(_divergence(encoding, logits_NC), weight_N)
        return mean_T, bool((mean_T + _ONE_SIDED * math.sqrt(left) * error_T <= most).all())

    if not len(logits_NC):
        raise SpecError("auto: not one sample of the probe could be labeled; name an encoding yourself")
    chosen: Encoding = Dense()
    low, high = 1, _largest(num_classes) + 1
    while low < high:
        middle = (low + high) // 2
        if lost(TopK(middle))[1]:
            high, chosen = middle, TopK(middle)
        else:
            low = middle + 1
    means = lost(chosen)[0].tolist()
    return chosen.name, {f"{t:g}": float(f"{kl:.6g}") for t, kl in zip(chosen.temperatures, means, strict=True)}


def _largest(num_classes: int) -> int:
    """The largest K that takes fewer bytes than all logits; below 1 if none does."""
    id_bytes = 2 if num_classes <= 1 << 16 else 4
    return min((2 * num_classes - 12 - 1) // (2 + id_bytes), num_classes - 1)


def _why(asked: str, name: str, kl: dict[str, float], samples: int, num_classes: int) -> str:
    """A line for people."""
    if name != Dense().name:
        temperature, worst = max(kl.items(), key=lambda one: one[1])
        return f"the fewest classes for {asked}: {worst:.2g} nats lost at T = {temperature}, on {samples} samples"
    largest = _largest(num_classes)
    more = f"more take more bytes than all {num_classes} logits"
    if largest < 1:
        return f"any topk:K takes more bytes than all {num_classes} logits"
    return (
        f"topk:1 loses more than {asked} allows; {more}"
        if largest == 1
        else (f"topk:1 to topk:{largest} lose more than {asked} allows; {more}")
    )


def _divergence(encoding: Encoding, logits_NC: Tensor) -> Tensor:
    return torch.cat(
        [
            divergence(encoding, encoding.encode(one, torch.zeros(len(one)).long()), one)
            for one in torch.split(logits_NC, _ROWS)
        ],
        dim=-1,
    )


def _mean(lost_TN: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted means and their standard errors."""
    share_N = weight_N / weight_N.sum()
    mean_T = (lost_TN * share_N).sum(-1)
    return mean_T, ((lost_TN - mean_T[:, None]).square() * share_N.square()).sum(-1).sqrt()


def _probe(
    settings: AnnotateSettings, teacher: Teacher, engine: Engine, shards: Sequence[Shard], most: float
) -> dict[str, Any]:
    dense = settings.model_copy(update={"encoding": "dense", "keep_members": False})
    loaded = teacher.load(torch.device("cpu"))
    dense = settle(dense, engine.devices()[0], loaded)
    identity = identify(loaded, dense)
    del loaded
    census = take_census(shards, probe_shards=_SHARDS, seed=0)
    with storage.scratch_directory("auto") as scratch:
        probe = Probe(teacher, engine, census.picks, len(shards), scratch, seed=0)
        labels = probe.label(probe.cut(SAMPLES), dense, identity, math.inf)
    name, kl = smallest(labels.labeled, most, census.samples)
    samples = sum(one.samples for one in labels.labeled)
    why = _why(settings.encoding, name, kl, samples, identity.num_classes)
    return {"encoding": name, "samples": samples, "kl": kl, "why": why}


def _parse(spec: str) -> float:
    number = re.fullmatch(r"auto:([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)", spec)
    if number is None or not 0 < float(number[1]) < math.inf:
        raise SpecError(f"{spec!r}: write auto:EPS with the mean KL in nats that may be lost, such as auto:0.01")
    return float(number[1])


def _read(path: storage.Location) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        _parse(known["asked"])
        parse_encoding(known["encoding"])
        return dict(known)
    except (OSError, StorageError, SpecError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none there, or spoiled: it is chosen again, and must fit the store
