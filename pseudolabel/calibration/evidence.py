"""The rows of a store that carry labels, which say how far its teacher can be trusted.

They are of labeled shards that were annotated into the store beside the unlabeled ones, best validation shards: what a
teacher was trained on it knows too well. Of very many rows those with the least hash of (shard, key) are taken, so the
same rows at every call; the same hash deals them into folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pseudolabel.calibration import Calibration
from pseudolabel.errors import CalibrationError, StoreError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.rows import check_labels, clean_rows
from pseudolabel.labels.store import Store

FOLDS = 5
FEWEST_ROWS = 50
MOST_ROWS = 20_000


@dataclass(frozen=True)
class Evidence:
    """Rows of a store with their labels: the stored columns (N, …), labels (N,), and the fold of each (N,)."""

    encoding: Encoding
    num_classes: int
    columns: Mapping[str, Tensor]
    label_N: Tensor
    fold_N: Tensor

    def __len__(self) -> int:
        return len(self.label_N)

    def where(self, chosen_N: Tensor) -> Evidence:
        columns = {name: column[chosen_N] for name, column in self.columns.items()}
        return Evidence(self.encoding, self.num_classes, columns, self.label_N[chosen_N], self.fold_N[chosen_N])

    def log_probs(self, calibration: Calibration) -> Tensor:
        """Calibrated log-probabilities (N, C)."""
        return calibration.log_probs(self.encoding, self.columns, self.num_classes)


def labeled_evidence(store: Store, encoding: Encoding, shards: Sequence[str] | None) -> tuple[Evidence, int]:
    """The labeled rows, `MOST_ROWS` at the most, and how many there are.

    Raises:
        CalibrationError: there are too few.
        LabelError: a label is none of the teacher's classes.
        StoreError: a shard of `shards` has no part.
    """
    num_classes = store.identity.num_classes
    names = [field.name for field in encoding.fields(num_classes)]
    kept: list[pa.Table] = []
    total = 0
    for shard in labeled_parts(store, shards):
        table = clean_rows(store.read_columns(shard, ["key", "view", "label", *names]))
        table = table.filter(pc.is_valid(table["label"]))
        check_labels(store, shard, table)
        hashes = [_hash(shard, key) for key in table["key"].to_pylist()]
        kept.append(table.append_column("hash", pa.array(hashes, pa.uint64())))
        total += len(table)
        if sum(map(len, kept)) > 2 * MOST_ROWS:
            kept = [_thinned(kept)]
    if total < FEWEST_ROWS:
        where = "the shards named" if shards is not None else "this store"
        raise CalibrationError(
            f"{store.root}: {total} rows of {where} carry a label, at least {FEWEST_ROWS} are needed\nannotate labeled "
            "shards that the teacher wasn't trained on (validation shards) into this store, too"
        )
    table = _thinned(kept)
    fold_N = torch.from_numpy((table["hash"].to_numpy() // (1 << 32) % FOLDS).astype(np.int64))
    label_N = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    return Evidence(encoding, num_classes, encoding.tensors(table, num_classes), label_N, fold_N), total


def labeled_parts(store: Store, shards: Sequence[str] | None) -> Iterator[str]:
    """The parts, all or of these shards, with any label. Raises `StoreError` if one of `shards` has no part."""
    there = store.part_names()
    absent = sorted(set(shards or ()) - set(there))
    if absent:
        raise StoreError(
            f"{store.root}: shard {absent[0]!r} has no part here ({len(absent)} of {len(set(shards or ()))}); annotate "
            "it into this store first"
        )
    for shard in there if shards is None else sorted(set(shards)):
        label = store.read_columns(shard, ["label"])["label"]
        if label.null_count < len(label):
            yield shard


def _thinned(tables: Sequence[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    if len(table) <= MOST_ROWS:
        return table
    return table.take(np.sort(np.argsort(table["hash"].to_numpy(), kind="stable")[:MOST_ROWS]))


def _hash(shard: str, key: str) -> int:
    return int.from_bytes(blake2b(f"{shard}\0{key}".encode(), digest_size=8).digest(), "little")
