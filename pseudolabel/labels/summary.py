"""What is in a store, from the parts' footers alone: cheap, however many rows there are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pseudolabel.labels.footers import read_footers
from pseudolabel.labels.store import Store, open_store


@dataclass(frozen=True)
class StoreSummary:
    """`rows` counts all `views` of a sample; `bytes_per_row` counts whole part files. `fidelity`: mean over rows, and
    the worst part's 99th percentile, of KL(full ‖ stored) in nats, by temperature.
    """

    rows: int
    views: int
    parts: int
    rejects: int
    num_classes: int
    encoding: str
    bytes_per_row: float
    fidelity: Mapping[str, Mapping[str, float]]
    fingerprint: str
    teacher: Mapping[str, Any]
    classes: tuple[str, ...]


def summarize_store(store: Store | str | os.PathLike[str]) -> StoreSummary:
    """Read every part's footer. Raises `StoreError`, `StoreMismatch`, `DamagedPart`."""
    store = store if isinstance(store, Store) else open_store(store)
    rows = parts = rejects = size = 0
    sums: dict[str, float] = {}
    worst: dict[str, float] = {}
    for footer in read_footers(store).values():
        info = footer.info
        labeled = (info.samples - info.rejects) * store.identity.num_views
        rows += labeled
        rejects += info.rejects
        parts += 1
        size += footer.bytes
        for temperature, value in info.fidelity["mean"].items():
            sums[temperature] = sums.get(temperature, 0.0) + value * labeled
        for temperature, value in info.fidelity["p99"].items():
            worst[temperature] = max(worst.get(temperature, 0.0), value)
    identity = store.identity
    mean = {temperature: value / max(rows, 1) for temperature, value in sums.items()}
    return StoreSummary(
        rows=rows,
        views=identity.num_views,
        parts=parts,
        rejects=rejects,
        num_classes=identity.num_classes,
        encoding=identity.encoding,
        bytes_per_row=round(size / rows, 2) if rows else 0.0,
        fidelity={"mean": mean, "p99": worst},
        fingerprint=store.fingerprint,
        teacher=identity.teacher,
        classes=identity.classes,
    )


def list_rejects(store: Store) -> Iterator[dict[str, Any]]:
    """The ledger: shard, index, key, stage, error and detail of every rejected sample. Raises `DamagedPart`."""
    for name in store.part_names():
        yield from store.read_rejects(name).to_pylist()
