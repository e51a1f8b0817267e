"""Are a store's labels those of its teacher? Some samples are annotated again, and compared row by row.

    again = Reannotation(store, "checkpoint:runs/teacher", share=0.001, tolerance=0.01)
    again.compare(opened, part, rejects)          a shard's drawn samples; raises OtherLabels
    again.found.worst_kl

Which samples are drawn is decided by a hash of shard, key and seed: in every run the same, however many shards there
are. The teacher runs with the store's own settings, read from its identity.

What must be equal is equal: which samples are labeled and which rejected, keys, labels, and the numbers of the views.
Logits are not: their last bits hang on the batch's size and on the device, and under bf16 on more than the last.
They are compared by KL(stored ‖ made again) in nats at temperature 1, over what the encoding keeps of a row (all
classes, or the kept ones and the tail), less what encoding the new logits costs. Where classes are drawn at random, the
total variation V between the draws takes its place, as 2·V²: by Pinsker's inequality no KL with this V is smaller.
The columns that sum up a row may differ by as much as distributions of that KL can.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pseudolabel.errors import OtherLabels, SpecError, StoreMismatch
from pseudolabel.interfaces import Encoding, Teacher
from pseudolabel.labeling.forward import Forward
from pseudolabel.labeling.work import annotate_samples, identify, settle
from pseudolabel.labels.encodings import Dense, parse_encoding
from pseudolabel.labels.store import Store, StoreIdentity, differences
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shards import ShardFile
from pseudolabel.teachers import parse_teacher
from pseudolabel.views.augment import ViewPlan

_EQUAL = ("key", "index", "view", "crop", "flip", "aug_seed", "label")
_SLACK = 1e-3  # of float16, in the summary's probabilities


@dataclass(frozen=True)
class Compared:
    """Samples compared so far, KL over their rows in nats, and the worst row in words."""

    samples: int = 0
    rows: int = 0
    sum_kl: float = 0.0
    worst_kl: float = 0.0
    worst_row: str = ""


class Reannotation:
    """A store's teacher, ready to label samples of its shards again."""

    def __init__(
        self,
        store: Store,
        teacher: Teacher | str,
        *,
        share: float,
        tolerance: float,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Load the teacher. Raises `StoreMismatch` if it is not the store's, `SpecError`."""
        if not 0 < share <= 1:
            raise SpecError(f"sample is {share}; it is the share of samples that are annotated again, above 0, up to 1")
        if not 0 < tolerance < math.inf:
            raise SpecError(f"tolerance is {tolerance}; it is in nats, above 0")
        described = parse_teacher(teacher) if isinstance(teacher, str) else teacher
        self._teacher = described.load(torch.device(device))
        self._encoding = parse_encoding(store.identity.encoding)
        own = settle(settings_of(store.identity), device, self._teacher)
        found = identify(self._teacher, own)
        if found.fingerprint != store.fingerprint:
            raise StoreMismatch(
                f"{store.root}: {described.uri} would not give these labels:\n"
                + "\n".join(differences(store.identity.to_json(), found.to_json())[:3])
                + "\nname the store's own teacher, with its class map and weights"
            )
        # What is compared are logits, unless chance had a hand in the encoding.
        self._settings = own if self._encoding.draws else own.model_copy(update={"encoding": Dense().name})
        self._forward = Forward(self._teacher, self._settings, device)
        self._share, self._seed, self._tolerance = share, seed, tolerance
        self._num_classes, self._members = store.identity.num_classes, len(store.identity.teacher.get("members", ()))
        self._nearest: tuple[float, str, int] | None = None
        self.found = Compared()

    @property
    def nearest(self) -> tuple[str, int] | None:
        """Shard and position of the sample that would be drawn first, if none was drawn so far."""
        return None if self.found.samples or self._nearest is None else self._nearest[1:]

    def compare(self, opened: ShardFile, part: pa.Table, rejects: pa.Table) -> None:
        """The samples drawn from a shard. Raises `OtherLabels`."""
        name = opened.shard.name
        places = _places(name, opened.keys, self._seed)
        if len(places) and (self._nearest is None or (places.min(), name) < self._nearest[:2]):
            self._nearest = (float(places.min()), name, int(places.argmin()))
        self.compare_samples(opened, part, rejects, np.flatnonzero(places < self._share).tolist())

    def compare_samples(self, opened: ShardFile, part: pa.Table, rejects: pa.Table, positions: Sequence[int]) -> None:
        """These samples of a shard, in ascending order. Raises `OtherLabels`."""
        if not positions:
            return
        where = opened.shard.where
        again = annotate_samples(opened, positions, self._teacher, self._settings, self._forward)
        self.found = replace(self.found, samples=self.found.samples + len(positions))
        stored = part.filter(np.isin(part["index"].to_numpy(), positions))
        rejected = set(rejects["index"].to_pylist()).intersection(positions)
        for index in sorted(rejected ^ set(again.rejects["index"].to_pylist())):
            was, now = ("rejected", "labeled") if index in rejected else ("labeled", "rejected")
            raise OtherLabels(f"{where}: sample {opened.keys[index]!r} was {was}, made again it is {now}")
        for name in _EQUAL:
            if name in stored.column_names and not stored[name].equals(again.part[name]):
                raise OtherLabels(f"{where}: of {len(positions)} samples made again, some have another {name}")
        if stored.num_rows:
            self._compare_rows(where, stored, again.part)

    def _compare_rows(self, where: str, stored: pa.Table, again: pa.Table) -> None:
        kl_N = self._divergence(stored, again, "")
        for number in range(self._members if self._settings.keep_members else 0):
            kl_N = np.maximum(kl_N, self._divergence(stored, again, f"member{number}_"))
        row = int(kl_N.argmax())
        worst, named = float(kl_N[row]), f"view {stored['view'][row]} of {stored['key'][row].as_py()!r}"
        now = self.found
        self.found = replace(now, rows=now.rows + len(kl_N), sum_kl=now.sum_kl + float(kl_N.sum()))
        if worst >= now.worst_kl:
            self.found = replace(self.found, worst_kl=worst, worst_row=f"{where}: {named}")
        if worst > self._tolerance:
            above = int((kl_N > self._tolerance).sum())
            raise OtherLabels(
                f"{where}: {above} of {len(kl_N)} rows made again differ by more than {self._tolerance:g} nats, most "
                f"of all {named}: {worst:.3g}"
            )
        if (column := _other_summary(stored, again, self._tolerance, self._num_classes)) is not None:
            raise OtherLabels(f"{where}: the rows made again have another {column}")

    def _divergence(self, stored: pa.Table, again: pa.Table, prefix: str) -> NDArray[np.float64]:
        """How far each stored row is from the one made again, in nats; `prefix` says whose columns."""
        encoding, classes = self._encoding, self._num_classes
        ours = encoding.tensors(_own_columns(stored, encoding, prefix, classes), classes)
        made_as: Encoding = parse_encoding(self._settings.encoding)
        theirs = made_as.tensors(_own_columns(again, made_as, prefix, classes), classes)
        temperature = encoding.temperatures[0]
        full_BC = made_as.full_log_probs(theirs, temperature, classes).double()
        if encoding.draws:
            apart_BC = encoding.full_log_probs(ours, temperature, classes).double().exp() - full_BC.exp()
            return np.asarray(2 * (apart_BC.abs().sum(-1) / 2).square())
        anew = encoding.encode(theirs["logits"].float(), torch.zeros(len(full_BC), dtype=torch.int64))
        found_B = _kl(encoding, ours, full_BC) - _kl(encoding, anew, full_BC)
        return np.asarray(found_B.clamp(min=0.0))


def settings_of(identity: StoreIdentity) -> AnnotateSettings:
    """What a store was annotated with, as far as it decides its labels. Raises `StoreError`."""
    plan = ViewPlan.from_json(identity.views)
    return AnnotateSettings.model_validate(
        {
            "encoding": identity.encoding,
            "precision": identity.precision,
            "compile": bool(identity.teacher.get("compiled")),
            "keep_members": bool(identity.teacher.get("members_kept")),
            "fast_jpeg": plan.shrink_to > 0,
            "views": plan.count,
            "view_seed": plan.seed,
            "view_policy": plan.policy,
            "crop_scale": plan.crop_scale,
            "tta": plan.tta,
        }
    )


def _places(shard: str, keys: Sequence[str], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each sample: it is drawn if that is less than the share that is wanted."""
    head = blake2b(struct.pack("<Q", seed) + shard.encode() + b"\0", digest_size=8)

    def place(key: str) -> int:
        hashed = head.copy()
        hashed.update(key.encode())
        return int.from_bytes(hashed.digest(), "little") >> 11

    return np.array([place(key) for key in keys], np.float64) * 2.0**-53


def _own_columns(table: pa.Table, encoding: Encoding, prefix: str, classes: int) -> pa.Table:
    names = [field.name for field in encoding.fields(classes)]
    return table.select([f"{prefix}{name}" for name in names]).rename_columns(names)


def _kl(encoding: Encoding, columns: Mapping[str, Tensor], full_BC: Tensor) -> Tensor:
    """KL(columns ‖ full) in nats at T = 1, over the outcomes that the encoding knows, shape (B,)."""
    wide = {name: column.double() if column.is_floating_point() else column for name, column in columns.items()}
    p_BM, q_BM = encoding.log_probs(wide, full_BC, 1.0)
    p_BM, q_BM = p_BM.double(), q_BM.double()
    there_BM = p_BM.exp() > 0
    return (p_BM.exp() * torch.where(there_BM, p_BM - q_BM, 0.0)).sum(-1)


def _other_summary(stored: pa.Table, again: pa.Table, tolerance: float, num_classes: int) -> str | None:
    """The first of the columns that sum up a row that differs by more than it can.

    Distributions within a KL of t nats are within V = √(t/2) in any event (Pinsker), and their entropies within
    V·log(C − 1) + h(V) (Fannes, Audenaert).
    """
    most = math.sqrt(tolerance / 2)
    spread = min(most, 0.5)
    binary = -spread * math.log(spread) - (1 - spread) * math.log(1 - spread)
    limits = {
        "confidence": most,
        "margin": 2 * most,
        "entropy": most * math.log(max(num_classes - 1, 1)) + binary,
    }
    for name, limit in limits.items():
        if np.abs(stored[name].to_numpy() - again[name].to_numpy()).max() > limit + _SLACK:
            return name
    other_N = stored["pred"].to_numpy() != again["pred"].to_numpy()
    return "pred" if (other_N & (again["margin"].to_numpy() > 2 * most + _SLACK)).any() else None
